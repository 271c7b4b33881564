/* With which write WAL is durable: recovery finds it by the filesystem's mapping of its block too.
 *
 * With wal_init_zero = on a segment's blocks are there before WAL comes into them: the write itself makes it durable. With
 * off, a block's first write fills a hole, and the mapping is durable when the filesystem has committed its own log. Postgres
 * waits for that before it writes on. Others may commit meanwhile, and whose commit it is cannot be told from outside; so it
 * is the last one before the next flush of WAL: recovery surely finds the WAL with it. (Each write tried: with ext4 it was the
 * first such write, too; with xfs once in a while an earlier one.) If none has come by then, the flush went into a segment
 * that was used before (wal_recycle). */
#ifndef PGCDP_WAL_SETTLE_H
#define PGCDP_WAL_SETTLE_H

#include <stdbool.h>
#include <stdint.h>

#include "wal_tables.h"

#define SETTLE_WAITING 64u /* writes of one flush; each may be 1 MiB */
#define SETTLE_WITHIN 16u  /* writes behind the last of them */

struct settle { /* zeroed at first */
    bool holes; /* wal_init_zero = off */
    uint32_t count;
    uint64_t commit; /* the newest one since the last of them; 0: none */
    struct fmt_wal_write waiting[SETTLE_WAITING];
};

/* A write completed WAL: `row` without `durable`. `fresh_from`, `again`: as wal.h. 0 or -errno. */
int settle_wal(struct settle *s, struct tables *t, struct fmt_wal_write row, uint64_t fresh_from, bool again);

/* Any other write. */
int settle_other(struct settle *s, struct tables *t, uint64_t write, const uint8_t *data, uint64_t length);

/* The end of what can be read now. */
int settle_end(struct settle *s, struct tables *t);

#endif
