/* See wal_list.h. */
#include "wal_list.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "command.h"
#include "format.h"
#include "frames.h"
#include "wal.h"
#include "wal_xacts.h"

struct list_options {
    struct wal_options wal;
    char **interval;
    int intervals;
};

static const char *const STATUS[] = {"?", "committed", "aborted", "prepared", "committed prepared", "aborted prepared"};

static int usage(const char *message, const char *argument)
{
    struct err e;
    err_set(&e, ERR_USAGE, message, argument);
    err_hint(&e, "pgcdp-engine wal --system-identifier N [--segment-bytes N] [--start-lsn X/Y] INTERVAL ...");
    return command_failed(&e, ERR_USAGE);
}

static bool parse_lsn(const char *text, uint64_t *out)
{
    unsigned high, low;
    int used = 0;
    if (sscanf(text, "%8x/%8x%n", &high, &low, &used) != 2 || text[used])
        return false;
    *out = (uint64_t)high << 32 | low;
    return true;
}

/* 0, or the exit code. */
static int parse(int argc, char **argv, struct list_options *out)
{
    static const struct option options[] = {
        {"system-identifier", required_argument, NULL, 'i'},
        {"segment-bytes", required_argument, NULL, 's'},
        {"start-lsn", required_argument, NULL, 'l'},
        {NULL, 0, NULL, 0},
    };
    uint64_t segment_bytes = 16u << 20;
    *out = (struct list_options){0};
    optind = 1;
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        bool right = c == 'i'   ? command_number(optarg, &out->wal.system_identifier)
                     : c == 's' ? command_number(optarg, &segment_bytes) && segment_bytes <= UINT32_MAX
                     : c == 'l' ? parse_lsn(optarg, &out->wal.start_lsn)
                                : false;
        if (!right)
            return usage("unknown option, or one with a wrong value: %s", argv[optind - 1]);
    }
    out->wal.segment_bytes = (uint32_t)segment_bytes;
    out->interval = argv + optind;
    out->intervals = argc - optind;
    if (!out->wal.system_identifier)
        return usage("%s is missing", "--system-identifier N");
    return out->intervals ? 0 : usage("%s is missing", "the directory of an interval");
}

/* ---- output ---- */

static void print_lsn(const char *name, uint64_t lsn)
{
    printf(",\"%s\":\"%" PRIX32 "/%" PRIX32 "\"", name, (uint32_t)(lsn >> 32), (uint32_t)lsn);
}

static int print_end(void *arg, const struct xact_end *t)
{
    (void)arg;
    printf("{\"xid\":%" PRIu32 ",\"status\":\"%s\",\"write\":%" PRIu64 ",\"time_us\":%" PRId64, t->xid, STATUS[t->status],
           t->record->write, t->time_us);
    print_lsn("lsn", t->record->lsn);
    print_lsn("end_lsn", t->record->end_lsn);
    printf(",\"timeline\":%" PRIu32 ",\"database\":%" PRIu32 ",\"subxids\":[", t->record->timeline, t->database);
    for (uint32_t i = 0; i < t->subxids; i++)
        printf("%s%" PRIu32, i ? "," : "", t->subxid[i]);
    printf("],\"changes\":[");
    for (uint32_t i = 0; i < t->changes; i++) {
        const struct xact_change *c = &t->change[i];
        printf("%s{\"file\":\"%" PRIu32 "/%" PRIu32 "/%" PRIu32 "\",\"inserted\":%" PRIu64 ",\"updated\":%" PRIu64
               ",\"deleted\":%" PRIu64 ",\"created\":%s,\"dropped\":%s,\"shrunk\":%s}",
               i ? "," : "", c->relation.tablespace, c->relation.database, c->relation.file, c->inserted, c->updated, c->deleted,
               c->flags & CHANGE_CREATED ? "true" : "false", c->flags & CHANGE_DROPPED ? "true" : "false",
               c->flags & CHANGE_SHRUNK ? "true" : "false");
    }
    printf("]}\n");
    return ferror(stdout) ? -EIO : 0;
}

static int take_record(void *arg, const struct wal_record *record) { return xacts_take(arg, record); }

/* ---- reading ---- */

static int take_writes(struct wal *wal, struct frames *index, struct frames *writes, struct err *e)
{
    for (;;) {
        const uint8_t *entry, *data;
        int rc = frames_take(index, sizeof(struct fmt_index), &entry, e);
        if (rc <= 0)
            return rc;
        struct fmt_record r;
        memcpy(&r, entry, sizeof r);
        rc = frames_take(writes, r.data_length, &data, e);
        if (rc <= 0)
            return rc;
        if (r.kind != FMT_WRITE || r.data_length % FMT_HEADER_BYTES)
            continue;
        if ((rc = wal_take(wal, r.number, r.volume, r.offset, data, r.data_length)))
            return err_sys(e, rc, "cannot list the transactions of write %" PRIu64, r.number);
    }
}

static int take_interval(struct wal *wal, const char *directory, struct err *e)
{
    CLEANUP_FREE char *index_path = NULL, *writes_path = NULL;
    struct frames *index = NULL, *writes = NULL;
    if (asprintf(&index_path, "%s/index", directory) < 0 || asprintf(&writes_path, "%s/writes", directory) < 0)
        return err_set(e, -ENOMEM, "no memory to read %s", directory);
    int rc = frames_open(&index, index_path, "INDX", e);
    if (!rc)
        rc = frames_open(&writes, writes_path, "WRIT", e);
    if (!rc)
        rc = take_writes(wal, index, writes, e);
    frames_close(index);
    frames_close(writes);
    return rc;
}

int cmd_wal(int argc, char **argv)
{
    struct list_options o;
    struct wal *wal = NULL;
    struct xacts *xacts = NULL;
    struct err e = {0};
    int rc = parse(argc, argv, &o);
    if (rc)
        return rc;
    if ((rc = xacts_open(&xacts, print_end, NULL)))
        return command_failed(&e, err_set(&e, rc, "no memory to follow transactions"));
    o.wal.found = take_record;
    o.wal.arg = xacts;
    rc = wal_open(&wal, &o.wal, &e);
    for (int i = 0; !rc && i < o.intervals; i++)
        rc = take_interval(wal, o.interval[i], &e);
    wal_close(wal);
    xacts_close(xacts);
    if (rc)
        return command_failed(&e, rc);
    if (fflush(stdout) || ferror(stdout))
        return command_failed(&e, err_sys(&e, -errno, "cannot write the listing"));
    return 0;
}
