/*
 * Reading a journal directory (FORMAT.md 1): the one place in the engine that knows which batches belong to the
 * journal, where it ends, and what is damage. Reads only; a live journal can be read beside its capture process.
 *
 *     struct jr *jr;
 *     struct jr_batch batch;
 *     jr_open(&jr, dir, set_id, &e);
 *     jr_seek(jr, first_write_of_interest, &e);
 *     while ((rc = jr_next(jr, &batch, &e)) == 1)
 *         ...
 *     if (rc == 0)
 *         jr_end(jr, &end);
 *     jr_close(jr);
 *
 * Not safe for several threads on one struct jr.
 */
#ifndef PGCDP_JOURNAL_READ_H
#define PGCDP_JOURNAL_READ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "format.h"

/* Stored bytes are not what was written; the message names the segment file, the offset and the writes. */
#define JR_DAMAGE ERR_DAMAGE

/* The journal was recycled under a reader of a live journal: open it again, at most so many times in a row. */
#define JR_STALE (-ESTALE)
#define JR_STALE_ATTEMPTS 100

struct jr;

/* One batch that belongs to the journal. The pointers hold until the next call on the same struct jr. */
struct jr_batch {
    uint64_t number;                 /* batch number */
    uint64_t first_write;            /* record[i] has write number first_write + i */
    uint32_t records;                /* at least 1 */
    const struct fmt_record *record; /* checked: kinds, numbers, and that their data fills the batch */
    const uint8_t *data;             /* page-aligned; data of record i + 1 begins at the next multiple of 4096 after i's */
    uint64_t segment;                /* sequence number of the segment it is in */
    uint64_t offset;                 /* where it begins there */
    uint64_t end_offset;             /* where it ends there */
};

/* A segment file, oldest first. Writes and batches are 0 when no batch of the journal is in it. */
struct jr_segment {
    uint64_t sequence;
    uint64_t salt;
    uint64_t size;
    uint64_t first_write;
    uint64_t first_batch;
    uint64_t last_write; /* known once jr_next has passed its end; before that 0 */
};

/* Where the journal ends, and what its applied mark (FORMAT.md 1.4) says. */
struct jr_end {
    uint64_t last_write; /* 0: no write was ever captured */
    uint64_t last_batch; /* 0: likewise */
    uint64_t segment;    /* where the last batch ended; that may be a segment that is gone when the journal is empty */
    uint64_t offset;
    bool torn;           /* something that was never answered lies behind the end */
    bool marked;         /* the journal has an applied mark; the fields below are 0 without */
    bool clean;          /* ... and it says that the capture process stopped cleanly, */
    bool inside;         /* ... or that it stands inside a rewind in place, or a gap that is taken in while Postgres is stopped */
    uint64_t mark_sequence;
    uint64_t applied_write;
    uint64_t released_write;
    uint64_t mark_durable_write; /* last durable write when the mark was written */
    struct fmt_tracking tracking;
};

/*
 * Opens the journal in `dir`: takes its segments, checks headers, set id, contiguity and the applied mark.
 * `set_id` NULL takes any. A directory without segments is an empty journal.
 * Returns 0, -ENOENT (no such directory), ERR_PRECONDITION (the journal of another set), JR_DAMAGE or another -errno.
 */
int jr_open(struct jr **out, const char *dir, const uint8_t set_id[16], struct err *e);

void jr_close(struct jr *jr);

/*
 * Reads the next batch. Returns 1 with a batch, 0 at the end of the journal, JR_DAMAGE, JR_STALE or another -errno.
 * After a negative answer the position is unchanged.
 */
int jr_next(struct jr *jr, struct jr_batch *out, struct err *e);

/* Makes durable, from where it stands on, what a process that died may have left in the disk's cache. 0 or -errno. */
int jr_sync(struct jr *jr, struct err *e);

/*
 * Goes forward so that the next batch is the first one that holds `write` or a later one. Batches before it are
 * passed by their headers, whole segments by their first batch: numbers are checked, data is not.
 * A write after the end moves to the end. Never goes back. Returns 0 or as jr_next.
 */
int jr_seek(struct jr *jr, uint64_t write, struct err *e);

/*
 * Nothing behind `write` belongs to the journal: what is there was never answered, and newer data may be on the volumes
 * (FORMAT.md 1.8). Before jr_seek to the write that follows.
 */
void jr_end_at(struct jr *jr, uint64_t write);

/*
 * After JR_DAMAGE from jr_next: goes on behind the damage, at the next batch that is valid in itself.
 * For `check`, which names every damage; nothing else may use what follows a damage.
 * Returns 1, or 0 when nothing valid follows. `*missing_to` is the last write lost (0: not known).
 */
int jr_pass_damage(struct jr *jr, uint64_t *missing_to);

/* After jr_next has returned 0: where the journal ends. */
void jr_end(const struct jr *jr, struct jr_end *out);

/* All segment files in order, `*count` of them; holds until jr_close. Complete after jr_next has returned 0. */
const struct jr_segment *jr_segments(const struct jr *jr, size_t *count);

/* "0000000000000003.seg" of a sequence number. */
void jr_segment_name(char out[32], uint64_t sequence);

#endif
