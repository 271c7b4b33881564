/* What volume.c (taking, committing), reads.c and apply.c (bringing durable writes to the volumes) share. */
#ifndef PGCDP_VOLUME_SET_H
#define PGCDP_VOLUME_SET_H

#include <pthread.h>

#include "backend.h"
#include "backing.h"
#include "extmap.h"
#include "format.h"
#include "journal_write.h"
#include "runs.h"
#include "tracked.h"
#include "volume.h"

#define RING_BYTES ((uint64_t)40 << 20)    /* data of writes that are not yet applied */
#define RECORDS ((uint64_t)65536)          /* their records */
#define BATCHES ((uint64_t)8192)           /* their batches */
#define MAX_BATCH_BYTES ((uint64_t)4 << 20)
#define MAX_BATCH_RECORDS 1024u
#define PARKED_BYTES ((uint64_t)24 << 20)  /* writes that wait because the ring is full or the journal stalls */

/* Positions are virtual: they only grow, and are taken modulo the ring's size. A batch is contiguous in each ring. */
struct batch {
    uint64_t record0, data0, data_length;
    uint32_t records;
    uint64_t opened_ns;
};

/* What becomes of a batch. Only the committer changes it, under the lock. */
enum vs_mode {
    VS_CAPTURING, /* it goes to the journal, then to the volumes */
    VS_TRACKING,  /* the journal cannot grow: its blocks are noted, then it goes to the volumes (tracking.c) */
    VS_HEALING,   /* it goes to the journal, and so do the noted blocks (hot_copy.c) */
};

struct parked { /* a write that could not be taken yet; in order */
    struct parked *next;
    struct fmt_record record;
    void *cookie;
    uint8_t data[];
};

/* One lock for everything below; held for memory copies at most, never for I/O. */
struct volume_set {
    struct volume *volumes;
    unsigned count;
    struct jw *jw;
    struct done done;

    pthread_mutex_t lock;
    pthread_cond_t to_commit, to_apply, progress;
    pthread_t committer, applier, copier;
    bool copies;
    struct reads *reads;
    unsigned threads;
    bool stop_committer, stop_applier, stop_copier;

    uint8_t *ring;
    struct fmt_record *records;
    void **cookies; /* beside the records: whom to answer, NULL for nobody */
    struct batch *batches;
    struct extmap *map;

    uint64_t data_head, data_tail;
    uint64_t record_head, record_tail;
    uint64_t batch_open, batch_commit, batch_tail; /* open >= commit >= tail */
    uint64_t record_commit;                        /* records before this place are durable, or tracked */

    struct parked *parked_first, **parked_last;
    uint64_t parked_bytes;

    uint64_t durable_write, applied_write, synced_write;
    uint64_t sync_wanted; /* the applier brings synced_write to here without waiting for more */
    uint64_t unsynced_bytes, last_sync_ns;
    bool stalled;

    struct tracked *tracked; /* NULL: writes wait when the journal cannot grow */
    bool state_told;         /* the last change of its state is durable, here and in the applied mark; the committer's */
    bool track;              /* false: what is tracked is brought in, then they wait, too */
    enum vs_mode mode;
    uint64_t tracked_batches;        /* grows with each that was never in the journal, and with each try to heal */
    bool inside;                     /* the journal's end lies so (fmt_inside); only the committer changes it */
    bool begin_taken;                /* ... or will: a begin record is on its way to the journal */
    bool heal_wanted, bitmap_busy;
    bool end_taken;                  /* the gap's end record is on its way to the journal, */
    bool ended;                      /* ... and is durable there; the bitmap does not say so yet */
    char not_healed[400];            /* why the last wish to heal was not followed, or "" */
    bool syncing;        /* the applier syncs the volumes, or writes them again */
    bool volume_failed;  /* a sync failed: they may lack what they had, until it is written again (rewrite.c); only the applier changes it */
    bool rewrite_failed; /* ... which was tried, and is tried again */
    uint64_t losses;     /* so many times a sync failed where it may have lost something; atomic, changed under the lock */
    const char *journal;
    const uint8_t *set_id;
    bool apply_failed;  /* the last window could not be written; tried again */
    bool mark_failed;   /* the last applied mark could not be written; tried again */
    char errors[VS_TROUBLES][256]; /* what does not work now; "" what does */

    uint64_t writes, reads_taken, bytes_written, bytes_read;
};

static inline struct batch *batch_at(struct volume_set *vs, uint64_t i) { return &vs->batches[i % BATCHES]; }

/* The newest number given. A write has the number that its place in the journal will have. Called with the lock. */
static inline uint64_t vs_last_write(const struct volume_set *vs)
{
    return vs->durable_write + (vs->mode == VS_TRACKING ? 0 : vs->record_head - vs->record_commit);
}

/* Of the applied mark. Called with the lock, or after the committer has ended. */
static inline uint32_t vs_mark_flags(const struct volume_set *vs, bool clean)
{
    return (clean ? FMT_APPLIED_CLEAN : 0) | (vs->inside ? FMT_APPLIED_INSIDE : 0);
}

/* Puts a record into the open batch; false when it does not fit now. Called with the lock. */
bool vs_take(struct volume_set *vs, struct fmt_record *r, const void *data, void *cookie);

/* Takes parked writes into the ring as far as they fit. Called with the lock. */
void vs_take_parked(struct volume_set *vs);

/* Something does not work. Each different trouble is logged once. Called without the lock. */
void vs_note_error(struct volume_set *vs, enum vs_trouble what, const char *format, ...) __attribute__((format(printf, 3, 4)));

void *applier_main(void *vs);

/* Writes to the volumes again, from the journal, what a failed sync may have lost: behind synced_write, up to write `applied`, which all
 * are. Then syncs them. By the applier alone; 0, or an error of which nothing but time, or the next start, may be the end. */
int vs_rewrite(struct volume_set *vs, uint64_t applied, struct err *e);

/* The oldest batch that is not committed goes to the volumes, which are synced then. By the committer, when all before it are
 * applied; the applier has nothing to do then. 0 or -errno, and the error is noted: the same may be tried again. */
int vs_apply_unjournalled(struct volume_set *vs, struct block *room);
#define VS_BATCH_BLOCKS ((MAX_BATCH_BYTES + BACKEND_MAX_REQUEST) / BLOCK)

#endif
