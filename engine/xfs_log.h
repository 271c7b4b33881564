/* xfs's log in captured writes: which inodes recovery of the filesystem finds, from which write on.
 *
 * The log is a ring of sectors of 512 bytes on the volume. A record begins with xlog_rec_header (fs/xfs/libxfs/
 * xfs_log_format.h): one sector, and one more for each further 32 KiB that a record may have; then its body. The first four
 * bytes of each of the body's sectors are the number of the round through the ring, by which recovery sees where the log
 * ends; what was there stands in the header. (All sectors of a record are there, or it does not count.)
 *
 * Several records are on their way at once and may come in any order: recovery stops at the first gap. So a record counts
 * with the write with which it and all before it are whole. Each names the one before it. A record may come in several
 * writes, one behind the other, and go on at the ring's beginning; a write may hold several.
 *
 * Where the log lies and what block numbers mean is read from the superblock, which is rarely written: it comes from a copy
 * of the volume. A log on a device of its own is not read, nor is one of version 1 (before 2002). */
#ifndef PGCDP_XFS_LOG_H
#define PGCDP_XFS_LOG_H

#include "logged.h"

struct xfs_log;

/* `superblock`: the first LOGGED_SUPERBLOCK bytes of the volume. NULL: not xfs, not understood, or no memory. */
struct xfs_log *xfs_log_open(const uint8_t *superblock, logged_found *found, void *arg);
void xfs_log_close(struct xfs_log *x);

/* The next captured write to the volume; `length` is a multiple of 512. Calls `found` for inodes that recovery finds now. */
enum logged_said xfs_log_take(struct xfs_log *x, uint64_t offset, const uint8_t *data, uint64_t length);

#endif
