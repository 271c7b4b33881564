/* PostgreSQL's WAL inside captured writes: which record is complete with which write.
 *
 * `wal_take` is given every captured write in order. It recognises WAL pages by their header (src/include/access/
 * xlog_internal.h, PostgreSQL 13 to 18), keeps the newest content of those from the next record on, and calls `found`
 * for each record as soon as it is whole and its CRC is right: with the write that completed it, which is the first one
 * with which recovery reaches it. Records come in order of LSN, each once.
 *
 * Whatever looks like WAL and is not (another cluster's, a copy, damage) costs time at most: a record counts when its
 * LSN, its link to the record before and its CRC are right. Memory is fixed by `wal_open`. What never comes whole (writes
 * that were not captured) is passed over with the next segment that begins 32 MiB or more behind it, and `lost` is told.
 */
#ifndef PGCDP_WAL_H
#define PGCDP_WAL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "cursor.h"
#include "err.h"

struct wal;

struct wal_record {
    uint64_t lsn;       /* where it begins */
    uint64_t end_lsn;   /* where it ends, padded to 8 bytes: what commit returns to clients as the LSN to wait for */
    uint64_t write;     /* the captured write that completed it */
    uint64_t prev_lsn;
    uint32_t timeline;
    uint32_t xid;
    uint32_t length;    /* bytes, the header of 24 included */
    uint16_t magic;     /* of its page: tells the version */
    uint8_t rmid;
    uint8_t info;
    uint32_t begin_at;  /* where `lsn` and `end_lsn` lie in that write, in bytes from its beginning; */
    uint32_t end_at;    /* UINT32_MAX: in an earlier one */
    const uint8_t *body; /* behind the header, `length` - 24 bytes; valid during the call */
};

typedef int wal_found(void *arg, const struct wal_record *record);

/* WAL from `from` on was not seen whole; reading goes on at `to` with write `write`. */
typedef int wal_lost(void *arg, uint64_t from, uint64_t to, uint64_t write);

/* Whether the filesystem finds the bytes of a WAL segment from `at` on at `place` of a volume, durably. */
typedef bool wal_mapped(void *arg, uint16_t volume, uint64_t at, uint64_t place);

struct wal_options {
    uint64_t system_identifier; /* pages of segment starts that bear another one are not ours */
    uint64_t start_lsn;         /* where to begin; 0: at the first record that begins in the first page seen. When that lies
                                   behind, what is between is told as `lost` */
    uint32_t segment_bytes;     /* wal_segment_size */
    wal_found *found;           /* not 0: stop, `wal_take` returns it */
    wal_lost *lost;             /* likewise; may be NULL */
    void *arg;
    wal_mapped *mapped;         /* asked for each block when it is written first; may be NULL: none is known to be */
    void *mapped_arg;
};

/* Memory: twice a WAL segment, and what the largest record so far needed. 0 or -errno. */
int wal_open(struct wal **out, const struct wal_options *options, struct err *e);
void wal_close(struct wal *w);

/* A captured write: `length` bytes (a multiple of 4096) at `offset` of volume `volume`. */
int wal_take(struct wal *w, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length);

/* Where the next record is looked for; 0 before the first page was seen. */
uint64_t wal_next_lsn(const struct wal *w);

/* A block is unmapped from the first write to it on until the filesystem is known to find it: by `mapped` of the options, by
 * `wal_map`, or by `wal_mapped_upto`. */

/* Of the write taken last: the first of the records that it completed that has an unmapped block, 0: none; and whether it
 * held blocks that had been written before. A flush of WAL begins with the page that the one before ended in. */
uint64_t wal_unmapped_from(const struct wal *w);
bool wal_again(const struct wal *w);

/* Whether WAL from `from` to `to` has an unmapped block. */
bool wal_unmapped(const struct wal *w, uint64_t from, uint64_t to);

/* Asks for each unmapped block from `from` on whether it is mapped. */
void wal_map(struct wal *w, uint64_t from, wal_mapped *mapped, void *arg);

/* What was written up to a write is mapped. */
void wal_mapped_upto(struct wal *w, uint64_t write);

/* What one run leaves for the next (FORMAT.md 4.2), which must have the same options. False: that is not it. */
void wal_save(const struct wal *w, FILE *out);
bool wal_restore(struct wal *w, struct cursor *in);

#endif
