/* What a WAL record says: its block references and its main data (src/include/access/xlogrecord.h, PostgreSQL 13 to 18). */
#ifndef PGCDP_WAL_RECORD_H
#define PGCDP_WAL_RECORD_H

#include <stdbool.h>
#include <stdint.h>

#include "format.h"
#include "wal.h"

enum wal_fork { MAIN_FORK = 0, INIT_FORK = 3 }; /* of those in src/include/common/relpath.h, what is asked for */

struct wal_block {
    struct fmt_relation relation;
    uint32_t block;
    uint8_t fork;
};

#define WAL_MAX_BLOCKS 33 /* XLR_MAX_BLOCK_ID + 1 */

struct wal_parts {
    uint32_t toplevel_xid; /* 0: not said */
    uint32_t blocks;
    struct wal_block block[WAL_MAX_BLOCKS]; /* in the order of the record, which is that of their numbers */
    const uint8_t *main;
    uint32_t main_length;
};

/* False when the body contradicts itself, which a record with a right CRC never does, or was not kept. */
bool wal_parse(const struct wal_record *r, struct wal_parts *out);

enum wal_rmgr { /* src/include/access/rmgrlist.h */
    RM_XLOG = 0,
    RM_XACT = 1,
    RM_SMGR = 2,
    RM_DBASE = 4,
    RM_TBLSPC = 5,
    RM_RELMAP = 7,
    RM_STANDBY = 8,
    RM_HEAP2 = 9,
    RM_HEAP = 10,
    RM_LOGICALMSG = 21,
};

#endif
