#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "util.h"

#ifdef FAULT_POINTS /* a build for tests only: names tests/faults/fault_points.h */
#include FAULT_POINTS
#else
static inline ssize_t write_some(const char *point, int fd, const struct iovec *iov, int count, uint64_t offset)
{
    (void)point;
    return pwritev(fd, iov, count, (off_t)offset);
}

static inline int sync_with(const char *point, int fd, int (*sync)(int))
{
    (void)point;
    return sync(fd);
}

/* 0, or what goes wrong with the change that comes now; `fd` -1: no bytes of a file are about to change. */
static inline int before(const char *point, int fd, uint64_t offset, uint64_t length)
{
    (void)point, (void)fd, (void)offset, (void)length;
    return 0;
}
#endif

int io_pread(int fd, void *data, size_t length, uint64_t offset)
{
    uint8_t *bytes = data;
    while (length) {
        ssize_t n = pread(fd, bytes, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENODATA;
        bytes += n;
        length -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

int io_pwrite(const char *point, int fd, const void *data, size_t length, uint64_t offset)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = length};
    return io_pwritev(point, fd, &iov, 1, offset);
}

int io_pwritev(const char *point, int fd, struct iovec *iov, int count, uint64_t offset)
{
    while (count) {
        ssize_t n = write_some(point, fd, iov, count, offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENOSPC;
        offset += (uint64_t)n;
        size_t done = (size_t)n;
        while (count && done >= iov->iov_len) {
            done -= iov->iov_len;
            iov++;
            count--;
        }
        if (count) {
            iov->iov_base = (uint8_t *)iov->iov_base + done;
            iov->iov_len -= done;
        }
    }
    return 0;
}

static int zero_by_writing(const char *point, int fd, uint64_t offset, uint64_t length)
{
    enum { CHUNK = 1 << 20 };
    void *zeros = io_alloc(CHUNK);
    int rc = zeros ? 0 : -ENOMEM;
    while (rc == 0 && length) {
        size_t n = (size_t)min_u64(length, CHUNK);
        rc = io_pwrite(point, fd, zeros, n, offset);
        offset += n;
        length -= n;
    }
    io_free(zeros, CHUNK);
    return rc;
}

int io_zero(const char *point, int fd, uint64_t offset, uint64_t length)
{
    struct stat st;
    int rc = before(point, fd, offset, length);
    if (rc)
        return rc;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISBLK(st.st_mode)) {
        uint64_t range[2] = {offset, length};
        if (ioctl(fd, BLKZEROOUT, range) == 0)
            return 0;
    } else if (fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) == 0) {
        return 0;
    }
    if (errno != EOPNOTSUPP && errno != ENOTTY && errno != EINVAL)
        return -errno;
    return zero_by_writing(point, fd, offset, length);
}

int io_fdatasync(const char *point, int fd) { return sync_with(point, fd, fdatasync) < 0 ? -errno : 0; }

int io_fsync_file(const char *point, int fd) { return sync_with(point, fd, fsync) < 0 ? -errno : 0; }

int io_fsync_dir(const char *point, int dir_fd) { return sync_with(point, dir_fd, fsync) < 0 ? -errno : 0; }

int io_reserve(const char *point, int fd, uint64_t length)
{
    int rc = before(point, -1, 0, 0);
    if (rc)
        return rc;
    return fallocate(fd, 0, 0, (off_t)length) < 0 && errno != EOPNOTSUPP ? -errno : 0;
}

int io_rename(const char *point, int dir_fd, const char *from, const char *to)
{
    int rc = before(point, -1, 0, 0);
    if (rc)
        return rc;
    return renameat(dir_fd, from, dir_fd, to) < 0 ? -errno : 0;
}

int io_unlink(const char *point, int dir_fd, const char *name)
{
    int rc = before(point, -1, 0, 0);
    if (rc)
        return rc;
    return unlinkat(dir_fd, name, 0) < 0 ? -errno : 0;
}

void *io_alloc(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void io_free(void *memory, size_t length)
{
    if (memory)
        munmap(memory, length);
}

int io_size(int fd, uint64_t *size)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISBLK(st.st_mode))
        return ioctl(fd, BLKGETSIZE64, size) < 0 ? -errno : 0;
    *size = (uint64_t)st.st_size;
    return 0;
}
