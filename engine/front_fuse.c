/* Notes on the design (measured, docs/architecture.md): ONE thread takes requests, since more of them mean more wake-ups and
 * smaller batches. Answers are given by other threads: fuse_reply_* is thread-safe. The files are opened with direct_io, the
 * loop device above needs no page cache in between. fsync is answered with ENOSYS once and never comes again: every write is
 * durable when it is answered, and the kernel would hold the file's inode lock while a flush is under way.
 */
#define FUSE_USE_VERSION 34
#include "front_fuse.h"

#include <errno.h>
#include <fuse_lowlevel.h>
#include <linux/falloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "log.h"
#include "util.h"
#include "backing.h"

#define FIRST_INO 2u
#define ATTR_SECONDS 3600.0

struct front {
    struct backend backend;
    struct fuse_session *session;
    atomic_uint open_count[MAX_VOLUMES];
    atomic_bool stopping;
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
    atomic_fetch_add(&f->open_count[ino - FIRST_INO], 1);
    if (fuse_reply_open(req, fi) < 0)
        atomic_fetch_sub(&f->open_count[ino - FIRST_INO], 1);
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    struct front *f = fuse_req_userdata(req);
    atomic_fetch_sub(&f->open_count[ino - FIRST_INO], 1);
    fuse_reply_err(req, 0);
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

int front_open(struct front **out, const struct backend *backend, const char *mountpoint, struct err *e)
{
    struct front *f = calloc(1, sizeof *f);
    if (!f)
        return err_sys(e, -ENOMEM, "fuse");
    f->backend = *backend;
    char options[] = "fsname=pgcdp,subtype=pgcdp,default_permissions,max_read=1048576";
    char program[] = "pgcdp-engine", flag[] = "-o";
    char *argv[] = {program, flag, options, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    f->session = fuse_session_new(&args, &OPS, sizeof OPS, f);
    fuse_opt_free_args(&args);
    if (!f->session || fuse_session_mount(f->session, mountpoint) != 0) {
        if (f->session)
            fuse_session_destroy(f->session);
        free(f);
        err_set(e, ERR_PRECONDITION, "cannot mount FUSE at %s", mountpoint);
        err_hint(e, "see that /dev/fuse exists and the directory is empty and not mounted");
        return ERR_PRECONDITION;
    }
    static const struct done done = {.write = done_write, .read = done_read};
    f->backend.set_done(f->backend.self, &done);
    *out = f;
    return 0;
}

int front_serve(struct front *f)
{
    struct fuse_buf buffer = {.mem = NULL};
    int rc = 0;
    while (!fuse_session_exited(f->session)) {
        rc = fuse_session_receive_buf(f->session, &buffer);
        if (rc == -EINTR)
            continue;
        if (rc <= 0)
            break;
        fuse_session_process_buf(f->session, &buffer);
    }
    free(buffer.mem);
    /* Unmounting from another thread closes the descriptor under this one. */
    if (rc >= 0 || rc == -ENODEV || atomic_load(&f->stopping))
        return 0;
    log_error("fuse: cannot take a request: %s", strerror(-rc));
    return rc;
}

unsigned front_open_count(const struct front *f, unsigned volume) { return atomic_load(&f->open_count[volume]); }

int front_grown(struct front *f, unsigned volume)
{
    return fuse_lowlevel_notify_inval_inode(f->session, FIRST_INO + volume, -1, 0); /* attributes alone */
}

void front_stop(struct front *f)
{
    /* The kernel then ends the reader's blocking read with ENODEV. */
    if (!atomic_exchange(&f->stopping, true))
        fuse_session_unmount(f->session);
}

void front_close(struct front *f)
{
    if (!f)
        return;
    front_stop(f);
    fuse_session_destroy(f->session);
    free(f);
}
