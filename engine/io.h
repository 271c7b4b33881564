/* Full reads and writes, syncs, names in a directory: -errno on failure, never a short count. */
#ifndef PGCDP_IO_H
#define PGCDP_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "err.h"

/* All `length` bytes or -errno; the end of the file before that is -ENODATA. */
int io_pread(int fd, void *data, size_t length, uint64_t offset);
int io_pwrite(int fd, const void *data, size_t length, uint64_t offset);

/* All iovecs; changes them while it goes on after a short write. */
int io_pwritev(int fd, struct iovec *iov, int count, uint64_t offset);

/* A range reads back as zeros; storage stays allocated where the filesystem can (image file or block device). */
int io_zero(int fd, uint64_t offset, uint64_t length);

int io_fdatasync(int fd);
int io_fsync_dir(int dir_fd);

/* Page-aligned memory, zeroed, for O_DIRECT. NULL when there is none. */
void *io_alloc(size_t length);
void io_free(void *memory, size_t length);

/* Size of a regular file or block device. */
int io_size(int fd, uint64_t *size);

#endif
