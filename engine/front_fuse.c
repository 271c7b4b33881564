/* Notes on the design (measured, docs/architecture.md): ONE thread takes requests, since more of them mean more wake-ups and
 * smaller batches. Answers are given by other threads: fuse_reply_* is thread-safe. The files are opened with direct_io, the
 * loop device above needs no page cache in between. fsync is answered with ENOSYS once and never comes again: every write is
 * durable when it is answered, and the kernel would hold the file's inode lock while a flush is under way.
 *
 * A connection that a holder keeps (held.h) outlives the process that serves it. The kernel sends FUSE_INIT once in its life;
 * libfuse wants one in each process. So libfuse is always given it by hand, at one end of a pair of sockets where the answer
 * comes out at the other: the first process notes both and gives the kernel the answer, a later one must come to the same
 * answer, or the two of them would not mean the same by what follows. It then asks for what its predecessor had taken and not
 * answered (FUSE_NOTIFY_RESEND, Linux 6.9). Such requests come with the highest bit of their number set, and are answered by
 * that number. A write among them may be in the journal already: it becomes one more (docs/decisions/2026-11-27-holder.md).
 */
#define FUSE_USE_VERSION 34
#include "front_fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cleanup.h"
#include "log.h"
#include "util.h"
#include "backing.h"

#define FIRST_INO 2u
#define ATTR_SECONDS 3600.0
#define BUFFER_BYTES (BACKEND_MAX_REQUEST + 4096) /* a write and libfuse's room for its header */
static const struct timespec PAUSE = {.tv_nsec = 1000000};
#define NOTIFY_RESEND 7                           /* FUSE_NOTIFY_RESEND, and */
#define RESENT ((uint64_t)1 << 63)                /* FUSE_UNIQUE_RESEND, both missing in older headers */

struct front {
    struct backend backend;
    struct fuse_session *session;
    uint32_t own_count[MAX_VOLUMES], *open_count; /* of each volume; in the note, if there is one */
    atomic_bool stopping;

    struct held *held; /* NULL: the connection ends with this process */
    const char *mountpoint;
    void *buffer;
    pthread_t reader;
    atomic_bool left;
    atomic_uint leaving; /* threads that wait for that */
    atomic_ulong resent;
};

/* Requests are pointers to aligned memory: bit 0 tells a fallocate from a write. */
static void *as_cookie(fuse_req_t req, bool fallocate) { return (void *)((uintptr_t)req | (fallocate ? 1u : 0u)); }

static void done_write(void *cookie, size_t length, int error)
{
    fuse_req_t req = (fuse_req_t)((uintptr_t)cookie & ~(uintptr_t)1);
    if (error || (uintptr_t)cookie & 1)
        fuse_reply_err(req, -error);
    else
        fuse_reply_write(req, length);
}

static void done_read(void *cookie, const void *data, size_t length, int error)
{
    fuse_req_t req = cookie;
    if (error)
        fuse_reply_err(req, -error);
    else
        fuse_reply_buf(req, data, length);
}

static bool is_volume(const struct front *f, fuse_ino_t ino)
{
    return ino >= FIRST_INO && ino - FIRST_INO < f->backend.volumes;
}

static void fill_attr(const struct front *f, fuse_ino_t ino, struct stat *st)
{
    *st = (struct stat){.st_ino = ino, .st_nlink = 1, .st_blksize = (blksize_t)BLOCK};
    if (ino == FUSE_ROOT_ID) {
        st->st_mode = S_IFDIR | 0700;
        st->st_nlink = 2;
    } else {
        st->st_mode = S_IFREG | 0600;
        st->st_size = (off_t)f->backend.size(f->backend.self, (unsigned)(ino - FIRST_INO));
        st->st_blocks = st->st_size / 512;
    }
}

static void op_init(void *self, struct fuse_conn_info *conn)
{
    (void)self;
    conn->want |= conn->capable & FUSE_CAP_ASYNC_DIO;
    conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE | FUSE_CAP_WRITEBACK_CACHE);
    conn->max_write = (unsigned)BACKEND_MAX_REQUEST;
    conn->max_read = (unsigned)BACKEND_MAX_REQUEST; /* the same as the mount option, or libfuse refuses */
    conn->max_background = 256;                     /* more than a loop device has under way: none waits in the kernel */
    conn->congestion_threshold = 192;
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct front *f = fuse_req_userdata(req);
    for (unsigned i = 0; parent == FUSE_ROOT_ID && i < f->backend.volumes; i++) {
        if (strcmp(name, f->backend.name(f->backend.self, i)) != 0)
            continue;
        struct fuse_entry_param entry = {
            .ino = FIRST_INO + i, .attr_timeout = ATTR_SECONDS, .entry_timeout = ATTR_SECONDS};
        fill_attr(f, entry.ino, &entry.attr);
        fuse_reply_entry(req, &entry);
        return;
    }
    fuse_reply_err(req, ENOENT);
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    struct stat st;
    if (ino != FUSE_ROOT_ID && !is_volume(f, ino)) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    fill_attr(f, ino, &st);
    fuse_reply_attr(req, &st, ATTR_SECONDS);
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct front *f = fuse_req_userdata(req);
    if (!is_volume(f, ino)) {
        fuse_reply_err(req, EISDIR);
        return;
    }
    fi->direct_io = 1;
    /* Counted before the answer, so that who has opened it is not overlooked. Of a held connection behind it: one that is not
     * answered comes again to the next process, and who stops asks the kernel. */
    uint32_t *count = &f->open_count[ino - FIRST_INO];
    if (!f->held)
        __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    bool answered = fuse_reply_open(req, fi) == 0;
    if (f->held && answered)
        __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    if (!f->held && !answered)
        __atomic_fetch_sub(count, 1, __ATOMIC_RELAXED);
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    uint32_t *count = &f->open_count[ino - FIRST_INO];
    if (fuse_reply_err(req, 0) == 0 && __atomic_load_n(count, __ATOMIC_RELAXED))
        __atomic_fetch_sub(count, 1, __ATOMIC_RELAXED);
}

/* 0, or the errno for a range that the backend's contract does not allow. */
static int range_error(const struct front *f, fuse_ino_t ino, uint64_t offset, uint64_t length, bool write)
{
    if (!is_volume(f, ino))
        return EISDIR;
    uint64_t size = f->backend.size(f->backend.self, (unsigned)(ino - FIRST_INO));
    if (offset % BLOCK || length % BLOCK || length == 0)
        return EINVAL;
    if (offset >= size || length > size - offset)
        return write ? ENOSPC : EINVAL;
    return 0;
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t length, off_t offset, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    if (is_volume(f, ino)) { /* reading at or past the end is not an error of a file */
        uint64_t size = f->backend.size(f->backend.self, (unsigned)(ino - FIRST_INO));
        length = (uint64_t)offset >= size ? 0 : (size_t)min_u64(length, size - (uint64_t)offset);
        if (length == 0) {
            fuse_reply_buf(req, NULL, 0);
            return;
        }
    }
    int error = range_error(f, ino, (uint64_t)offset, length, false);
    if (error)
        fuse_reply_err(req, error);
    else
        f->backend.read(f->backend.self, (unsigned)(ino - FIRST_INO), (uint64_t)offset, length, req);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t length, off_t offset,
                     struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    int error = range_error(f, ino, (uint64_t)offset, length, true);
    if (error)
        fuse_reply_err(req, error);
    else
        f->backend.write(f->backend.self, (unsigned)(ino - FIRST_INO), (uint64_t)offset, data, length,
                         as_cookie(req, false));
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    int kind = mode & ~FALLOC_FL_KEEP_SIZE;
    if (kind != FALLOC_FL_PUNCH_HOLE && kind != FALLOC_FL_ZERO_RANGE) {
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    int error = range_error(f, ino, (uint64_t)offset, (uint64_t)length, true);
    if (error)
        fuse_reply_err(req, error);
    else
        f->backend.zero(f->backend.self, (unsigned)(ino - FIRST_INO), (uint64_t)offset, (uint64_t)length,
                        kind == FALLOC_FL_PUNCH_HOLE, as_cookie(req, true));
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    (void)ino;
    (void)datasync;
    (void)fi;
    fuse_reply_err(req, ENOSYS);
}

static void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    (void)fi;
    fuse_reply_err(req, ENOSYS);
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    char buffer[4096];
    size_t used = 0;
    if (ino != FUSE_ROOT_ID) {
        fuse_reply_err(req, ENOTDIR);
        return;
    }
    size = min_u64(size, sizeof buffer);
    for (off_t i = offset; i < (off_t)f->backend.volumes + 2; i++) {
        struct stat st = {.st_ino = i < 2 ? FUSE_ROOT_ID : (ino_t)i, .st_mode = i < 2 ? S_IFDIR : S_IFREG};
        const char *name = i == 0 ? "." : i == 1 ? ".." : f->backend.name(f->backend.self, (unsigned)(i - 2));
        size_t need = fuse_add_direntry(req, buffer + used, size - used, name, &st, i + 1);
        if (need > size - used)
            break;
        used += need;
    }
    fuse_reply_buf(req, buffer, used);
}

static const struct fuse_lowlevel_ops OPS = {
    .init = op_init,
    .lookup = op_lookup,
    .getattr = op_getattr,
    .open = op_open,
    .release = op_release,
    .read = op_read,
    .write = op_write,
    .fallocate = op_fallocate,
    .fsync = op_fsync,
    .flush = op_flush,
    .readdir = op_readdir,
};

/* ---- a connection that a holder keeps ---- */

static void nothing(int number) { (void)number; } /* it is there to end a read with EINTR */

/* The kernel's FUSE_INIT into the buffer; its length, or -errno. A predecessor may have taken it and died. */
static ssize_t take_init(struct front *f)
{
    struct fuse_out_header resend = {.len = sizeof resend, .error = NOTIFY_RESEND};
    if (write(f->held->fuse, &resend, sizeof resend) < 0)
        return -errno;
    ssize_t n;
    do
        n = read(f->held->fuse, f->buffer, BUFFER_BYTES);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

/* Gives libfuse a FUSE_INIT; what it answers comes out at `socket`. The answer's length, or -errno. */
static ssize_t answer_of(struct front *f, void *init, size_t length, int socket, void *answer, size_t room)
{
    struct fuse_buf buffer = {.mem = init, .size = length};
    fuse_session_process_buf(f->session, &buffer);
    ssize_t n = recv(socket, answer, room, MSG_DONTWAIT);
    const struct fuse_out_header *head = answer;
    if (n < 0)
        return -errno;
    return n < (ssize_t)sizeof *head ? -EPROTO : head->error ? head->error : n;
}

static int refuse(int rc, struct err *e)
{
    err_sys(e, rc, "the FUSE connection cannot be begun");
    return rc;
}

/* What this engine and its libfuse agree on with the kernel. */
struct agreement {
    bool before; /* it is in the note: another process has come to it, or this one just now */
    _Alignas(8) uint8_t answer[FMT_HELD_NOTE_INIT]; /* begins with a struct fuse_out_header */
    size_t answer_length, init_length; /* FUSE_INIT itself is in the buffer */
};

/* libfuse's session is at the other end of `theirs`. Asks the kernel for its FUSE_INIT if the note has none. ERR_PRECONDITION
 * for what the note contradicts. */
static int work_out(struct front *f, int theirs, struct agreement *a, struct err *e)
{
    struct held *h = f->held;
    int rc = held_agreed(h, &a->before, e);
    if (rc)
        return rc;
    ssize_t length = h->note->init_length;
    if (a->before)
        memcpy(f->buffer, h->note->init, (size_t)length);
    else if ((length = take_init(f)) < 0)
        return refuse((int)length, e);
    ssize_t answered = answer_of(f, f->buffer, (size_t)length, theirs, a->answer, sizeof a->answer);
    if (answered < 0)
        return refuse((int)answered, e);
    a->init_length = (size_t)length;
    a->answer_length = (size_t)answered;
    if (a->before && (a->answer_length != h->note->answer_length || memcmp(a->answer, h->note->answer, a->answer_length) != 0)) {
        err_set(e, ERR_PRECONDITION, "this engine or its libfuse would agree on something else with the kernel than the one "
                                     "before did: its connection cannot be taken over");
        err_hint(e, "pgcdp down and pgcdp up begin another one");
        return ERR_PRECONDITION;
    }
    return 0;
}

/* Both agree, or have done so before. */
static int agree(struct front *f, int theirs, struct err *e)
{
    struct agreement a;
    int rc = work_out(f, theirs, &a, e);
    if (rc == 0 && !a.before)
        rc = held_agree(f->held, f->buffer, a.init_length, a.answer, a.answer_length, e);
    if (rc)
        return rc;
    /* ENOENT: it was answered by the one before, who may as well have died just before that. */
    if (write(f->held->fuse, a.answer, a.answer_length) < 0 && errno != ENOENT)
        return refuse(-errno, e);
    return 0;
}

/* The session is at one end of a pair of sockets, `ours`, which is the session's to close from then on. */
static int pair_up(struct front *f, int *ours, int *theirs, struct err *e)
{
    int pair[2];
    char place[32];
    /* Touched, so that a request never dies of a page that is not there when this process is killed while it is copied:
     * the kernel would end it with an I/O error. By malloc, since libfuse may make it larger. */
    if (posix_memalign(&f->buffer, BLOCK, BUFFER_BYTES) != 0)
        return err_sys(e, -ENOMEM, "fuse");
    memset(f->buffer, 0, BUFFER_BYTES);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return err_sys(e, -errno, "cannot make a pair of sockets");
    snprintf(place, sizeof place, "/dev/fd/%d", pair[0]);
    *ours = pair[0];
    *theirs = pair[1];
    if (fuse_session_mount(f->session, place) == 0)
        return 0;
    close(pair[0]);
    close(pair[1]);
    return err_set(e, -EIO, "libfuse does not take %s", place);
}

/* The session is on the holder's connection, which is begun. */
static int open_held(struct front *f, struct err *e)
{
    int ours, theirs;
    f->open_count = f->held->note->open;
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    int rc = pair_up(f, &ours, &theirs, e);
    if (rc)
        return rc;
    rc = agree(f, theirs, e);
    if (rc == 0 && dup3(f->held->fuse, ours, O_CLOEXEC) < 0)
        rc = err_sys(e, -errno, "cannot copy a descriptor");
    close(theirs);
    if (rc == 0)
        __atomic_add_fetch(&f->held->note->captures, 1, __ATOMIC_RELAXED);
    return rc;
}

static int mount_own(struct front *f, struct err *e)
{
    if (fuse_session_mount(f->session, f->mountpoint) == 0)
        return 0;
    err_set(e, ERR_PRECONDITION, "cannot mount FUSE at %s", f->mountpoint);
    err_hint(e, "see that /dev/fuse exists and the directory is empty and not mounted");
    return ERR_PRECONDITION;
}

static int session_new(struct front *f, struct err *e)
{
    char options[] = "fsname=pgcdp,subtype=pgcdp,default_permissions,max_read=1048576";
    char program[] = "pgcdp-engine", flag[] = "-o";
    char *argv[] = {program, flag, options, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    f->session = fuse_session_new(&args, &OPS, sizeof OPS, f);
    fuse_opt_free_args(&args);
    return f->session ? 0 : err_set(e, -ENOMEM, "libfuse makes no session");
}

static void discard(struct front *f)
{
    if (f->session)
        fuse_session_destroy(f->session);
    free(f->buffer);
    free(f);
}

int front_open(struct front **out, const struct backend *backend, const char *mountpoint, struct held *held, struct err *e)
{
    struct front *f = calloc(1, sizeof *f);
    if (!f)
        return err_sys(e, -ENOMEM, "fuse");
    f->backend = *backend;
    f->mountpoint = mountpoint;
    f->held = held;
    f->open_count = f->own_count;
    f->reader = pthread_self();
    int rc = session_new(f, e);
    if (rc == 0)
        rc = held ? open_held(f, e) : mount_own(f, e);
    if (rc) {
        discard(f);
        return rc;
    }
    static const struct done done = {.write = done_write, .read = done_read};
    f->backend.set_done(f->backend.self, &done);
    *out = f;
    return 0;
}

int front_fits(struct held *held, struct err *e)
{
    bool agreed;
    int ours, theirs, rc = held_agreed(held, &agreed, e);
    if (rc || !agreed)
        return rc;
    struct front *f = calloc(1, sizeof *f);
    if (!f)
        return err_sys(e, -ENOMEM, "fuse");
    f->held = held;
    rc = session_new(f, e);
    if (rc == 0)
        rc = pair_up(f, &ours, &theirs, e);
    if (rc == 0) {
        struct agreement a;
        rc = work_out(f, theirs, &a, e);
        close(theirs);
    }
    discard(f);
    return rc;
}

/* From now on the kernel sends again what the process before had taken and not answered. */
static void take_over(struct front *f)
{
    struct fuse_out_header resend = {.len = sizeof resend, .error = NOTIFY_RESEND};
    if (write(f->held->fuse, &resend, sizeof resend) < 0)
        log_error("fuse: the kernel does not send again what was not answered: %s", strerror(errno));
    log_info("serving a held connection, capture process %lu of it", held_captures(f->held));
}

static void count_resent(struct front *f, const struct fuse_buf *buffer)
{
    const struct fuse_in_header *head = buffer->mem;
    if (head->unique & RESENT) {
        atomic_fetch_add(&f->resent, 1);
        __atomic_add_fetch(&f->held->note->resent, 1, __ATOMIC_RELAXED);
    }
}

int front_serve(struct front *f)
{
    struct fuse_buf buffer = {.mem = f->buffer};
    int rc = 0;
    f->buffer = NULL;
    if (f->held)
        take_over(f);
    while (!fuse_session_exited(f->session) && !(f->held && atomic_load(&f->stopping))) {
        rc = fuse_session_receive_buf(f->session, &buffer);
        if (rc == -EINTR)
            continue;
        if (rc <= 0)
            break;
        if (f->held)
            count_resent(f, &buffer);
        fuse_session_process_buf(f->session, &buffer);
    }
    atomic_store(&f->left, true);
    free(buffer.mem);
    /* Unmounting from another thread closes the descriptor under this one. */
    if (rc >= 0 || rc == -ENODEV || atomic_load(&f->stopping))
        return 0;
    log_error("fuse: cannot take a request: %s", strerror(-rc));
    return rc;
}

unsigned front_open_count(const struct front *f, unsigned volume)
{
    return __atomic_load_n(&f->open_count[volume], __ATOMIC_RELAXED);
}

uint64_t front_resent(const struct front *f) { return atomic_load(&f->resent); }

int front_grown(struct front *f, unsigned volume)
{
    return fuse_lowlevel_notify_inval_inode(f->session, FIRST_INO + volume, -1, 0); /* attributes alone */
}

void front_leave(struct front *f)
{
    atomic_fetch_add(&f->leaving, 1);
    atomic_store(&f->stopping, true);
    while (!atomic_load(&f->left)) { /* a signal that comes just before the read is lost */
        pthread_kill(f->reader, SIGUSR1);
        nanosleep(&PAUSE, NULL);
    }
    atomic_fetch_sub(&f->leaving, 1);
}

int front_unmount(struct front *f)
{
    int rc = umount2(f->mountpoint, UMOUNT_NOFOLLOW) < 0 ? -errno : 0;
    if (rc && rc != -EINVAL)
        return rc;
    for (unsigned i = 0; rc && i < f->backend.volumes; i++) /* somebody else took it out of the tree, and files may be open */
        if (front_open_count(f, i))
            return -EBUSY;
    front_leave(f);
    return 0;
}

void front_stop(struct front *f)
{
    /* The kernel then ends the reader's blocking read with ENODEV. */
    if (!atomic_exchange(&f->stopping, true) && !f->held)
        fuse_session_unmount(f->session);
}

void front_close(struct front *f)
{
    if (!f)
        return;
    front_stop(f);
    while (atomic_load(&f->leaving))
        nanosleep(&PAUSE, NULL);
    discard(f);
}
