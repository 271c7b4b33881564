/* One view: load the map, then serve until told to stop. Everything that it writes is gone with it, so it may end at any
 * moment: on a signal, and with --until-eof when standard input ends, which is when the process that holds the other end of
 * a pipe has died. While a file is open it then leaves the (dead) mount to whoever clears up after it: the kernel would no
 * longer tell where the loop device above comes from.
 */
#include "show_view.h"

#include <getopt.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command.h"
#include "control.h"
#include "front_fuse.h"
#include "log.h"
#include "seal.h"
#include "view.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define DEFAULT_CACHE ((uint64_t)64 << 20)

struct shown {
    struct view_options options;
    const char *fuse_dir, *socket;
    bool until_eof;
    struct view *view;
    struct backend backend;
    struct front *front;
    struct control *control;
};

static const char USAGE[] =
    "usage: pgcdp-engine view --map FILE --fuse DIR --control SOCKET --overlay DIR [--cache BYTES] [--until-eof] [--key-fd N]\n";

static int parse_arguments(struct shown *s, int argc, char **argv, struct err *e)
{
    static const struct option OPTIONS[] = {{"map", required_argument, NULL, 'm'},
                                            {"fuse", required_argument, NULL, 'f'},
                                            {"control", required_argument, NULL, 'k'},
                                            {"overlay", required_argument, NULL, 'o'},
                                            {"cache", required_argument, NULL, 'c'},
                                            {"until-eof", no_argument, NULL, 'u'},
                                            {"key-fd", required_argument, NULL, 'K'},
                                            {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
        switch (option) {
        case 'm': s->options.map = optarg; break;
        case 'f': s->fuse_dir = optarg; break;
        case 'k': s->socket = optarg; break;
        case 'o': s->options.overlay = optarg; break;
        case 'u': s->until_eof = true; break;
        case 'K': {
            uint64_t fd;
            if (!command_number(optarg, &fd) || fd > INT_MAX)
                return err_set(e, ERR_USAGE, "\"%s\" is not a valid value", optarg);
            int rc = seal_take_key((int)fd, e);
            if (rc)
                return rc;
            break;
        }
        case 'c':
            if (command_number(optarg, &s->options.cache))
                break;
            return err_set(e, ERR_USAGE, "\"%s\" is not a valid value", optarg);
        default: return err_set(e, ERR_USAGE, "unknown option\n%s", USAGE);
        }
    }
    if (!s->options.map || !s->fuse_dir || !s->socket || !s->options.overlay || optind != argc)
        return err_set(e, ERR_USAGE, "an option is missing\n%s", USAGE);
    return 0;
}

/* ---- control ---- */

static unsigned open_files(const struct shown *s)
{
    unsigned count = 0;
    for (unsigned i = 0; i < s->backend.volumes; i++)
        count += front_open_count(s->front, i);
    return count;
}

static json_t *status(struct shown *s)
{
    struct view_status v;
    view_get_status(s->view, &v);
    json_t *volumes = json_array(), *errors = json_array();
    for (unsigned i = 0; i < s->backend.volumes; i++)
        json_array_append_new(volumes, json_pack("{s:s, s:i, s:I, s:b}", "name", s->backend.name(s->view, i), "number", (int)i,
                                                 "bytes", (json_int_t)s->backend.size(s->view, i), "open",
                                                 front_open_count(s->front, i) > 0));
    for (unsigned i = 0; i < v.faults; i++)
        json_array_append_new(errors, json_pack("{s:s, s:s, s:s}", "kind", v.fault[i].code == ERR_DAMAGE ? "damage" : "error",
                                                "message", v.fault[i].err.message, "hint", v.fault[i].err.hint));
    return json_pack("{s:s, s:i, s:s, s:o, s:I, s:I, s:I, s:I, s:I, s:{s:I, s:I, s:I, s:I, s:I}, s:I, s:o, s:I}", "state", "showing", "pid",
                     (int)getpid(), "map", v.map, "volumes", volumes, "reads", (json_int_t)v.reads, "bytes_read", (json_int_t)v.bytes_read,
                     "writes", (json_int_t)v.writes, "bytes_written", (json_int_t)v.bytes_written, "reloads",
                     (json_int_t)v.reloads, "cache", "hits",
                     (json_int_t)v.cache.hits, "misses", (json_int_t)v.cache.misses, "bytes", (json_int_t)v.cache.bytes,
                     "most_bytes", (json_int_t)v.cache.most_bytes, "limit", (json_int_t)v.cache.limit, "error_count",
                     (json_int_t)v.fault_count, "errors", errors, "rss_kib", (json_int_t)control_rss_kib());
}

static json_t *reload(struct shown *s, const json_t *request, struct err *e, const char **kind)
{
    const char *map = json_string_value(json_object_get(request, "map"));
    const char *from = json_string_value(json_object_get(request, "before"));
    int rc = map ? view_reload(s->view, map, from, e) : err_set(e, ERR_USAGE, "reload needs the path of a map");
    if (rc) {
        *kind = rc == ERR_DAMAGE ? "damage" : rc == ERR_USAGE ? "usage" : rc == -EBUSY ? "busy" : "error";
        return NULL;
    }
    log_info("the map was reloaded");
    return json_pack("{s:b}", "reloaded", 1);
}

static json_t *handle(void *self, const json_t *request, struct err *e, const char **kind)
{
    struct shown *s = self;
    const char *cmd = json_string_value(json_object_get(request, "cmd"));
    if (cmd && strcmp(cmd, "status") == 0)
        return status(s);
    if (cmd && strcmp(cmd, "reload") == 0)
        return reload(s, request, e, kind);
    if (cmd && strcmp(cmd, "stop") == 0 && open_files(s)) {
        *kind = "busy";
        err_set(e, -EBUSY, "%u files of the view are open", open_files(s));
        err_hint(e, "unmount its filesystem and detach its loop device first");
        return NULL;
    }
    if (cmd && strcmp(cmd, "stop") == 0) {
        front_stop(s->front);
        return json_pack("{s:b}", "stopping", 1);
    }
    *kind = "usage";
    err_set(e, ERR_USAGE, "unknown command \"%s\"", cmd ? cmd : "");
    return NULL;
}

/* ---- its end ---- */

static void end_now(struct shown *s, const char *why)
{
    if (open_files(s) == 0) {
        log_info("stopping: %s", why);
        front_stop(s->front);
        return;
    }
    log_info("ended with open files: %s", why);
    unlink(s->socket);
    _exit(0);
}

static void *signal_main(void *arg)
{
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    while (sigwait(&set, &number) != 0)
        ;
    end_now(arg, "a signal came");
    return NULL;
}

static void *lifeline_main(void *arg)
{
    char byte;
    ssize_t n;
    while ((n = read(STDIN_FILENO, &byte, 1)) > 0 || (n < 0 && errno == EINTR))
        ;
    end_now(arg, "standard input has ended");
    return NULL;
}

/* ---- serving ---- */

static int start_thread(struct shown *s, void *(*run)(void *), struct err *e)
{
    pthread_t thread;
    int rc = -pthread_create(&thread, NULL, run, s);
    if (rc)
        return err_sys(e, rc, "cannot start a thread");
    pthread_detach(thread);
    return 0;
}

/* A descriptor for each frames file; and what the kernel writes back through this process must not wait for itself. */
static void settle_in(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0); /* refused in some containers, and then only slower */
    signal(SIGPIPE, SIG_IGN);
}

static int serve(struct shown *s, struct err *e)
{
    s->backend = view_backend(s->view);
    int rc = front_open(&s->front, &s->backend, s->fuse_dir, NULL, e);
    if (rc == 0)
        rc = control_start(&s->control, s->socket, handle, s, e);
    if (rc == 0)
        rc = start_thread(s, signal_main, e);
    if (rc == 0 && s->until_eof)
        rc = start_thread(s, lifeline_main, e);
    if (rc)
        return rc;
    log_info("showing %u volumes, pid %d", s->backend.volumes, (int)getpid());
    rc = front_serve(s->front);
    return rc ? err_sys(e, rc, "the FUSE connection failed") : 0;
}

int cmd_view(int argc, char **argv)
{
    static struct shown s = {.options.cache = DEFAULT_CACHE}; /* static: detached threads may still look at it */
    struct err e = {.message = "", .hint = ""};
    sigset_t set;
    umask(0077);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* for signal_main */
    int rc = parse_arguments(&s, argc, argv, &e);
    if (rc == 0) {
        settle_in();
        rc = view_open(&s.view, &s.options, &e);
    }
    if (rc == 0)
        rc = serve(&s, &e);
    control_stop(s.control);
    if (s.front)
        front_stop(s.front);
    view_close(s.view); /* answers what is under way: the door is still there to take it */
    if (rc)
        return command_failed(&e, rc);
    log_info("stopped");
    return 0;
}
