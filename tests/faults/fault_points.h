/* Faults in a build for tests: what io.c does on a disk goes through here and fails where and when it is told to.
 *
 * `PGCDP_TEST_FAULTS` names a directory. A file in it named like a point ("journal.batch.sync"), or like the first word of
 * points ("journal": that whole disk), makes them fail:
 *
 *     KIND [SKIP [TIMES [MILLISECONDS]]]
 *
 * SKIP calls go well first, TIMES fail (0: until the file goes), then the file is removed. KIND:
 *
 *     enospc   a write stops after half of its blocks, and there is no room for the rest; anything else fails with ENOSPC
 *     eio      likewise with EIO
 *     short    a write brings half of its blocks and says so; it can go on. Nothing else fails
 *     lost     a sync fails with EIO, and what was written since the last one is gone: the disk has what it had before.
 *              Anything else as eio
 *     slow     takes so many milliseconds longer
 *
 * Each time one fires, a line is appended to FILE.fired: the name of the point and the kind. */
#ifndef PGCDP_FAULT_POINTS_H
#define PGCDP_FAULT_POINTS_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

ssize_t write_some(const char *point, int fd, const struct iovec *iov, int count, uint64_t offset);
int sync_with(const char *point, int fd, int (*sync)(int));
int before(const char *point, int fd, uint64_t offset, uint64_t length);

#endif
