/* One capture process: lock, replay the journal to the volumes, then serve. Its arguments: capture_arguments.c; what is asked at its
 * control socket: capture_control.c.
 *
 * Order at the start: the journal's lock, the backings' locks, replay of everything behind the applied mark, sync, the mark,
 * then the journal is opened for writing, then the door. So no reader ever sees a volume that lacks what was answered.
 *
 * With a holder (holder.c) the connection may have been served by a process that died. What that one had answered is in the
 * journal, so on the volumes by then; what it had not answered, the door is sent again.
 */
#include "capture.h"

#include <fcntl.h>
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
#include <time.h>
#include <unistd.h>

#include "capture_process.h"
#include "cleanup.h"
#include "command.h"
#include "journal_read.h"
#include "log.h"
#include "replay.h"
#include "tracked.h"
#include "util.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define LOCK_TRIES 300 /* of 10 ms: so long it is waited for who asks of the journal's lock */

/* From argv[first] on. */
static int open_volumes(struct capture *c, int first, int argc, char **argv, struct err *e)
{
    for (int i = first; i < argc; i++) {
        char *equals = strchr(argv[i], '=');
        if (!equals || c->volume_count == MAX_VOLUMES)
            return err_set(e, ERR_USAGE, "\"%s\" is not NAME[:BYTES]=PATH, or there are more than %u", argv[i], MAX_VOLUMES);
        *equals = '\0';
        uint64_t size = 0;
        char *colon = strchr(argv[i], ':');
        if (colon) {
            *colon = '\0';
            if (!command_number(colon + 1, &size) || size == 0 || size % BLOCK)
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

/* 0, or -1 when another capture process has it. Who only asks whether it is locked (pgcdp/fsio.py) has it shared for a moment, and longer
 * in a child that he starts just then: he is waited for. */
static int take_lock(int fd)
{
    static const struct timespec pause = {.tv_nsec = 10000000};
    for (int i = 0; i < LOCK_TRIES; i++) {
        if (flock(fd, LOCK_EX | LOCK_NB) == 0)
            return 0;
        if (flock(fd, LOCK_SH | LOCK_NB) < 0)
            return -1;
        flock(fd, LOCK_UN);
        nanosleep(&pause, NULL);
    }
    return -1;
}

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
    if (take_lock(c->lock_fd) < 0) {
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

/* Whether the first batch behind `write` begins with the begin record of a gap that has the time `begin_ns`. */
static int has_begun(struct capture *c, uint64_t write, uint64_t begin_ns, bool *begun, struct err *e)
{
    struct jr *jr;
    struct jr_batch b;
    int rc = jr_open(&jr, c->journal, c->set_id, e);
    if (rc)
        return rc;
    rc = jr_seek(jr, write + 1, e);
    if (rc == 0)
        rc = jr_next(jr, &b, e);
    *begun = rc == 1 && b.first_write == write + 1 && b.record[0].kind == FMT_MARK && b.record[0].flags == FMT_GAP_BEGIN &&
             b.record[0].wall_ns == begin_ns;
    jr_close(jr);
    return rc == 1 ? 0 : rc;
}

/* While changes are tracked, writes come to the volumes that the journal does not have: what lies behind its end, and could not be
 * made durable there, must not be replayed over them (FORMAT.md 1.8). */
static int end_where_tracked(struct capture *c, struct jr *jr, uint64_t applied, struct err *e)
{
    bool begun = false;
    struct fmt_tracking state = tracked_state(c->tracked);
    if (state.state == FMT_TRACKED_IDLE || applied > state.behind)
        return 0;
    if (applied < state.behind) {
        err_set(e, ERR_DAMAGE, "changes are tracked behind write %lu, but the applied mark stands at %lu", state.behind, applied);
        err_hint(e, "the journal's files applied and tracked are not of the same time; bring them back as they were");
        return ERR_DAMAGE;
    }
    int rc = state.state == FMT_TRACKED_HEALING ? has_begun(c, applied, state.begin_ns, &begun, e) : 0;
    if (rc == 0 && !begun)
        jr_end_at(jr, applied);
    return rc;
}

/* Brings the volumes to the journal's end and opens it for writing. */
static int bring_up(struct capture *c, struct err *e)
{
    CLEANUP_FREE struct jw_segment *segments = NULL;
    struct jr *jr;
    struct jr_end end;
    struct replayed replayed = {.writes = 0};
    struct replay_volumes to = {.volumes = c->volumes, .count = c->volume_count, .put_back = c->put_back};
    int rc = jr_open(&jr, c->journal, c->set_id, e);
    if (rc)
        return rc == -EPERM ? ERR_PRECONDITION : rc;
    jr_end(jr, &end); /* only the mark is known yet */
    uint64_t applied = end.applied_write;
    replayed.inside = end.inside;
    rc = tracked_open(&c->tracked, c->journal, c->set_id, c->volumes, c->volume_count, c->track, c->put_back,
                      end.marked ? &end.tracking : NULL, e);
    if (rc == 0)
        rc = end_where_tracked(c, jr, applied, e);
    if (rc == 0)
        rc = jr_seek(jr, applied + 1, e);
    if (rc == 0) /* killed between writing a batch and its sync: no volume may have it before the journal does */
        rc = jr_sync(jr, e);
    if (rc == 0)
        rc = replay(jr, &to, applied, REPLAY_ALL, &replayed, e);
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
        o.mark.flags = replayed.inside ? FMT_APPLIED_INSIDE : 0;
        o.mark.tracking = tracked_state(c->tracked);
        rc = jw_open(&c->jw, &o, e);
    }
    jr_close(jr);
    if (rc == 0)
        log_info("journal: last write %lu, %lu replayed behind the applied mark%s", end.last_write, replayed.writes,
                 end.torn ? ", torn tail left out" : "");
    if (rc == 0) {
        struct tracked *tracked = c->tracked;
        c->tracked = NULL; /* the set's from now on, also when it fails */
        struct vs_found start = {.last_write = end.last_write,
                                 .inside = replayed.inside,
                                 .tracked = tracked,
                                 .journal = c->journal,
                                 .set_id = c->set_id};
        rc = vs_start(&c->set, c->volumes, c->volume_count, c->jw, &start, c->track, e);
    }
    return rc;
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
        json_t *reply = capture_stop(c, &e, &kind);
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
        rc = control_start(&c->control, c->socket, capture_handle, c, e);
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
    int first;
    int rc = capture_arguments(c, argc, argv, &first, e);
    if (rc == 0)
        rc = lock_journal(c, e);
    if (rc == 0)
        rc = open_volumes(c, first, argc, argv, e);
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
    tracked_close(c.tracked);
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
