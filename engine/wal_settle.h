/* With which write WAL is durable: recovery finds it by the filesystem's mapping of its block too.
 *
 * With wal_init_zero = on a segment's blocks are there before WAL comes into them: the write itself makes it durable. With
 * off, a block's first write fills a hole, and the mapping is durable when the filesystem has committed its own log. Postgres
 * waits for that before it writes on. Others may commit meanwhile.
 *
 * So the filesystem's log is read (xfs_log.h, ext4_log.h). WAL is durable with the write with which recovery of the filesystem
 * finds a file of the size of a segment that has the blocks, as written, at their place in the segment. What a file of which
 * the log told before has already, is durable at once. Two things are not known for sure, and then the last write to the log
 * before the next flush of WAL counts, which is late, but surely enough: a file on xfs in so many pieces that its extents are
 * in a B-tree, and what was not seen whole (as at the beginning of what is read).
 *
 * Where the log is not known: the last commit block of ext4 or record of xfs's log before the next flush of WAL.
 *
 * When none of this has come until then, the flush went into a segment that was used before (wal_recycle). */
#ifndef PGCDP_WAL_SETTLE_H
#define PGCDP_WAL_SETTLE_H

#include <stdbool.h>
#include <stdint.h>

#include "wal_tables.h"

struct settle;

/* `holes`: wal_init_zero = off, else all is durable at once. NULL: no memory. */
struct settle *settle_open(bool holes, uint64_t segment_bytes);
void settle_close(struct settle *s);

/* The first LOGGED_SUPERBLOCK bytes of a volume, whatever is on it: what else is written to it is read with them. */
void settle_volume(struct settle *s, uint16_t volume, const uint8_t *superblock);

/* Where WAL is read from, and where the rows go. */
void settle_between(struct settle *s, struct wal *wal, struct tables *t);

/* wal_options.mapped, with the struct settle. */
bool settle_mapped(void *arg, uint16_t volume, uint64_t at, uint64_t place);

/* A write of `wal`'s completed records: `row` without `durable`. 0 or -errno. */
int settle_wal(struct settle *s, struct fmt_wal_write row, uint16_t volume);

/* Any other write. */
int settle_other(struct settle *s, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length);

/* Whether WAL waits for writes behind the one taken last. */
bool settle_waits(const struct settle *s);

/* The end of what can be read now. */
int settle_end(struct settle *s);

#endif
