/* What volume.c (taking, committing), reads.c and apply.c (bringing durable writes to the volumes) share. */
#ifndef PGCDP_VOLUME_SET_H
#define PGCDP_VOLUME_SET_H

#include <pthread.h>

#include "backend.h"
#include "backing.h"
#include "extmap.h"
#include "format.h"
#include "journal_write.h"
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
    pthread_t committer, applier;
    struct reads *reads;
    unsigned threads;
    bool stop_committer, stop_applier;

    uint8_t *ring;
    struct fmt_record *records;
    void **cookies; /* beside the records: whom to answer, NULL for nobody */
    struct batch *batches;
    struct extmap *map;

    uint64_t data_head, data_tail;
    uint64_t record_head, record_tail;
    uint64_t batch_open, batch_commit, batch_tail; /* open >= commit >= tail */

    struct parked *parked_first, **parked_last;
    uint64_t parked_bytes;

    uint64_t last_write, durable_write, applied_write, synced_write;
    uint64_t sync_wanted; /* the applier brings synced_write to here without waiting for more */
    uint64_t unsynced_bytes, last_sync_ns;
    bool stalled;
    bool volume_failed; /* a sync failed: nothing is marked as applied until a restart */
    bool apply_failed;  /* the last window could not be written; tried again */
    bool mark_failed;   /* the last applied mark could not be written; tried again */
    char errors[VS_TROUBLES][256]; /* what does not work now; "" what does */

    uint64_t writes, reads_taken, bytes_written, bytes_read;
};

static inline struct batch *batch_at(struct volume_set *vs, uint64_t i) { return &vs->batches[i % BATCHES]; }

/* Takes parked writes into the ring as far as they fit. Called with the lock. */
void vs_take_parked(struct volume_set *vs);

/* Something does not work. Each different trouble is logged once. Called without the lock. */
void vs_note_error(struct volume_set *vs, enum vs_trouble what, const char *format, ...) __attribute__((format(printf, 3, 4)));

void *applier_main(void *vs);

#endif
