/* `dump` and `check`: a journal directory shown to people. Both only read, also beside a running capture process. */
#include "dump.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "command.h"
#include "journal_read.h"
#include "util.h"

struct dump_options {
    const char *journal;
    uint64_t from;
    uint64_t to;
    uint64_t rate;
    bool json;
};

static const char *const KIND_NAME[] = {"?", "write", "zero", "discard", "flush", "mark"};

static int usage(const char *message, const char *argument)
{
    struct err e;
    err_set(&e, ERR_USAGE, message, argument);
    err_hint(&e, "pgcdp-engine dump --journal DIR [--from N] [--to N] [--json], or pgcdp-engine check --journal DIR [--rate BYTES]");
    return command_failed(&e, ERR_USAGE);
}

/* 0, or the exit code. `whole` allows --from, --to and --json, else --rate is. */
static int parse(int argc, char **argv, bool whole, struct dump_options *out)
{
    static const struct option options[] = {
        {"journal", required_argument, NULL, 'd'}, {"from", required_argument, NULL, 'f'},
        {"to", required_argument, NULL, 't'},      {"json", no_argument, NULL, 'j'},
        {"rate", required_argument, NULL, 'r'},    {NULL, 0, NULL, 0},
    };
    *out = (struct dump_options){.to = UINT64_MAX};
    optind = 1;
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        if (c == 'd')
            out->journal = optarg;
        else if (c == 'j' && whole)
            out->json = true;
        else if ((c == 'f' || c == 't') && whole) {
            if (!command_number(optarg, c == 'f' ? &out->from : &out->to))
                return usage("\"%s\" is not a write number", optarg);
        } else if (c == 'r' && !whole) {
            if (!command_number(optarg, &out->rate))
                return usage("\"%s\" is not a number of bytes a second", optarg);
        } else
            return usage("unknown option, or option without its value: %s", argv[optind - 1]);
    }
    if (optind < argc)
        return usage("unexpected argument %s", argv[optind]);
    return out->journal ? 0 : usage("%s is missing", "--journal DIR");
}

static int open_journal(struct jr **jr, const char *directory)
{
    struct err e;
    int rc = JR_STALE;
    for (int i = 0; i < JR_STALE_ATTEMPTS && rc == JR_STALE; i++)
        rc = jr_open(jr, directory, NULL, &e);
    if (rc == -ENOENT || rc == -ENOTDIR) {
        err_hint(&e, "give the journal directory of a volume set");
        rc = ERR_PRECONDITION;
    }
    return rc ? command_failed(&e, rc) : 0;
}

/* As jr_next; when what comes next was recycled meanwhile, the journal is opened again and read on behind `seen`, the last
 * write that was given. */
static int next_batch(struct jr **jr, const char *directory, uint64_t *seen, struct jr_batch *batch, struct err *e)
{
    int rc = jr_next(*jr, batch, e);
    for (int i = 0; i < JR_STALE_ATTEMPTS && rc == JR_STALE; i++) {
        struct jr *again;
        if ((rc = jr_open(&again, directory, NULL, e)) == 0) {
            jr_close(*jr);
            *jr = again;
            if ((rc = jr_seek(*jr, *seen + 1, e)) == 0)
                rc = jr_next(*jr, batch, e);
        }
    }
    if (rc == 1)
        *seen = batch->first_write + batch->records - 1;
    return rc;
}

/* ---- dump ---- */

/* RFC 3339 in UTC with microseconds. */
static void format_time(char out[64], uint64_t ns)
{
    time_t seconds = (time_t)(ns / 1000000000u);
    struct tm parts;
    gmtime_r(&seconds, &parts);
    size_t used = strftime(out, 64, "%Y-%m-%dT%H:%M:%S", &parts);
    snprintf(out + used, 64 - used, ".%06" PRIu64 "Z", ns % 1000000000u / 1000u);
}

static const char *kind_name(const struct fmt_record *r)
{
    static const char *const BETWEEN[] = {[FMT_REWIND_BEGIN] = "rewind-begin", [FMT_REWIND_END] = "rewind-end",
                                          [FMT_GAP_BEGIN] = "gap-begin", [FMT_GAP_END] = "gap-end"};
    if (r->kind == FMT_MARK && r->flags)
        return BETWEEN[r->flags];
    return KIND_NAME[r->kind];
}

/* A mark's name; anything that could break a line or a string is escaped as JSON does. */
static void print_name(const uint8_t *name, uint32_t length)
{
    putchar('"');
    for (uint32_t i = 0; i < length; i++) {
        if (name[i] < 0x20 || name[i] == 0x7f)
            printf("\\u%04x", name[i]);
        else if (name[i] == '"' || name[i] == '\\')
            printf("\\%c", name[i]);
        else
            putchar(name[i]);
    }
    putchar('"');
}

static void print_text(const struct jr_batch *b, const struct fmt_record *r, const char *time, const uint8_t *data)
{
    printf("%" PRIu64 " %s %s", r->number, time, kind_name(r));
    if (r->kind == FMT_MARK) {
        putchar(' ');
        print_name(data, r->data_length);
    } else
        printf(" volume %u offset %" PRIu64 " length %" PRIu64, r->volume, r->offset, r->length);
    printf(" batch %" PRIu64 " segment %" PRIu64 ":%" PRIu64 "\n", b->number, b->segment, b->offset);
}

static void print_json(const struct jr_batch *b, const struct fmt_record *r, const char *time, const uint8_t *data)
{
    printf("{\"write\":%" PRIu64 ",\"time\":\"%s\",\"wall_ns\":%" PRIu64 ",\"boot_ns\":%" PRIu64 ",\"kind\":\"%s\",", r->number,
           time, r->wall_ns, r->boot_ns, kind_name(r));
    if (r->kind == FMT_MARK) {
        printf("\"name\":");
        print_name(data, r->data_length);
    } else
        printf("\"volume\":%u,\"offset\":%" PRIu64 ",\"length\":%" PRIu64, r->volume, r->offset, r->length);
    printf(",\"batch\":%" PRIu64 ",\"segment\":%" PRIu64 ",\"segment_offset\":%" PRIu64 "}\n", b->number, b->segment,
           b->offset);
}

static void dump_batch(const struct jr_batch *b, const struct dump_options *o)
{
    const uint8_t *data = b->data;
    for (const struct fmt_record *r = b->record; r < b->record + b->records; r++) {
        if (r->number >= o->from && r->number <= o->to) {
            char time[64];
            format_time(time, r->wall_ns);
            (o->json ? print_json : print_text)(b, r, time, data);
        }
        data += round_block(r->data_length);
    }
}

int cmd_dump(int argc, char **argv)
{
    struct dump_options o;
    struct jr *jr;
    struct err e;
    int rc = parse(argc, argv, true, &o);
    if (rc || (rc = open_journal(&jr, o.journal)))
        return rc;
    struct jr_batch batch;
    uint64_t seen = o.from ? o.from - 1 : 0;
    rc = o.from ? jr_seek(jr, o.from, &e) : 0;
    while ((!rc || rc == JR_STALE) && (rc = next_batch(&jr, o.journal, &seen, &batch, &e)) == 1 && batch.first_write <= o.to) {
        dump_batch(&batch, &o);
        rc = 0;
    }
    jr_close(jr);
    if (rc < 0)
        return command_failed(&e, rc);
    if (fflush(stdout) || ferror(stdout))
        return command_failed(&e, err_sys(&e, -errno, "cannot write the listing"));
    return 0;
}

/* ---- check ---- */

struct tally {
    uint64_t batches, writes, bytes, first_write, damages;
};

static void print_segments(const struct jr *jr)
{
    size_t count;
    const struct jr_segment *s = jr_segments(jr, &count);
    for (size_t i = 0; i < count; i++) {
        char name[32];
        jr_segment_name(name, s[i].sequence);
        if (s[i].first_write)
            printf("%s: %" PRIu64 " bytes, from batch %" PRIu64 ", writes %" PRIu64 " to %" PRIu64 "\n", name, s[i].size,
                   s[i].first_batch, s[i].first_write, s[i].last_write);
        else
            printf("%s: %" PRIu64 " bytes, no writes\n", name, s[i].size);
    }
}

static void print_end(const struct jr *jr, const struct tally *t)
{
    struct jr_end end;
    jr_end(jr, &end);
    if (t->batches)
        printf("%" PRIu64 " batches, writes %" PRIu64 " to %" PRIu64 ", %" PRIu64 " bytes of data\n", t->batches,
               t->first_write, end.last_write, t->bytes);
    else
        printf("no batches; the last write was %" PRIu64 "\n", end.last_write);
    printf("end: segment %" PRIu64 " offset %" PRIu64 "%s\n", end.segment, end.offset,
           end.torn ? ", then a torn batch that was never answered" : "");
    if (end.marked)
        printf("applied write %" PRIu64 ", released write %" PRIu64 "%s\n", end.applied_write, end.released_write,
               end.clean ? ", stopped cleanly" : "");
}

static void count_batch(struct tally *t, const struct jr_batch *b)
{
    if (!t->batches++)
        t->first_write = b->first_write;
    t->writes += b->records;
    for (uint32_t i = 0; i < b->records; i++)
        t->bytes += b->record[i].data_length;
}

/* Reads no more than `rate` bytes a second (0: as fast as it goes), as long as that is less than there was when it began: what is
 * written meanwhile, perhaps faster than that, is followed to its end. */
struct pace {
    uint64_t rate, left, due_ns;
};

static struct pace pace_of(const struct jr *jr, uint64_t rate)
{
    struct pace p = {.rate = rate};
    size_t count;
    const struct jr_segment *s = jr_segments(jr, &count);
    for (size_t i = 0; i < count; i++)
        p.left += s[i].size;
    return p;
}

static void keep_pace(struct pace *p, uint64_t bytes)
{
    if (!p->rate || bytes > p->left)
        return;
    p->left -= bytes;
    p->due_ns = max_u64(p->due_ns, clock_ns(CLOCK_MONOTONIC)) + (uint64_t)((double)bytes / (double)p->rate * 1e9);
    struct timespec due = {.tv_sec = (time_t)(p->due_ns / 1000000000u), .tv_nsec = (long)(p->due_ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
        ;
}

int cmd_check(int argc, char **argv)
{
    struct dump_options o;
    struct jr *jr;
    struct err e;
    int rc = parse(argc, argv, false, &o);
    if (rc || (rc = open_journal(&jr, o.journal)))
        return rc;
    struct tally tally = {0};
    struct jr_batch batch;
    struct pace pace = pace_of(jr, o.rate);
    uint64_t seen = 0;
    int exit_code = 0;
    while ((rc = next_batch(&jr, o.journal, &seen, &batch, &e)) != 0) {
        uint64_t missing_to;
        if (rc == 1) {
            uint64_t before = tally.bytes;
            count_batch(&tally, &batch);
            keep_pace(&pace, tally.bytes - before);
            continue;
        }
        exit_code = command_failed(&e, rc);
        if (rc != JR_DAMAGE || !jr_pass_damage(jr, &missing_to))
            break;
        seen = missing_to;
        tally.damages++;
    }
    if (rc == 0)
        print_segments(jr);
    if (exit_code == 0)
        print_end(jr, &tally);
    else
        printf("%" PRIu64 " batches with %" PRIu64 " writes and %" PRIu64 " bytes of data are whole\n", tally.batches,
               tally.writes, tally.bytes);
    jr_close(jr);
    return exit_code;
}
