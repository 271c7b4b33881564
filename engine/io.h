/* Full reads and writes, syncs, names in a directory: -errno on failure, never a short count.
 *
 * What changes something on a disk takes `point`, the name of that place in the program ("journal.batch.sync"): in a build
 * for tests the disk can be made to fail exactly there (tests/faults/fault_points.h). A name is used at one place only.
 */
#ifndef PGCDP_IO_H
#define PGCDP_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "err.h"

/* All `length` bytes or -errno; the end of the file before that is -ENODATA. */
int io_pread(int fd, void *data, size_t length, uint64_t offset);
int io_pwrite(const char *point, int fd, const void *data, size_t length, uint64_t offset);

/* All iovecs; changes them while it goes on after a short write. */
int io_pwritev(const char *point, int fd, struct iovec *iov, int count, uint64_t offset);

/* A range reads back as zeros; storage stays allocated where the filesystem can (image file or block device). */
int io_zero(const char *point, int fd, uint64_t offset, uint64_t length);

int io_fdatasync(const char *point, int fd);
int io_fsync_file(const char *point, int fd);
int io_fsync_dir(const char *point, int dir_fd);

/* Room for all of a new file, where its filesystem can reserve it. */
int io_reserve(const char *point, int fd, uint64_t length);

int io_rename(const char *point, int dir_fd, const char *from, const char *to);
int io_unlink(const char *point, int dir_fd, const char *name);

/* Page-aligned memory, zeroed, for O_DIRECT. NULL when there is none. */
void *io_alloc(size_t length);
void io_free(void *memory, size_t length);

/* Size of a regular file or block device. */
int io_size(int fd, uint64_t *size);

#endif
