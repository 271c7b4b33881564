/* Transactions from WAL records: what each did to which file of a relation, folded into its top transaction when it ends.
 *
 * Records: src/include/access/xact.h, heapam_xlog.h, storage_xlog.h of PostgreSQL 13 to 18. */
#ifndef PGCDP_WAL_XACTS_H
#define PGCDP_WAL_XACTS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "cursor.h"
#include "format.h"
#include "wal.h"
#include "wal_record.h"

struct xacts;

struct xact_end {
    const struct wal_record *record;
    enum fmt_end_status status;
    uint32_t xid;         /* of the transaction itself, also where a COMMIT PREPARED has one of its own */
    uint32_t database;    /* 0: not said */
    int64_t time_us;      /* microseconds since 2000-01-01 UTC, as in the record */
    uint64_t first_lsn;   /* of its first record; 0: not seen */
    uint32_t subxids;
    const uint32_t *subxid;
    uint32_t changes;
    const struct fmt_change *change;
};

typedef int xacts_ended(void *arg, const struct xact_end *end);

/* 0 or -ENOMEM. */
int xacts_open(struct xacts **out, xacts_ended *ended, void *arg);
void xacts_close(struct xacts *x);

/* The next record in order of LSN: 0, what `ended` returned if that is not 0, or -ENOMEM. */
int xacts_take(struct xacts *x, const struct wal_record *record, const struct wal_parts *parts);

/* Each transaction and subtransaction that changed something and has not ended: 0, or what `runs` returned. */
typedef int xacts_runs(void *arg, uint32_t xid);
int xacts_running(const struct xacts *x, xacts_runs *runs, void *arg);

/* The transactions that have not ended, for the next run (FORMAT.md 4.2). False: that is not it, or no memory. */
void xacts_save(const struct xacts *x, FILE *out);
bool xacts_restore(struct xacts *x, struct cursor *in);

#endif
