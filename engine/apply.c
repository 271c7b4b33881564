/* The applier: durable writes come to the volumes, each block once.
 *
 * WAL tail pages are rewritten dozens of times; waiting a little lets all but the last version of a block fall out. A window
 * of batches is taken from the tail, its blocks are sorted, the newest version of each stays, neighbours are merged into one
 * pwritev. A zero or discard ends a run of data: what came before it is written first. After that the blocks leave the map,
 * and their space in the ring is free.
 *
 * The applied mark follows from time to time: volumes synced, then the mark (journal_write.c). A sync that failed is never
 * tried again as if nothing had happened: what it may have lost is written again from the journal before anything else (rewrite.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "io.h"
#include "log.h"
#include "reads.h"
#include "runs.h"
#include "util.h"
#include "volume_set.h"

#define WINDOW_BYTES ((uint64_t)16 << 20)
#define WINDOW_BLOCKS ((WINDOW_BYTES + MAX_BATCH_BYTES) / BLOCK)
#define LAG_NS 500000000             /* how long a durable write may wait for its block to be written again */
#define SYNC_BYTES ((uint64_t)64 << 20)
#define SYNC_NS 5000000000u
#define RETRY_NS 999999999

/* Called with the lock. */
static void wait_ns(struct volume_set *vs, long ns)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until); /* as cond_init_monotonic made it */
    until.tv_nsec += ns;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&vs->to_apply, &vs->lock, &until);
}

struct window {
    uint64_t batch_end, data_end, record_end, last_write, bytes;
    struct block *blocks;
    size_t count;
};

/* Writes the blocks gathered so far, newest version of each. */
static int write_blocks(struct volume_set *vs, struct window *w)
{
    struct err e;
    int rc = runs_write("volume.apply.write", vs->volumes, w->blocks, w->count, &e);
    if (rc == 0)
        w->count = 0;
    else
        vs_note_error(vs, VS_APPLY, "%s", e.message);
    return rc;
}

static int apply_zero(struct volume_set *vs, struct window *w, const struct fmt_record *r)
{
    int rc = write_blocks(vs, w);
    if (rc)
        return rc;
    const struct volume *v = &vs->volumes[r->volume];
    rc = io_zero("volume.apply.zero", v->fd, r->offset, r->length);
    if (rc)
        vs_note_error(vs, VS_APPLY, "volume %s: cannot zero %lu bytes at %lu: %s", v->name, r->length, r->offset, strerror(-rc));
    return rc;
}

static void add_batch(struct volume_set *vs, struct window *w)
{
    const struct batch *b = batch_at(vs, w->batch_end++);
    w->bytes += b->data_length;
    w->data_end = b->data0 + b->data_length;
    w->record_end = b->record0 + b->records;
}

/* The one at the tail, which is not committed. Called with the lock. */
static void choose_batch(struct volume_set *vs, struct window *w)
{
    w->batch_end = vs->batch_tail;
    add_batch(vs, w);
}

/* The batches from the tail that are durable, up to a window's size. Called with the lock; nobody else moves the tail. */
static void choose_window(struct volume_set *vs, struct window *w)
{
    w->count = 0;
    w->bytes = 0;
    w->batch_end = vs->batch_tail;
    while (w->batch_end < vs->batch_commit && w->bytes < WINDOW_BYTES) {
        add_batch(vs, w);
        w->last_write = vs->records[(w->record_end - 1) % RECORDS].number;
    }
}

/* Calls `each` for every record of the window with its place in their order and its data. */
static int for_each_record(struct volume_set *vs, struct window *w,
                           int (*each)(struct volume_set *, struct window *, const struct fmt_record *, uint64_t, const uint8_t *))
{
    for (uint64_t i = vs->batch_tail; i < w->batch_end; i++) {
        const struct batch *b = batch_at(vs, i);
        const uint8_t *data = vs->ring + b->data0 % RING_BYTES;
        for (uint32_t k = 0; k < b->records; k++) {
            const struct fmt_record *r = &vs->records[(b->record0 + k) % RECORDS];
            int rc = each(vs, w, r, b->record0 + k + 1, data);
            if (rc)
                return rc;
            data += round_block(r->data_length);
        }
    }
    return 0;
}

static int gather(struct volume_set *vs, struct window *w, const struct fmt_record *r, uint64_t order, const uint8_t *data)
{
    if (r->kind == FMT_ZERO || r->kind == FMT_DISCARD)
        return apply_zero(vs, w, r);
    for (uint64_t i = 0; r->kind == FMT_WRITE && i < r->length / BLOCK; i++)
        w->blocks[w->count++] = (struct block){.key = block_key(r->volume, r->offset / BLOCK + i),
                                               .order = order,
                                               .data = data + i * BLOCK};
    return 0;
}

static int forget(struct volume_set *vs, struct window *w, const struct fmt_record *r, uint64_t order, const uint8_t *data)
{
    (void)w;
    (void)data;
    for (uint64_t i = 0; r->kind == FMT_WRITE && i < r->length / BLOCK; i++)
        extmap_drop(vs->map, r->volume, r->offset / BLOCK + i, order);
    return 0;
}

/* What was gathered is on the volumes. Called with the lock. */
static void finish_window(struct volume_set *vs, struct window *w)
{
    for_each_record(vs, w, forget);
    extmap_drop_zeros(vs->map, w->record_end);
    vs->batch_tail = w->batch_end;
    vs->data_tail = w->data_end;
    vs->record_tail = w->record_end;
    vs->apply_failed = false;
    vs->errors[VS_APPLY][0] = '\0';
    vs_take_parked(vs);
    pthread_cond_broadcast(&vs->progress);
}

static int sync_written(struct volume_set *vs, const struct window *w)
{
    for (unsigned v = 0; v < vs->count; v++) {
        bool written = false;
        for (uint64_t i = batch_at(vs, vs->batch_tail)->record0; i < w->record_end && !written; i++)
            written = vs->records[i % RECORDS].volume == v;
        int rc = written ? io_fdatasync("volume.tracked.sync", vs->volumes[v].fd) : 0;
        if (rc) {
            vs_note_error(vs, VS_TRACK, "volume %s: sync failed: %s; what is tracked is written again", vs->volumes[v].name,
                          strerror(-rc));
            return rc;
        }
    }
    return 0;
}

int vs_apply_unjournalled(struct volume_set *vs, struct block *room)
{
    struct window w = {.blocks = room};
    {
        HOLD_LOCK(&vs->lock);
        choose_batch(vs, &w);
    }
    int rc = for_each_record(vs, &w, gather);
    if (rc == 0)
        rc = write_blocks(vs, &w);
    if (rc == 0)
        rc = sync_written(vs, &w);
    HOLD_LOCK(&vs->lock);
    if (rc) {
        vs->apply_failed = true;
        return rc;
    }
    vs->batch_commit++;
    vs->record_commit = w.record_end;
    vs->tracked_batches++;
    finish_window(vs, &w);
    return 0;
}

/* From now on no read is answered from the volumes, if they may have lost anything: where nothing was written since the last sync, none
 * can be lost. */
static void note_loss(struct volume_set *vs, unsigned volume, int rc, uint64_t applied)
{
    {
        HOLD_LOCK(&vs->lock);
        if (!vs->volume_failed && vs->synced_write < applied) {
            vs->volume_failed = true;
            __atomic_add_fetch(&vs->losses, 1, __ATOMIC_SEQ_CST);
            pthread_cond_broadcast(&vs->progress);
        }
    }
    vs_note_error(vs, VS_SYNC, "volume %s: sync failed: %s; %s", vs->volumes[volume].name, strerror(-rc),
                  vs->volume_failed ? "what it may have lost is written again from the journal, reads of it wait"
                                    : "nothing was written since the last one; it is tried again");
}

static int sync_volumes(struct volume_set *vs, uint64_t applied)
{
#ifdef WITHOUT_SYNC /* a test build only: the power cuts of the tests must notice */
    return 0;
#endif
    int failed = 0;
    for (unsigned i = 0; i < vs->count; i++) {
        int rc = io_fdatasync("volume.sync", vs->volumes[i].fd);
        if (rc)
            note_loss(vs, i, rc, applied);
        failed = failed ? failed : rc;
    }
    return failed;
}

/* What a sync lost is on the volumes again, or is not yet. */
static int write_again(struct volume_set *vs, uint64_t applied)
{
    struct err e = {.message = ""};
    int rc = vs_rewrite(vs, applied, &e);
    if (rc)
        vs_note_error(vs, VS_SYNC, "a volume's sync failed, and what it may have lost cannot be written again: %s; it is tried again, and "
                                   "reads of it wait", e.message);
    {
        HOLD_LOCK(&vs->lock);
        vs->rewrite_failed = rc != 0;
        vs->volume_failed = rc != 0;
        pthread_cond_broadcast(&vs->progress);
    }
    if (rc == 0)
        reads_again(vs->reads);
    return rc;
}

/* Volumes synced, or written again, then the mark. */
static void sync_and_mark(struct volume_set *vs)
{
    struct err e = {.message = ""};
    uint64_t applied = vs->applied_write; /* only this thread changes it */
    uint32_t flags;
    bool tracking;
    int rc = 0;
    {
        HOLD_LOCK(&vs->lock);
        flags = vs_mark_flags(vs, false);
        /* What is tracked was synced before it was answered, by a thread that must see it when that fails. */
        tracking = vs->mode == VS_TRACKING;
        vs->syncing = !tracking;
    }
    if (!tracking)
        rc = vs->volume_failed ? write_again(vs, applied) : sync_volumes(vs, applied);
    bool marked = rc == 0 && !vs->volume_failed && jw_set_applied(vs->jw, applied, flags, &e) == 0;
    if (e.message[0])
        vs_note_error(vs, VS_MARK, "%s", e.message);
    HOLD_LOCK(&vs->lock);
    vs->syncing = false;
    if (rc == 0 && !tracking)
        vs->errors[VS_SYNC][0] = '\0';
    vs->last_sync_ns = clock_ns(CLOCK_MONOTONIC);
    vs->mark_failed = !marked && !vs->volume_failed;
    if (marked) {
        vs->errors[VS_MARK][0] = '\0';
        vs->synced_write = applied;
        vs->unsynced_bytes = 0;
        if (vs->sync_wanted <= applied)
            vs->sync_wanted = 0;
    } else if (!vs->volume_failed || vs->rewrite_failed) { /* the first try to write again is at once */
        pthread_cond_broadcast(&vs->progress);
        wait_ns(vs, RETRY_NS);
    }
    pthread_cond_broadcast(&vs->progress);
}

static bool sync_due(struct volume_set *vs)
{
    struct jw_status js;
    jw_get_status(vs->jw, &js);
    HOLD_LOCK(&vs->lock);
    if (vs->volume_failed)
        return true;
    bool behind = vs->synced_write < vs->applied_write;
    bool old = clock_ns(CLOCK_MONOTONIC) - vs->last_sync_ns > SYNC_NS;
    bool wanted = vs->sync_wanted && vs->sync_wanted <= vs->applied_write;
    return js.needs_applied || (behind && (old || vs->unsynced_bytes > SYNC_BYTES)) || wanted;
}

/* Waits until there is a window to apply (true) or time to look at the mark (false). Called with the lock. */
static bool wait_for_work(struct volume_set *vs)
{
    if (vs->batch_tail < vs->batch_commit) {
        uint64_t age = clock_ns(CLOCK_MONOTONIC) - batch_at(vs, vs->batch_tail)->opened_ns;
        bool full = vs->data_head - vs->data_tail > RING_BYTES / 2 || vs->record_head - vs->record_tail > RECORDS / 2 ||
                    vs->batch_commit - vs->batch_tail > BATCHES / 2;
        if (age > (uint64_t)LAG_NS || full || vs->parked_first || vs->sync_wanted || vs->stop_applier || !extmap_zero_room(vs->map))
            return true;
    }
    if (vs->stop_applier || (vs->sync_wanted && vs->sync_wanted <= vs->applied_write))
        return false;
    wait_ns(vs, LAG_NS);
    return false;
}

void *applier_main(void *arg)
{
    struct volume_set *vs = arg;
    struct window w = {.blocks = malloc(WINDOW_BLOCKS * sizeof *w.blocks)};
    if (!w.blocks)
        abort();
    for (;;) {
        pthread_mutex_lock(&vs->lock);
        bool work = !vs->volume_failed && wait_for_work(vs);
        if (work)
            choose_window(vs, &w);
        bool stop = !work && vs->stop_applier;
        pthread_mutex_unlock(&vs->lock);
        if (stop)
            break;
        if (work) {
            int rc = for_each_record(vs, &w, gather);
            if (rc == 0)
                rc = write_blocks(vs, &w);
            if (rc == 0) {
                HOLD_LOCK(&vs->lock);
                vs->applied_write = w.last_write;
                vs->unsynced_bytes += w.bytes;
                finish_window(vs, &w);
            } else {
                HOLD_LOCK(&vs->lock);
                vs->apply_failed = true;
                pthread_cond_broadcast(&vs->progress);
                if (vs->stop_applier)
                    break; /* the journal keeps what could not be applied */
                wait_ns(vs, RETRY_NS);
            }
        }
        if (sync_due(vs))
            sync_and_mark(vs);
    }
    free(w.blocks);
    return NULL;
}
