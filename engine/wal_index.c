/* See wal_index.h. */
#include "wal_index.h"

#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "command.h"
#include "format.h"
#include "frames.h"
#include "io.h"
#include "journal_read.h"
#include "logged.h"
#include "seal.h"
#include "util.h"
#include "wal_settle.h"
#include "wal_state.h"
#include "wal_tables.h"

#define IMAGES 256u

struct index_options {
    uint64_t system_identifier, segment_bytes, start_lsn, behind, upto, settle_upto;
    uint64_t key_fd; /* 0: none, the store is plain */
    const char *state, *save_state, *journal, *out;
    const char *image[IMAGES]; /* by volume */
    bool holes;
    char **interval;
    int intervals;
};

struct index_run {
    struct wal_reading reading;
    struct tables *tables;
    struct settle *settle;
    uint64_t seen; /* the write looked at last */
    uint64_t begin; /* the first record */
    uint64_t upto;
    uint64_t settle_upto; /* behind `upto`, up to here, writes are looked at for what waits for them; WAL is not read there */
};

static int usage(const char *message, const char *argument)
{
    struct err e;
    err_set(&e, ERR_USAGE, message, argument);
    err_hint(&e, "pgcdp-engine wal --system-identifier N --out DIR [--segment-bytes N] [--start-lsn X/Y | --state FILE] "
                 "[--save-state FILE] [--journal DIR] [--behind WRITE] [--upto WRITE] "
                 "[--wal-holes [--image VOLUME=FILE ...] [--settle-upto WRITE]] [--key-fd N] [INTERVAL ...]");
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

/* VOLUME=FILE */
static bool parse_image(struct index_options *o, const char *value)
{
    unsigned volume;
    int used = 0;
    if (sscanf(value, "%3u=%n", &volume, &used) != 1 || !used || volume >= IMAGES)
        return false;
    o->image[volume] = value + used;
    return true;
}

static bool take_option(struct index_options *o, int option, const char *value)
{
    switch (option) {
    case 'i': return command_number(value, &o->system_identifier);
    case 'b': return command_number(value, &o->segment_bytes) && o->segment_bytes <= UINT32_MAX;
    case 'l': return parse_lsn(value, &o->start_lsn);
    case 'B': return command_number(value, &o->behind);
    case 'u': return command_number(value, &o->upto);
    case 's': o->state = value; return true;
    case 'S': o->save_state = value; return true;
    case 'j': o->journal = value; return true;
    case 'o': o->out = value; return true;
    case 'h': o->holes = true; return true;
    case 'I': return parse_image(o, value);
    case 'U': return command_number(value, &o->settle_upto);
    case 'K': return command_number(value, &o->key_fd) && o->key_fd <= INT_MAX;
    default: return false;
    }
}

/* 0, or the exit code. */
static int parse(int argc, char **argv, struct index_options *o)
{
    static const struct option options[] = {
        {"system-identifier", required_argument, NULL, 'i'}, {"segment-bytes", required_argument, NULL, 'b'},
        {"start-lsn", required_argument, NULL, 'l'},         {"upto", required_argument, NULL, 'u'},
        {"state", required_argument, NULL, 's'},             {"save-state", required_argument, NULL, 'S'},
        {"journal", required_argument, NULL, 'j'},           {"out", required_argument, NULL, 'o'},
        {"wal-holes", no_argument, NULL, 'h'},               {"image", required_argument, NULL, 'I'},
        {"settle-upto", required_argument, NULL, 'U'},       {"behind", required_argument, NULL, 'B'},
        {"key-fd", required_argument, NULL, 'K'},
        {NULL, 0, NULL, 0},
    };
    *o = (struct index_options){.segment_bytes = 16u << 20, .upto = UINT64_MAX};
    optind = 1;
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, ":", options, NULL)) != -1;)
        if (!take_option(o, c, optarg))
            return usage("unknown option, or one with a wrong value: %s", argv[optind - 1]);
    o->interval = argv + optind;
    o->intervals = argc - optind;
    if (!o->system_identifier)
        return usage("%s is missing", "--system-identifier N");
    if (!o->out)
        return usage("%s is missing", "--out DIR");
    return o->intervals || o->journal ? 0 : usage("%s is missing", "the directory of an interval, or --journal DIR");
}

/* ---- records ---- */

static int transaction_ended(void *arg, const struct xact_end *end)
{
    struct index_run *run = arg;
    return tables_end(run->tables, end);
}

static int transaction_runs(void *arg, uint32_t xid)
{
    struct index_run *run = arg;
    return tables_running(run->tables, xid);
}

static int wal_lost_from(void *arg, uint64_t from, uint64_t to, uint64_t write)
{
    struct index_run *run = arg;
    return tables_lost(run->tables, from, to, write);
}

static int take_record(void *arg, const struct wal_record *record)
{
    struct index_run *run = arg;
    struct wal_parts parts;
    if (!run->begin)
        run->begin = record->lsn;
    if (!wal_parse(record, &parts))
        return 0;
    int rc = notes_wants(&run->reading.notes, record, &parts) ? tables_note(run->tables, record) : 0;
    return rc ? rc : xacts_take(run->reading.xacts, record, &parts);
}

/* ---- writes ---- */

static int settle_by(struct index_run *run, const struct fmt_record *r, const uint8_t *data, struct err *e)
{
    int rc = settle_other(run->settle, r->number, r->volume, r->offset, data, r->data_length);
    return rc ? err_sys(e, rc, "cannot index write %" PRIu64, r->number) : 0;
}

static bool goes_on(const struct index_run *run, uint64_t write)
{
    return write <= run->upto || (write <= run->settle_upto && settle_waits(run->settle));
}

static int take_write(struct index_run *run, const struct fmt_record *r, const uint8_t *data, struct err *e)
{
    struct wal *wal = run->reading.wal;
    run->seen = r->number;
    if (r->number > run->upto)
        return r->kind == FMT_WRITE && !(r->data_length % FMT_HEADER_BYTES) ? settle_by(run, r, data, e) : 0;
    run->reading.write = r->number;
    if (r->kind == FMT_MARK && !r->flags && tables_mark(run->tables, r->number, data, r->data_length))
        return err_set(e, -EIO, "cannot index mark %" PRIu64, r->number);
    if (r->kind != FMT_WRITE || r->data_length % FMT_HEADER_BYTES)
        return 0;
    uint64_t from = wal_next_lsn(wal);
    int rc = wal_take(wal, r->number, r->volume, r->offset, data, r->data_length);
    struct fmt_wal_write row = {.write = r->number, .to_lsn = wal_next_lsn(wal)};
    row.from_lsn = from ? from : run->begin ? run->begin : row.to_lsn;
    if (!rc && row.to_lsn == row.from_lsn)
        return settle_by(run, r, data, e);
    if (!rc)
        rc = settle_wal(run->settle, row, r->volume);
    return rc ? err_sys(e, rc, "cannot index write %" PRIu64, r->number) : 0;
}

static int take_stream(struct index_run *run, struct frames *index, struct frames *writes, struct err *e)
{
    for (;;) {
        const uint8_t *entry, *data;
        int rc = frames_take(index, sizeof(struct fmt_index), &entry, e);
        if (rc <= 0)
            return rc;
        struct fmt_record r;
        memcpy(&r, entry, sizeof r);
        if (r.number > run->upto)
            return 0;
        rc = frames_take(writes, r.data_length, &data, e);
        if (rc <= 0)
            return rc;
        if (r.number > run->seen && (rc = take_write(run, &r, data, e)))
            return rc;
    }
}

static int take_interval(struct index_run *run, const char *directory, struct err *e)
{
    CLEANUP_FREE char *index_path = NULL, *writes_path = NULL;
    struct frames *index = NULL, *writes = NULL;
    if (asprintf(&index_path, "%s/index", directory) < 0 || asprintf(&writes_path, "%s/writes", directory) < 0)
        return err_set(e, -ENOMEM, "no memory to read %s", directory);
    int rc = frames_open(&index, index_path, "INDX", e);
    if (!rc)
        rc = frames_open(&writes, writes_path, "WRIT", e);
    if (!rc)
        rc = take_stream(run, index, writes, e);
    frames_close(index);
    frames_close(writes);
    return rc == -ENOENT ? ERR_PRECONDITION : rc; /* published meanwhile: it is to be looked for elsewhere */
}

static int take_batch(struct index_run *run, const struct jr_batch *batch, struct err *e)
{
    const uint8_t *data = batch->data;
    if (run->seen && batch->first_write > run->seen + 1)
        return err_set(e, ERR_PRECONDITION, "the journal begins with write %" PRIu64 ", write %" PRIu64 " is not in it any more",
                       batch->first_write, run->seen + 1);
    for (const struct fmt_record *r = batch->record; r < batch->record + batch->records; r++) {
        int rc = r->number > run->seen && goes_on(run, r->number) ? take_write(run, r, data, e) : 0;
        if (rc)
            return rc;
        data += round_block(r->data_length);
    }
    return 0;
}

static int read_journal(struct index_run *run, const char *directory, struct err *e)
{
    struct jr *jr;
    struct jr_batch batch;
    int rc = jr_open(&jr, directory, NULL, e);
    if (rc)
        return rc;
    rc = jr_seek(jr, run->seen + 1, e);
    while (!rc && (rc = jr_next(jr, &batch, e)) == 1) {
        rc = take_batch(run, &batch, e);
        if (!goes_on(run, batch.first_write + batch.records))
            break;
    }
    jr_close(jr);
    return rc < 0 ? rc : 0;
}

static int take_journal(struct index_run *run, const char *directory, struct err *e)
{
    int rc = JR_STALE;
    for (int i = 0; i < JR_STALE_ATTEMPTS && rc == JR_STALE; i++)
        rc = goes_on(run, run->seen + 1) ? read_journal(run, directory, e) : 0;
    return run->seen >= run->upto && rc == ERR_PRECONDITION ? 0 : rc; /* it is recycled behind `upto`: nothing to settle by */
}

/* ---- the command ---- */

/* What filesystems are on the volumes. */
static int read_images(struct index_run *run, const struct index_options *o, struct err *e)
{
    uint8_t superblock[LOGGED_SUPERBLOCK];
    for (uint16_t i = 0; i < IMAGES; i++) {
        if (!o->image[i])
            continue;
        CLEANUP_CLOSE int fd = open(o->image[i], O_RDONLY | O_CLOEXEC);
        int rc = fd < 0 ? -errno : io_pread(fd, superblock, sizeof superblock, 0);
        if (rc)
            return err_sys(e, rc, "cannot read %s", o->image[i]);
        settle_volume(run->settle, i, superblock);
    }
    return 0;
}

static int open_run(struct index_run *run, const struct index_options *o, struct err *e)
{
    struct wal_options wal = {
        .system_identifier = o->system_identifier, .start_lsn = o->start_lsn, .segment_bytes = (uint32_t)o->segment_bytes,
        .found = take_record, .lost = wal_lost_from, .arg = run,
    };
    *run = (struct index_run){.upto = o->upto, .settle_upto = o->settle_upto, .settle = settle_open(o->holes, o->segment_bytes)};
    if (!run->settle)
        return err_set(e, -ENOMEM, "no memory to tell when WAL is durable");
    if (o->holes) {
        wal.mapped = settle_mapped;
        wal.mapped_arg = run->settle;
    }
    run->reading.system_identifier = o->system_identifier;
    run->reading.segment_bytes = (uint32_t)o->segment_bytes;
    int rc = wal_open(&run->reading.wal, &wal, e);
    if (rc)
        return rc;
    if ((rc = xacts_open(&run->reading.xacts, transaction_ended, run)))
        return err_set(e, rc, "no memory to follow transactions");
    if (o->state && (rc = state_load(&run->reading, o->state, e)))
        return rc;
    if ((rc = tables_open(&run->tables, o->out, e)))
        return rc;
    run->seen = max_u64(run->reading.write, o->behind);
    settle_between(run->settle, run->reading.wal, run->tables);
    return read_images(run, o, e);
}

static int read_all(struct index_run *run, const struct index_options *o, struct err *e)
{
    int rc = 0;
    for (int i = 0; !rc && i < o->intervals; i++)
        rc = take_interval(run, o->interval[i], e);
    if (!rc && o->journal)
        rc = take_journal(run, o->journal, e);
    if (!rc && (rc = settle_end(run->settle)))
        err_sys(e, rc, "cannot write the tables");
    if (!rc && (rc = xacts_running(run->reading.xacts, transaction_runs, run)))
        err_sys(e, rc, "cannot write the tables");
    if (!rc && o->save_state)
        rc = state_save(&run->reading, o->save_state, e);
    return rc;
}

int cmd_wal(int argc, char **argv)
{
    struct index_options o;
    struct index_run run;
    struct err e = {0};
    int rc = parse(argc, argv, &o);
    if (rc)
        return rc;
    if (o.key_fd && (rc = seal_take_key((int)o.key_fd, &e)))
        return command_failed(&e, rc);
    rc = open_run(&run, &o, &e);
    if (!rc)
        rc = read_all(&run, &o, &e);
    struct err closing = {0};
    int closed = run.tables ? tables_close(run.tables, &closing) : 0;
    wal_close(run.reading.wal);
    xacts_close(run.reading.xacts);
    settle_close(run.settle);
    if (rc)
        return command_failed(&e, rc);
    if (closed)
        return command_failed(&closing, closed);
    printf("{\"write\":%" PRIu64 "}\n", run.reading.write);
    return 0;
}
