/* The holder of one set: opens /dev/fuse, mounts it, and keeps it open, so that the filesystem above waits instead of seeing
 * I/O errors when the capture process dies; the next one gets the descriptor from here.
 *
 * It shall never fail, so it does next to nothing: after its start it takes no memory, opens no file, writes no line, and has
 * one thread. Whoever connects to its socket as root is given two descriptors, that of /dev/fuse and that of a page of shared
 * memory, whose content it does not know (FORMAT.md 6), and is let go. It ends when the connection has: after an unmount, which
 * it sees within a second, or at once when somebody connects. SIGKILL alone ends it before.
 *
 * With --of PID it takes both from a capture process whose own holder was killed, instead of mounting.
 *
 * With --fits it holds nothing: it tells whether this engine could go on with what the holder there keeps. Who upgrades asks
 * before the running capture process ends, since behind that nobody would serve.
 */
#include "holder.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "backend.h"
#include "cleanup.h"
#include "command.h"
#include "front_fuse.h"
#include "held.h"
#include "log.h"

#define LOOK_MS 1000
#define FUSE_DEVICE makedev(10, 229) /* Documentation/admin-guide/devices.txt */

static const char USAGE[] = "usage: pgcdp-engine hold --socket PATH --fuse DIR\n"
                            "       pgcdp-engine hold --socket PATH --of PID --fuse-fd N --note-fd N\n"
                            "       pgcdp-engine hold --socket PATH --fits\n"
                            "The last one tells whether this engine could take over from the holder at PATH: exit code 0, or 6.\n";

struct options {
    const char *socket, *directory;
    uint64_t pid, fuse_fd, note_fd;
    bool fits;
};

static int parse_arguments(struct options *o, int argc, char **argv, struct err *e)
{
    static const struct option OPTIONS[] = {
        {"socket", required_argument, NULL, 's'},  {"fuse", required_argument, NULL, 'd'},
        {"of", required_argument, NULL, 'o'},      {"fuse-fd", required_argument, NULL, 'f'},
        {"note-fd", required_argument, NULL, 'n'}, {"fits", no_argument, NULL, 't'},
        {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
        bool right = true;
        switch (option) {
        case 's': o->socket = optarg; break;
        case 'd': o->directory = optarg; break;
        case 'o': right = command_number(optarg, &o->pid); break;
        case 'f': right = command_number(optarg, &o->fuse_fd); break;
        case 'n': right = command_number(optarg, &o->note_fd); break;
        case 't': o->fits = true; break;
        default: return err_set(e, ERR_USAGE, "unknown option\n%s", USAGE);
        }
        if (!right)
            return err_set(e, ERR_USAGE, "\"%s\" is not a number", optarg);
    }
    if (!o->socket || optind != argc || !!o->directory + !!o->pid + o->fits != 1)
        return err_set(e, ERR_USAGE, "an option is missing, or there is one too many\n%s", USAGE);
    return 0;
}

/* One holder a set: locked as long as this process lives. */
static int lock(const char *socket, struct err *e)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s.lock", socket) >= (int)sizeof path)
        return err_set(e, ERR_USAGE, "the holder's socket %s is too long", socket);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_sys(e, -errno, "cannot open %s", path);
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    close(fd);
    err_set(e, ERR_PRECONDITION, "%s is locked by another holder", path);
    err_hint(e, "there can be one for each set; see: pgcdp status");
    return ERR_PRECONDITION;
}

/* As libfuse mounts for the same options (front_fuse.c), so that its session has nothing to say against it. */
static int mount_fuse(const char *directory, int fuse, struct err *e)
{
    char options[128];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,max_read=%zu", fuse,
             BACKEND_MAX_REQUEST);
    if (mount("pgcdp", directory, "fuse.pgcdp", MS_NOSUID | MS_NODEV, options) == 0)
        return 0;
    err_sys(e, -errno, "cannot mount FUSE at %s", directory);
    err_hint(e, "see that /dev/fuse exists and the directory is empty and not mounted");
    return ERR_PRECONDITION;
}

static int begin(const struct options *o, int *fuse, int *note, struct err *e)
{
    *fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (*fuse < 0) {
        err_sys(e, -errno, "cannot open /dev/fuse");
        err_hint(e, "modprobe fuse");
        return ERR_PRECONDITION;
    }
    *note = memfd_create("pgcdp-note", MFD_CLOEXEC);
    if (*note < 0 || ftruncate(*note, FMT_HELD_NOTE_BYTES) < 0)
        return err_sys(e, -errno, "cannot make the note");
    return mount_fuse(o->directory, *fuse, e);
}

/* What a capture process has of a holder that is gone. */
static int adopt(const struct options *o, int *fuse, int *note, struct err *e)
{
    CLEANUP_CLOSE int process = (int)syscall(SYS_pidfd_open, (pid_t)o->pid, 0);
    if (process < 0)
        return err_sys(e, -errno, "no process %lu", o->pid);
    *fuse = (int)syscall(SYS_pidfd_getfd, process, (int)o->fuse_fd, 0);
    *note = (int)syscall(SYS_pidfd_getfd, process, (int)o->note_fd, 0);
    struct stat device, page;
    if (*fuse < 0 || *note < 0 || fstat(*fuse, &device) < 0 || fstat(*note, &page) < 0)
        return err_sys(e, -errno, "cannot take the descriptors of process %lu", o->pid);
    if (!S_ISCHR(device.st_mode) || device.st_rdev != FUSE_DEVICE || page.st_size != FMT_HELD_NOTE_BYTES || held_ended(*fuse)) {
        err_set(e, ERR_PRECONDITION, "process %lu has no FUSE connection at descriptor %lu", o->pid, o->fuse_fd);
        err_hint(e, "see pgcdp status");
        return ERR_PRECONDITION;
    }
    return 0;
}

/* From here on nothing is asked for any more that could be refused. */
static void settle_in(void)
{
    static const int IGNORED[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU, SIGXFSZ};
    for (size_t i = 0; i < sizeof IGNORED / sizeof *IGNORED; i++)
        signal(IGNORED[i], SIG_IGN);
    if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
        log_warn("cannot lock memory: %s", strerror(errno));
    CLEANUP_CLOSE int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score < 0 || write(score, "-1000", 5) != 5)
        log_warn("cannot leave the out-of-memory killer's list: %s", strerror(errno));
    prctl(PR_SET_NAME, "pgcdp-holder");
}

/* The log's filesystem may fill or go: nothing here needs it any more. */
static void let_go_of_the_log(void)
{
    int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; nothing >= 0 && fd <= 2; fd++)
        dup2(nothing, fd);
    if (nothing > 2)
        close(nothing);
    if (chdir("/") < 0)
        return; /* then it keeps a directory in use, nothing worse */
}

static void hold(int listener, int fuse, int note)
{
    static const struct timespec pause = {.tv_nsec = 100000000};
    while (!held_ended(fuse)) {
        struct pollfd look = {.fd = listener, .events = POLLIN};
        if (poll(&look, 1, LOOK_MS) <= 0 || held_ended(fuse))
            continue;
        int rc = held_hand_out(listener, fuse, note);
        if (rc && rc != -EAGAIN) /* no descriptor is free in the whole machine, for instance */
            nanosleep(&pause, NULL);
    }
}

static int fits(const struct options *o, struct err *e)
{
    struct held *held = NULL;
    int rc = held_get(&held, o->socket, e);
    if (rc == 0)
        rc = front_fits(held, e);
    held_close(held);
    return rc;
}

int cmd_hold(int argc, char **argv)
{
    struct options o = {.socket = NULL};
    struct err e = {.message = "", .hint = ""};
    int fuse = -1, note = -1, listener = -1;
    umask(0077);
    int rc = parse_arguments(&o, argc, argv, &e);
    if (rc == 0 && o.fits) {
        rc = fits(&o, &e);
        return rc ? command_failed(&e, rc) : 0;
    }
    if (rc == 0)
        rc = lock(o.socket, &e);
    if (rc == 0)
        rc = o.pid ? adopt(&o, &fuse, &note, &e) : begin(&o, &fuse, &note, &e);
    if (rc == 0) {
        settle_in();
        rc = listener = held_listen(o.socket, &e);
    }
    if (rc < 0)
        return command_failed(&e, rc); /* what is mounted by now is dead with this process; whoever started it unmounts */
    log_info("holding the connection, pid %d", (int)getpid());
    let_go_of_the_log();
    hold(listener, fuse, note);
    unlink(o.socket);
    return 0;
}
