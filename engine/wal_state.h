/* What one run of `pgcdp-engine wal` leaves for the next, so that a transaction may begin in one and end in another. */
#ifndef PGCDP_WAL_STATE_H
#define PGCDP_WAL_STATE_H

#include "err.h"
#include "wal.h"
#include "wal_notes.h"
#include "wal_xacts.h"

struct wal_reading { /* all that a run knows */
    uint64_t system_identifier;
    uint32_t segment_bytes;
    uint64_t write; /* the last one taken */
    struct wal *wal;
    struct xacts *xacts;
    struct notes notes;
};

/* Writes FORMAT.md 4.2 to a new file, synced. 0 or -errno. */
int state_save(const struct wal_reading *r, const char *path, struct err *e);

/* 0, ERR_DAMAGE with file and offset, ERR_PRECONDITION for another cluster's, or -errno. */
int state_load(struct wal_reading *r, const char *path, struct err *e);

#endif
