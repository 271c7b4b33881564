/* Transactions from WAL records: what each did to which file of a relation, folded into its top transaction when it ends.
 *
 * Records: src/include/access/xact.h, heapam_xlog.h, storage_xlog.h of PostgreSQL 13 to 18. */
#ifndef PGCDP_WAL_XACTS_H
#define PGCDP_WAL_XACTS_H

#include <stdint.h>

#include "wal.h"
#include "wal_record.h"

struct xacts;

enum xact_status { XACT_COMMITTED = 1, XACT_ABORTED, XACT_PREPARED, XACT_COMMITTED_PREPARED, XACT_ABORTED_PREPARED };

enum xact_change_flags {
    CHANGE_CREATED = 1, /* the file was made by the transaction */
    CHANGE_DROPPED = 2, /* its end removes the file: DROP, TRUNCATE, or a rewrite */
    CHANGE_SHRUNK = 4,  /* cut to fewer blocks: TRUNCATE of what the same transaction made */
};

struct xact_change {
    struct wal_relation relation;
    uint32_t flags;
    uint64_t inserted, updated, deleted; /* rows */
};

struct xact_end {
    const struct wal_record *record;
    enum xact_status status;
    uint32_t xid;         /* of the transaction itself, also where a COMMIT PREPARED has one of its own */
    uint32_t database;    /* 0: not said */
    int64_t time_us;      /* microseconds since 2000-01-01 UTC, as in the record */
    uint64_t first_lsn;   /* of its first record; 0: not seen */
    uint32_t subxids;
    const uint32_t *subxid;
    uint32_t changes;
    const struct xact_change *change;
};

typedef int xacts_ended(void *arg, const struct xact_end *end);

/* 0 or -ENOMEM. */
int xacts_open(struct xacts **out, xacts_ended *ended, void *arg);
void xacts_close(struct xacts *x);

/* The next record in order of LSN: 0, what `ended` returned if that is not 0, or -ENOMEM. */
int xacts_take(struct xacts *x, const struct wal_record *record);

#endif
