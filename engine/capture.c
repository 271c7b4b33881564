/* One capture process: lock, replay the journal to the volumes, then serve.
 *
 * Order at the start: the journal's lock, the backings' locks, replay of everything behind the applied mark, sync, the mark,
 * then the journal is opened for writing, then the door. So no reader ever sees a volume that lacks what was answered.
 *
 * With a holder (holder.c) the connection may have been served by a process that died. What that one had answered is in the
 * journal, so on the volumes by then; what it had not answered, the door is sent again.
 */
#include "capture.h"

#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "control.h"
#include "front_fuse.h"
#include "held.h"
#include "journal_read.h"
#include "journal_write.h"
#include "log.h"
#include "replay.h"
#include "util.h"
#include "volume.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

struct capture {
    const char *journal, *fuse_dir, *socket, *holder;
    uint8_t set_id[16];
    bool has_set_id, create, put_back;
    uint64_t segment_bytes, limit;

    struct volume volumes[MAX_VOLUMES];
    unsigned volume_count;
    int lock_fd;
    struct jw *jw;
    struct volume_set *set;
    struct held *held; /* NULL: without a holder */
    struct front *front;
    struct control *control;
};

/* ---- command line ---- */

static const char USAGE[] =
    "usage: pgcdp-engine capture --set-id HEX --journal DIR [--create] --fuse DIR --control SOCKET [--holder SOCKET]\n"
    "                            [--segment-bytes N] [--journal-limit N] [--put-back] NAME[:BYTES]=PATH ...\n"
    "With --holder the FUSE connection is the one that pgcdp-engine hold keeps there, mounted at DIR.\n"
    "BYTES of the backing are shown; without, all of it. With --put-back the journal may hold writes to one volume more,\n"
    "which is given up: they are not replayed.\n";

static int parse_set_id(const char *text, uint8_t out[16])
{
    if (strlen(text) != 32 || strspn(text, "0123456789abcdefABCDEF") != 32)
        return -EINVAL;
    for (int i = 0; i < 16; i++) {
        char pair[3] = {text[2 * i], text[2 * i + 1], '\0'};
        out[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return 0;
}

static int parse_bytes(const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 10);
    return errno || *end || end == text || *text == '-' ? -EINVAL : 0;
}

static int parse_arguments(struct capture *c, int argc, char **argv, struct err *e)
{
    static const struct option OPTIONS[] = {{"set-id", required_argument, NULL, 's'},
                                            {"journal", required_argument, NULL, 'j'},
                                            {"create", no_argument, NULL, 'c'},
                                            {"segment-bytes", required_argument, NULL, 'b'},
                                            {"journal-limit", required_argument, NULL, 'l'},
                                            {"put-back", no_argument, NULL, 'p'},
                                            {"fuse", required_argument, NULL, 'f'},
                                            {"control", required_argument, NULL, 'k'},
                                            {"holder", required_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
        int rc = 0;
        switch (option) {
        case 's': rc = parse_set_id(optarg, c->set_id); c->has_set_id = true; break;
        case 'j': c->journal = optarg; break;
        case 'c': c->create = true; break;
        case 'p': c->put_back = true; break;
        case 'b': rc = parse_bytes(optarg, &c->segment_bytes); break;
        case 'l': rc = parse_bytes(optarg, &c->limit); break;
        case 'f': c->fuse_dir = optarg; break;
        case 'k': c->socket = optarg; break;
        case 'h': c->holder = optarg; break;
        default: return err_set(e, ERR_USAGE, "unknown option\n%s", USAGE);
        }
        if (rc)
            return err_set(e, ERR_USAGE, "\"%s\" is not a valid value", optarg);
    }
    if (!c->has_set_id || !c->journal || !c->fuse_dir || !c->socket || optind == argc)
        return err_set(e, ERR_USAGE, "an option is missing\n%s", USAGE);
    if (c->segment_bytes < ((uint64_t)8 << 20) || c->segment_bytes % BLOCK)
        return err_set(e, ERR_USAGE, "--segment-bytes is %lu: at least 8388608 and a multiple of 4096", c->segment_bytes);
    if (c->limit < 4 * c->segment_bytes)
        return err_set(e, ERR_USAGE, "--journal-limit is %lu: at least four segments of %lu", c->limit, c->segment_bytes);
    if (c->limit / c->segment_bytes >= JW_MOST_SEGMENTS)
        return err_set(e, ERR_USAGE, "--journal-limit is %lu: at most %u segments of %lu", c->limit, JW_MOST_SEGMENTS - 1,
                       c->segment_bytes);
    for (int i = optind; i < argc; i++)
        if (!strchr(argv[i], '='))
            return err_set(e, ERR_USAGE, "\"%s\" is not NAME[:BYTES]=PATH", argv[i]);
    return 0;
}

static int open_volumes(struct capture *c, int argc, char **argv, struct err *e)
{
    for (int i = optind; i < argc; i++) {
        char *equals = strchr(argv[i], '=');
        if (!equals || c->volume_count == MAX_VOLUMES)
            return err_set(e, ERR_USAGE, "\"%s\" is not NAME[:BYTES]=PATH, or there are more than %u", argv[i], MAX_VOLUMES);
        *equals = '\0';
        uint64_t size = 0;
        char *colon = strchr(argv[i], ':');
        if (colon) {
            *colon = '\0';
            if (parse_bytes(colon + 1, &size) || size == 0 || size % BLOCK)
                return err_set(e, ERR_USAGE, "\"%s\" bytes of volume %s are no multiple of 4096", colon + 1, argv[i]);
        }
        for (unsigned k = 0; k < c->volume_count; k++)
            if (strcmp(c->volumes[k].name, argv[i]) == 0)
                return err_set(e, ERR_USAGE, "volume %s is named twice", argv[i]);
        int rc = volume_open(&c->volumes[c->volume_count], argv[i], equals + 1, size, e);
        if (rc)
            return rc;
        c->volume_count++;
    }
    return 0;
}

/* ---- journal: lock, replay ---- */

static int lock_journal(struct capture *c, struct err *e)
{
    if (c->create && mkdir(c->journal, 0700) < 0 && errno != EEXIST)
        return err_sys(e, -errno, "cannot make the journal %s", c->journal);
    int dir = open(c->journal, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) {
        err_sys(e, -errno, "cannot open the journal %s", c->journal);
        err_hint(e, "without its journal the set would lose writes; bring the directory back before anything else");
        return ERR_PRECONDITION;
    }
    bool exists = faccessat(dir, "applied", F_OK, 0) == 0;
    c->lock_fd = openat(dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int rc = c->lock_fd < 0 ? -errno : 0;
    close(dir);
    if (rc)
        return err_sys(e, rc, "cannot open the journal's lock in %s", c->journal);
    if (flock(c->lock_fd, LOCK_EX | LOCK_NB) < 0) {
        err_set(e, ERR_PRECONDITION, "the journal %s is locked by another capture process", c->journal);
        err_hint(e, "there can be one for each set; see: pgcdp status");
        return ERR_PRECONDITION;
    }
    if (c->create == exists) {
        err_set(e, ERR_PRECONDITION, c->create ? "%s holds a journal already" : "%s holds no journal", c->journal);
        err_hint(e, c->create ? "leave out --create" : "bring the journal's files back; only a new set starts without");
        return ERR_PRECONDITION;
    }
    return 0;
}

/* Brings the volumes to the journal's end and opens it for writing. */
static int bring_up(struct capture *c, struct err *e)
{
    CLEANUP_FREE struct jw_segment *segments = NULL;
    struct jr *jr;
    struct jr_end end;
    uint64_t replayed = 0;
    struct replay_volumes to = {.volumes = c->volumes, .count = c->volume_count, .put_back = c->put_back};
    int rc = jr_open(&jr, c->journal, c->set_id, e);
    if (rc)
        return rc == -EPERM ? ERR_PRECONDITION : rc;
    jr_end(jr, &end); /* only the mark is known yet */
    uint64_t applied = end.applied_write;
    rc = jr_seek(jr, applied + 1, e);
    if (rc == 0) /* killed between writing a batch and its sync: no volume may have it before the journal does */
        rc = jr_sync(jr, e);
    if (rc == 0)
        rc = replay(jr, &to, applied, &replayed, e);
    if (rc == 0)
        jr_end(jr, &end);
    size_t count = 0;
    const struct jr_segment *found = jr_segments(jr, &count);
    if (rc == 0 && !(segments = calloc(count + 1, sizeof *segments)))
        rc = err_sys(e, -ENOMEM, "journal");
    if (rc == 0) {
        for (size_t i = 0; i < count; i++)
            segments[i] = (struct jw_segment){.sequence = found[i].sequence,
                                              .size = found[i].size,
                                              .first_write = found[i].first_write,
                                              .last_write = found[i].last_write};
        struct jw_options o = {.directory = c->journal,
                               .segment_bytes = c->segment_bytes,
                               .limit = c->limit,
                               .segments = segments,
                               .segment_count = count,
                               .last_write = end.last_write,
                               .last_batch = end.last_batch,
                               .end_segment = end.segment,
                               .end_offset = end.offset};
        memcpy(o.set_id, c->set_id, 16);
        o.mark.sequence = end.mark_sequence;
        o.mark.applied_write = end.last_write;
        o.mark.released_write = end.released_write;
        rc = jw_open(&c->jw, &o, e);
    }
    jr_close(jr);
    if (rc == 0)
        log_info("journal: last write %lu, %lu replayed behind the applied mark%s", end.last_write, replayed,
                 end.torn ? ", torn tail left out" : "");
    if (rc == 0)
        rc = vs_start(&c->set, c->volumes, c->volume_count, c->jw, end.last_write, e);
    return rc;
}

/* ---- control ---- */

static long rss_kib(void)
{
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%*d %ld", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static json_t *status(struct capture *c)
{
    struct jw_status j;
    struct volume_status v;
    jw_get_status(c->jw, &j);
    vs_get_status(c->set, &v);
    json_t *volumes = json_array();
    for (unsigned i = 0; i < c->volume_count; i++)
        json_array_append_new(volumes, json_pack("{s:s, s:i, s:I, s:s, s:b}", "name", c->volumes[i].name, "number", (int)i,
                                                 "bytes", (json_int_t)volume_size(&c->volumes[i]), "backing", c->volumes[i].path,
                                                 "open", front_open_count(c->front, i) > 0));
    json_t *held = c->held ? json_pack("{s:I, s:I, s:i, s:i}", "captures", (json_int_t)held_captures(c->held), "resent",
                                       (json_int_t)front_resent(c->front), "fuse_fd", c->held->fuse, "note_fd", c->held->note_fd)
                           : json_null();
    json_t *errors = json_array();
    if (j.error[0])
        json_array_append_new(errors, json_sprintf("journal: %s", j.error));
    for (int i = 0; i < VS_TROUBLES; i++)
        if (v.errors[i][0])
            json_array_append_new(errors, json_string(v.errors[i]));
    return json_pack(
        "{s:s, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:{s:I, s:I}, s:{s:I, s:I, s:I, s:I}, s:o, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:o, s:I, s:s, s:o}",
        "state", v.stalled ? "stalled" : "capturing", "pid", (int)getpid(), "last_write", (json_int_t)v.last_write,
        "durable_write", (json_int_t)j.durable_write, "applied_write", (json_int_t)v.applied_write, "synced_write",
        (json_int_t)j.synced_write, "released_write", (json_int_t)j.released_write, "batch", (json_int_t)j.durable_batch,
        "position", "segment", (json_int_t)j.durable_segment, "offset", (json_int_t)j.durable_offset, "journal", "bytes",
        (json_int_t)j.bytes, "limit", (json_int_t)j.limit, "segments", (json_int_t)j.segments, "segment_bytes",
        (json_int_t)j.segment_bytes, "volumes", volumes, "unapplied_bytes", (json_int_t)v.unapplied_bytes, "parked_bytes",
        (json_int_t)v.parked_bytes, "writes", (json_int_t)v.writes, "bytes_written", (json_int_t)v.bytes_written, "reads",
        (json_int_t)v.reads, "bytes_read", (json_int_t)v.bytes_read, "errors", errors, "rss_kib", (json_int_t)rss_kib(), "version",
        PGCDP_VERSION, "held", held);
}

static json_t *stop_held(struct capture *c, struct err *e, const char **kind)
{
    int rc = front_unmount(c->front);
    if (rc == 0)
        return json_pack("{s:b}", "stopping", 1);
    if (rc == -EBUSY) {
        *kind = "busy";
        err_set(e, rc, "a volume in %s is open", c->fuse_dir);
        err_hint(e, "unmount its filesystem and detach its loop device first");
    } else {
        err_sys(e, rc, "cannot unmount %s", c->fuse_dir);
    }
    return NULL;
}

/* For a successor: what was answered is applied and the journal clean when this process has ended. */
static json_t *hand_over(struct capture *c, struct err *e, const char **kind)
{
    if (!c->held) {
        *kind = "precondition";
        err_set(e, ERR_PRECONDITION, "this capture process has no holder that would keep its connection");
        err_hint(e, "pgcdp down and pgcdp up do it, with Postgres stopped meanwhile");
        return NULL;
    }
    front_leave(c->front);
    return json_pack("{s:b}", "handing_over", 1);
}

static json_t *stop(struct capture *c, struct err *e, const char **kind)
{
    if (c->held)
        return stop_held(c, e, kind);
    for (unsigned i = 0; i < c->volume_count; i++)
        if (front_open_count(c->front, i)) {
            *kind = "busy";
            err_set(e, -EBUSY, "volume %s is open", c->volumes[i].name);
            err_hint(e, "unmount its filesystem and detach its loop device first");
            return NULL;
        }
    front_stop(c->front);
    return json_pack("{s:b}", "stopping", 1);
}

/* {"volume":NAME,"bytes":N}: so many of its backing are to be shown, which has become larger. */
static json_t *grow(struct capture *c, const json_t *request, struct err *e, const char **kind)
{
    const char *name = json_string_value(json_object_get(request, "volume"));
    json_int_t bytes = json_integer_value(json_object_get(request, "bytes"));
    for (unsigned i = 0; name && bytes > 0 && i < c->volume_count; i++) {
        if (strcmp(name, c->volumes[i].name) != 0)
            continue;
        if (volume_grow(&c->volumes[i], (uint64_t)bytes, e)) {
            *kind = "precondition";
            return NULL;
        }
        int rc = front_grown(c->front, i);
        if (rc) {
            err_sys(e, rc, "cannot tell the kernel the size of volume %s", name);
            return NULL;
        }
        return json_pack("{s:I}", "bytes", bytes);
    }
    *kind = "usage";
    err_set(e, ERR_USAGE, "grow needs the name of a volume and its bytes");
    return NULL;
}

static json_t *not_durable(struct capture *c, int rc, const char *command, struct err *e, const char **kind)
{
    if (rc == -EAGAIN) {
        struct jw_status j;
        struct volume_status v;
        jw_get_status(c->jw, &j);
        vs_get_status(c->set, &v);
        const char *why = v.errors[VS_APPLY][0] ? v.errors[VS_APPLY] : j.error[0] ? j.error : "the journal is full";
        *kind = "stalled";
        err_set(e, rc, "%s: %s, writes wait", command, why);
        err_hint(e, "see that the agent runs, and that its store and the disk of the journal have space");
    } else {
        err_sys(e, rc, "%s", command);
    }
    return NULL;
}

/* Of a mark: 0, or that of the begin or end of a rewind or gap; -1: of none of them. */
static int mark_flags(const json_t *request)
{
    const json_t *rewind = json_object_get(request, "rewind"), *gap = json_object_get(request, "gap");
    if (!rewind && !gap)
        return 0;
    const char *what = json_string_value(rewind ? rewind : gap);
    if (!what || (rewind && gap))
        return -1;
    if (strcmp(what, "begin") == 0)
        return rewind ? FMT_REWIND_BEGIN : FMT_GAP_BEGIN;
    return strcmp(what, "end") ? -1 : rewind ? FMT_REWIND_END : FMT_GAP_END;
}

static json_t *handle(void *self, const json_t *request, struct err *e, const char **kind)
{
    struct capture *c = self;
    const char *cmd = json_string_value(json_object_get(request, "cmd"));
    uint64_t write = 0;
    if (!cmd)
        cmd = "";
    if (strcmp(cmd, "status") == 0)
        return status(c);
    if (strcmp(cmd, "stop") == 0)
        return stop(c, e, kind);
    if (strcmp(cmd, "hand_over") == 0)
        return hand_over(c, e, kind);
    if (strcmp(cmd, "cut") == 0) {
        int rc = vs_cut(c->set, &write);
        return rc ? not_durable(c, rc, "cut", e, kind) : json_pack("{s:I}", "durable_write", (json_int_t)write);
    }
    if (strcmp(cmd, "sync") == 0)
        return vs_sync(c->set, &write, e) ? NULL : json_pack("{s:I}", "applied_write", (json_int_t)write);
    if (strcmp(cmd, "grow") == 0)
        return grow(c, request, e, kind);
    if (strcmp(cmd, "mark") == 0) {
        const char *name = json_string_value(json_object_get(request, "name"));
        int flags = mark_flags(request);
        if (!name || !*name || strlen(name) > 1024 || flags < 0) {
            *kind = "usage";
            err_set(e, ERR_USAGE, flags < 0 ? "\"rewind\" or \"gap\" of a mark is \"begin\" or \"end\""
                                            : "a mark needs a name of 1 to 1024 bytes");
            return NULL;
        }
        int rc = vs_mark(c->set, name, (uint8_t)flags, &write);
        return rc ? not_durable(c, rc, "mark", e, kind) : json_pack("{s:I}", "write", (json_int_t)write);
    }
    if (strcmp(cmd, "release") == 0) {
        const json_t *value = json_object_get(request, "write");
        if (!json_is_integer(value) || json_integer_value(value) < 0) {
            *kind = "usage";
            err_set(e, ERR_USAGE, "release needs a write number");
            return NULL;
        }
        jw_release(c->jw, (uint64_t)json_integer_value(value));
        vs_wake(c->set);
        struct jw_status j;
        jw_get_status(c->jw, &j);
        return json_pack("{s:I}", "released_write", (json_int_t)j.released_write);
    }
    *kind = "usage";
    err_set(e, ERR_USAGE, "unknown command \"%s\"", cmd);
    return NULL;
}

/* ---- serving ---- */

/* The kernel writes dirty pages back through this process: it must never wait for memory that only it can free. Production
 * waits for it, so whoever started it may give way, but not it: the agent does (pgcdp/background.py). */
static void settle_in(void)
{
    static const struct sched_param NO_PRIORITY;
    setpriority(PRIO_PROCESS, 0, 0);
    sched_setscheduler(0, SCHED_OTHER, &NO_PRIORITY);
    if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0)
        log_warn("cannot become an I/O flusher: %s", strerror(errno));
    if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) < 0)
        log_warn("cannot lock memory: %s", strerror(errno));
    FILE *f = fopen("/proc/self/oom_score_adj", "we");
    if (!f || fputs("-1000", f) < 0)
        log_warn("cannot leave the out-of-memory killer's list: %s", strerror(errno));
    if (f)
        fclose(f);
    signal(SIGPIPE, SIG_IGN);
}

static void *signal_main(void *arg)
{
    struct capture *c = arg;
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    for (;;) {
        if (sigwait(&set, &number) != 0)
            continue;
        struct err e;
        const char *kind;
        json_t *reply = stop(c, &e, &kind);
        if (reply) {
            json_decref(reply);
            return NULL;
        }
        /* Going away now would make production's filesystem see I/O errors. */
        log_warn("signal %d not followed: %s", number, e.message);
    }
}

static int serve(struct capture *c, struct err *e)
{
    struct backend backend = vs_backend(c->set);
    int rc = front_open(&c->front, &backend, c->fuse_dir, c->held, e);
    if (rc == 0)
        rc = control_start(&c->control, c->socket, handle, c, e);
    pthread_t signals;
    if (rc == 0 && (rc = -pthread_create(&signals, NULL, signal_main, c)) != 0)
        err_sys(e, rc, "cannot start a thread");
    if (rc == 0) {
        pthread_detach(signals);
        log_info("capturing %u volumes, pid %d", c->volume_count, (int)getpid());
        rc = front_serve(c->front);
        if (rc)
            err_sys(e, rc, "the FUSE connection failed");
        log_info("stopping");
    }
    return rc;
}

static int run(struct capture *c, int argc, char **argv, struct err *e)
{
    int rc = parse_arguments(c, argc, argv, e);
    if (rc == 0)
        rc = lock_journal(c, e);
    if (rc == 0)
        rc = open_volumes(c, argc, argv, e);
    if (rc == 0 && c->holder)
        rc = held_get(&c->held, c->holder, e);
    if (rc == 0)
        settle_in();
    if (rc == 0)
        rc = bring_up(c, e);
    if (rc == 0)
        rc = serve(c, e);
    return rc;
}

int cmd_capture(int argc, char **argv)
{
    struct capture c = {.segment_bytes = (uint64_t)64 << 20, .limit = (uint64_t)16 << 30, .lock_fd = -1};
    struct err e = {.message = "", .hint = ""};
    sigset_t set;
    umask(0077);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* for signal_main */
    int rc = run(&c, argc, argv, &e);
    if (c.set) {
        struct err late = {.message = ""};
        int stopped = vs_stop(c.set, &late);
        if (rc == 0 && stopped) {
            rc = stopped;
            e = late;
        }
    }
    control_stop(c.control); /* requests under way still look into what is freed next */
    vs_free(c.set);
    jw_close(c.jw);
    if (c.front)
        front_close(c.front);
    held_close(c.held);
    if (c.lock_fd >= 0)
        close(c.lock_fd);
    if (rc) {
        fprintf(stderr, "pgcdp-engine: error: %s\n", e.message);
        if (e.hint[0])
            fprintf(stderr, "hint: %s\n", e.hint);
    } else {
        log_info("stopped");
    }
    return err_exit_code(rc);
}
