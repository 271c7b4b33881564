/* Notes on the design.
 *
 *   reader (the door's one thread)      committer                       applier (apply.c)
 *   number, copy header and data        batch: jw_append (durable)      each block once to the volumes,
 *   into the open batch                 answer every write in it        then sync, then the applied mark
 *
 * Journal before data: the applier only sees batches behind batch_commit, that is, durable ones. A write is answered by
 * the committer after jw_append, nowhere else. One total order: numbers are given under the lock in the order of arrival;
 * what was answered before another was sent has left the reader before it, so it has the lower number.
 *
 * When a write does not fit (ring full, journal stalled), it is parked, and all later ones behind it, so that the reader
 * goes on and reads are still answered; when the parking space is full, the reader waits.
 *
 * What becomes of writes when the journal cannot grow: tracking.c; of what a volume's failed sync lost: rewrite.c. Reads are
 * answered in reads.c.
 */
#include "volume.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "io.h"
#include "log.h"
#include "reads.h"
#include "tracking.h"
#include "util.h"
#include "volume_set.h"

void vs_note_error(struct volume_set *vs, enum vs_trouble what, const char *format, ...)
{
    char message[sizeof vs->errors[0]];
    va_list args;
    HOLD_LOCK(&vs->lock);
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (strcmp(message, vs->errors[what]) != 0) /* it is tried each second */
        log_error("%s", message);
    memcpy(vs->errors[what], message, sizeof message);
}

/* ---- taking writes (under the lock) ---- */

bool vs_take(struct volume_set *vs, struct fmt_record *r, const void *data, void *cookie)
{
    uint64_t need = round_block(r->data_length);
    struct batch *b = batch_at(vs, vs->batch_open);
    uint64_t data_at = vs->data_head, record_at = vs->record_head, open = vs->batch_open;
    bool wraps = data_at % RING_BYTES + need > RING_BYTES;
    bool at_start = data_at % RING_BYTES == 0 && b->data_length; /* it ended exactly at the ring's end */
    bool full = b->records && (b->records >= MAX_BATCH_RECORDS || b->data_length + need > MAX_BATCH_BYTES ||
                               record_at % RECORDS == 0 || wraps || at_start);
    if (full)
        open++;
    if (wraps)
        data_at += RING_BYTES - data_at % RING_BYTES;
    bool zero = r->kind == FMT_ZERO || r->kind == FMT_DISCARD;
    if (data_at + need - vs->data_tail > RING_BYTES || record_at + 1 - vs->record_tail > RECORDS ||
        open + 1 - vs->batch_tail >= BATCHES || (zero && !extmap_zero_room(vs->map)))
        return false;
    if (full || b->records == 0) {
        vs->batch_open = open;
        b = batch_at(vs, open);
        *b = (struct batch){.record0 = record_at, .data0 = data_at, .opened_ns = clock_ns(CLOCK_MONOTONIC)};
    }
    uint8_t *to = vs->ring + data_at % RING_BYTES;
    uint64_t order = record_at + 1; /* write numbers are given when it is known that it comes to the journal */
    r->wall_ns = clock_ns(CLOCK_REALTIME);
    r->boot_ns = clock_ns(CLOCK_BOOTTIME);
    if (need) {
        memcpy(to, data, r->data_length);
        memset(to + r->data_length, 0, need - r->data_length);
    }
    if (r->kind == FMT_WRITE)
        for (uint64_t i = 0; i < r->length; i += BLOCK)
            extmap_put(vs->map, r->volume, (r->offset + i) / BLOCK, to + i, order);
    else if (zero)
        extmap_put_zeros(vs->map, r->volume, r->offset / BLOCK, r->length / BLOCK, order);
    if (vs->mode == VS_HEALING)
        tracking_taken(vs, r);
    vs->records[record_at % RECORDS] = *r;
    vs->cookies[record_at % RECORDS] = cookie;
    b->records++;
    b->data_length += need;
    vs->data_head = data_at + need;
    vs->record_head = record_at + 1;
    vs->writes++;
    vs->bytes_written += r->length;
    return true;
}

void vs_take_parked(struct volume_set *vs)
{
    bool any = false;
    while (vs->parked_first) {
        struct parked *p = vs->parked_first;
        if (!vs_take(vs, &p->record, p->data, p->cookie))
            break;
        vs->parked_first = p->next;
        if (!p->next)
            vs->parked_last = &vs->parked_first;
        vs->parked_bytes -= p->record.data_length;
        free(p);
        any = true;
    }
    if (any) {
        pthread_cond_signal(&vs->to_commit);
        pthread_cond_broadcast(&vs->progress);
    }
}

static void submit(struct volume_set *vs, struct fmt_record *r, const void *data, void *cookie)
{
    HOLD_LOCK(&vs->lock);
    for (;;) {
        if (!vs->parked_first && vs_take(vs, r, data, cookie)) {
            pthread_cond_signal(&vs->to_commit);
            return;
        }
        pthread_cond_signal(&vs->to_apply);
        if (vs->parked_bytes + r->data_length <= PARKED_BYTES)
            break;
        pthread_cond_wait(&vs->progress, &vs->lock);
    }
    struct parked *p = malloc(sizeof *p + r->data_length);
    if (!p) { /* nothing was taken, nothing is promised */
        vs->done.write(cookie, 0, -ENOMEM);
        return;
    }
    *p = (struct parked){.record = *r, .cookie = cookie};
    if (r->data_length)
        memcpy(p->data, data, r->data_length);
    *vs->parked_last = p;
    vs->parked_last = &p->next;
    vs->parked_bytes += r->data_length;
}

static void set_write(void *self, unsigned volume, uint64_t offset, const void *data, size_t length, void *cookie)
{
    struct fmt_record r = {.kind = FMT_WRITE,
                           .volume = (uint16_t)volume,
                           .data_length = (uint32_t)length,
                           .offset = offset,
                           .length = length};
    submit(self, &r, data, cookie);
}

static void set_zero(void *self, unsigned volume, uint64_t offset, uint64_t length, bool discard, void *cookie)
{
    struct fmt_record r = {
        .kind = discard ? FMT_DISCARD : FMT_ZERO, .volume = (uint16_t)volume, .offset = offset, .length = length};
    submit(self, &r, NULL, cookie);
}

/* ---- committing ---- */

struct committer {
    uint8_t *header; /* room for the largest batch header */
    struct block *blocks; /* for tracking: room for the blocks of a batch */
    void *cookies[MAX_BATCH_RECORDS];
    size_t lengths[MAX_BATCH_RECORDS];
};

/* Closes the next batch and copies its header; false when the committer shall end. */
static bool next_batch(struct volume_set *vs, struct committer *c, struct batch *out)
{
    bool waited = false; /* a second, for the end of a gap that could not be written */
    HOLD_LOCK(&vs->lock);
    while (batch_at(vs, vs->batch_commit)->records == 0 || vs->batch_commit > vs->batch_open) {
        if (vs->heal_wanted || waited) {
            pthread_mutex_unlock(&vs->lock);
            if (waited)
                tracking_journalled(vs, NULL, 0);
            else
                tracking_heal(vs);
            pthread_mutex_lock(&vs->lock);
            waited = false;
            continue;
        }
        if (vs->stop_committer)
            return false;
        waited = vs->ended;
        if (waited)
            tracking_wait(vs);
        else
            pthread_cond_wait(&vs->to_commit, &vs->lock);
    }
    if (vs->batch_commit == vs->batch_open) {
        vs->batch_open++;
        *batch_at(vs, vs->batch_open) = (struct batch){.records = 0};
    }
    *out = *batch_at(vs, vs->batch_commit);
    memset(c->header, 0, fmt_batch_header(out->records));
    struct fmt_record *records = (struct fmt_record *)(c->header + sizeof(struct fmt_batch));
    uint64_t at = out->record0 % RECORDS;
    memcpy(records, vs->records + at, out->records * sizeof *records);
    memcpy(c->cookies, vs->cookies + at, out->records * sizeof *c->cookies);
    for (uint32_t i = 0; i < out->records; i++)
        c->lengths[i] = records[i].length;
    return true;
}

static void set_stalled(struct volume_set *vs, bool stalled)
{
    struct jw_status j;
    jw_get_status(vs->jw, &j);
    HOLD_LOCK(&vs->lock);
    if (vs->stalled != stalled && stalled)
        log_warn("%s: writes wait", j.preparing ? "the next segment of the journal is not ready yet" : "the journal is full");
    else if (vs->stalled != stalled)
        log_warn("%s", vs->mode == VS_TRACKING ? "writes go on" : "the journal has space again: writes go on");
    vs->stalled = stalled;
    pthread_cond_broadcast(&vs->progress);
}

/* The records get the numbers that they have in the journal. */
static void number(struct volume_set *vs, struct committer *c, const struct batch *b)
{
    struct fmt_record *records = (struct fmt_record *)(c->header + sizeof(struct fmt_batch));
    HOLD_LOCK(&vs->lock);
    for (uint32_t i = 0; i < b->records; i++)
        records[i].number = vs->records[(b->record0 + i) % RECORDS].number = vs->durable_write + 1 + i;
}

/* Once: 0 when the batch is durable in the journal, or on the volumes and noted (`tracked`); else it is tried again. */
static int commit_once(struct volume_set *vs, struct committer *c, const struct batch *b, bool *tracked)
{
    bool heal;
    {
        HOLD_LOCK(&vs->lock);
        heal = vs->heal_wanted;
    }
    if (heal)
        tracking_heal(vs);
    const struct fmt_record *records = (const struct fmt_record *)(c->header + sizeof(struct fmt_batch));
    *tracked = vs->mode == VS_TRACKING; /* only this thread changes it */
    if (*tracked)
        return tracking_commit(vs, records, b->records, c->blocks);
    number(vs, c, b);
    return jw_append(vs->jw, c->header, b->records, vs->ring + b->data0 % RING_BYTES, b->data_length);
}

/* Waits until it can be tried again, or changes are tracked from now on. False when nobody waits for an answer any more. */
static bool wait_to_commit(struct volume_set *vs, const struct batch *b, uint64_t *since)
{
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (*since == 0)
        *since = now;
    else
        set_stalled(vs, true); /* not at the first try: the next segment is often just being made ready */
    if (vs->mode == VS_TRACKING) {
        HOLD_LOCK(&vs->lock);
        if (!vs->stop_committer)
            tracking_wait(vs);
    } else if (now - *since < TRACK_AFTER_NS || tracking_begin(vs, vs->records[b->record0 % RECORDS].wall_ns) != 0) {
        jw_wait_space(vs->jw);
    }
    HOLD_LOCK(&vs->lock);
    pthread_cond_signal(&vs->to_apply);
    return !vs->stop_committer;
}

static void *committer_main(void *arg)
{
    struct volume_set *vs = arg;
    struct committer c = {.header = io_alloc(fmt_batch_header(MAX_BATCH_RECORDS)),
                          .blocks = vs->tracked ? calloc(VS_BATCH_BLOCKS, sizeof *c.blocks) : NULL};
    struct batch b;
    if (!c.header || (vs->tracked && !c.blocks))
        abort();
    while (next_batch(vs, &c, &b)) {
        uint64_t since = 0;
        bool tracked = false, given_up = false;
        while (!given_up && commit_once(vs, &c, &b, &tracked) != 0)
            given_up = !wait_to_commit(vs, &b, &since);
        if (given_up)
            break;
        if (since)
            set_stalled(vs, false);
        const struct fmt_record *records = (const struct fmt_record *)(c.header + sizeof(struct fmt_batch));
        if (tracked) {
            HOLD_LOCK(&vs->lock);
            tracking_marks(vs, records, b.records, NULL);
        } else {
            HOLD_LOCK(&vs->lock);
            tracking_marks(vs, records, b.records, vs->ring + b.data0 % RING_BYTES);
            vs->durable_write = records[b.records - 1].number;
            vs->batch_commit++;
            vs->record_commit += b.records;
            uint64_t waiting = vs->data_head - vs->data_tail;
            if (vs->batch_commit - vs->batch_tail == 1 || waiting > RING_BYTES / 2 || vs->sync_wanted || vs->parked_first)
                pthread_cond_signal(&vs->to_apply);
            if (vs->sync_wanted || vs->parked_first)
                pthread_cond_broadcast(&vs->progress);
        }
        for (uint32_t i = 0; i < b.records; i++)
            if (c.cookies[i])
                vs->done.write(c.cookies[i], c.lengths[i], 0);
        if (!tracked && vs->mode == VS_HEALING)
            tracking_journalled(vs, records, b.records);
        pthread_cond_broadcast(&vs->progress);
    }
    free(c.blocks);
    io_free(c.header, fmt_batch_header(MAX_BATCH_RECORDS));
    return NULL;
}

/* ---- control ---- */

/* A journal that is full may be so for long, a volume that fails too, and who waits here holds a connection: they are
 * told at once. */
static bool writes_wait(const struct volume_set *vs)
{
    return vs->stalled || ((vs->apply_failed || vs->rewrite_failed) && vs->parked_first);
}

static int why_not_to_wait(const struct volume_set *vs)
{
    if (vs->mode == VS_TRACKING)
        return VS_IN_GAP;
    if (writes_wait(vs))
        return -EAGAIN;
    return vs->stop_committer ? -ECANCELED : 0;
}

/* Until everything before place `record` is durable in the journal. */
static int wait_durable(struct volume_set *vs, uint64_t record, uint64_t tracked_batches)
{
    while (vs->record_commit < record) {
        int rc = why_not_to_wait(vs);
        if (rc)
            return rc;
        pthread_cond_wait(&vs->progress, &vs->lock);
    }
    return vs->tracked_batches == tracked_batches ? 0 : VS_IN_GAP;
}

int vs_mark(struct volume_set *vs, const char *name, uint8_t flags, uint64_t *write)
{
    struct fmt_record r = {.kind = FMT_MARK, .flags = flags, .volume = FMT_NO_VOLUME, .data_length = (uint32_t)strlen(name)};
    HOLD_LOCK(&vs->lock);
    while (vs->mode != VS_CAPTURING || vs->parked_first || !vs_take(vs, &r, name, NULL)) {
        int rc = vs->mode == VS_HEALING ? VS_IN_GAP : why_not_to_wait(vs);
        if (rc)
            return rc;
        pthread_cond_wait(&vs->progress, &vs->lock);
    }
    vs->begin_taken = vs->begin_taken || flags == FMT_REWIND_BEGIN || flags == FMT_GAP_BEGIN;
    *write = vs_last_write(vs);
    pthread_cond_signal(&vs->to_commit);
    return wait_durable(vs, vs->record_head, vs->tracked_batches);
}

int vs_cut(struct volume_set *vs, uint64_t *durable_write)
{
    HOLD_LOCK(&vs->lock);
    int rc = vs->mode == VS_TRACKING ? VS_IN_GAP : wait_durable(vs, vs->record_head, vs->tracked_batches);
    *durable_write = vs->durable_write;
    return rc;
}

int vs_sync(struct volume_set *vs, uint64_t *applied_write, struct err *e)
{
    HOLD_LOCK(&vs->lock);
    uint64_t wanted = vs->durable_write;
    vs->sync_wanted = max_u64(vs->sync_wanted, wanted);
    pthread_cond_signal(&vs->to_apply);
    while ((vs->synced_write < wanted || vs->volume_failed) && !vs->rewrite_failed && !vs->apply_failed && !vs->mark_failed &&
           !vs->stop_applier)
        pthread_cond_wait(&vs->progress, &vs->lock);
    *applied_write = vs->synced_write;
    if (vs->synced_write >= wanted && !vs->volume_failed)
        return 0;
    for (int i = 0; i < VS_TROUBLES; i++)
        if (vs->errors[i][0])
            return err_set(e, -EIO, "%s", vs->errors[i]);
    return err_set(e, -EIO, "stopping");
}

void vs_wake(struct volume_set *vs)
{
    HOLD_LOCK(&vs->lock);
    pthread_cond_signal(&vs->to_apply);
}

void vs_get_status(struct volume_set *vs, struct volume_status *out)
{
    HOLD_LOCK(&vs->lock);
    *out = (struct volume_status){
        .stalled = writes_wait(vs) || vs->rewrite_failed, /* reads of the volumes wait as well */
        .last_write = vs_last_write(vs),
        .applied_write = vs->applied_write,
        .unapplied_bytes = vs->data_head - vs->data_tail,
        .parked_bytes = vs->parked_bytes,
        .writes = vs->writes,
        .reads = vs->reads_taken,
        .bytes_written = vs->bytes_written,
        .bytes_read = vs->bytes_read,
    };
    memcpy(out->errors, vs->errors, sizeof out->errors);
    tracking_status(vs, out);
}

/* ---- life ---- */

static const char *set_name(void *self, unsigned volume) { return ((struct volume_set *)self)->volumes[volume].name; }
static uint64_t set_size(void *self, unsigned volume) { return volume_size(&((struct volume_set *)self)->volumes[volume]); }
static void set_read(void *self, unsigned volume, uint64_t offset, size_t length, void *cookie)
{
    reads_take(((struct volume_set *)self)->reads, volume, offset, length, cookie);
}
static void set_done(void *self, const struct done *done) { ((struct volume_set *)self)->done = *done; }

struct backend vs_backend(struct volume_set *vs)
{
    return (struct backend){.self = vs,
                            .volumes = vs->count,
                            .name = set_name,
                            .size = set_size,
                            .read = set_read,
                            .write = set_write,
                            .zero = set_zero,
                            .set_done = set_done};
}

void vs_free(struct volume_set *vs)
{
    if (!vs)
        return;
    for (unsigned i = 0; i < vs->count; i++)
        if (vs->volumes[i].fd >= 0)
            close(vs->volumes[i].fd);
    tracked_close(vs->tracked);
    io_free(vs->ring, RING_BYTES);
    free(vs->records);
    free(vs->cookies);
    free(vs->batches);
    extmap_free(vs->map);
    while (vs->parked_first) {
        struct parked *p = vs->parked_first;
        vs->parked_first = p->next;
        free(p);
    }
    free(vs);
}

static int start_threads(struct volume_set *vs)
{
    int rc = pthread_create(&vs->committer, NULL, committer_main, vs);
    if (rc == 0 && ++vs->threads)
        rc = pthread_create(&vs->applier, NULL, applier_main, vs);
    if (rc == 0 && ++vs->threads)
        rc = -reads_start(&vs->reads, vs);
    if (rc == 0 && vs->tracked && (rc = pthread_create(&vs->copier, NULL, copier_main, vs)) == 0)
        vs->copies = true;
    return -rc;
}

int vs_start(struct volume_set **out, struct volume *volumes, unsigned count, struct jw *jw, const struct vs_found *found, bool track,
             struct err *e)
{
    struct volume_set *vs = calloc(1, sizeof *vs);
    if (!vs) {
        tracked_close(found->tracked);
        return err_sys(e, -ENOMEM, "volume set");
    }
    vs->tracked = found->tracked;
    vs->inside = found->inside;
    vs->track = track;
    vs->journal = found->journal;
    vs->set_id = found->set_id;
    vs->volumes = volumes;
    vs->count = count;
    vs->jw = jw;
    vs->durable_write = vs->applied_write = vs->synced_write = found->last_write;
    vs->parked_last = &vs->parked_first;
    vs->last_sync_ns = clock_ns(CLOCK_MONOTONIC);
    pthread_mutex_init(&vs->lock, NULL);
    pthread_cond_init(&vs->to_commit, NULL);
    cond_init_monotonic(&vs->to_apply);
    pthread_cond_init(&vs->progress, NULL);
    vs->ring = io_alloc(RING_BYTES);
    vs->records = calloc(RECORDS, sizeof *vs->records);
    vs->cookies = calloc(RECORDS, sizeof *vs->cookies);
    vs->batches = calloc(BATCHES, sizeof *vs->batches);
    vs->map = extmap_new(RING_BYTES / BLOCK);
    if (!vs->ring || !vs->records || !vs->cookies || !vs->batches || !vs->map) {
        vs_free(vs);
        return err_sys(e, -ENOMEM, "volume set");
    }
    int rc = vs->tracked ? tracking_resume(vs, e) : 0;
    if (rc == 0 && (rc = start_threads(vs)) != 0)
        err_sys(e, rc, "cannot start the threads of a volume set");
    if (rc) {
        vs_stop(vs, NULL);
        vs_free(vs);
        return rc;
    }
    *out = vs;
    return 0;
}

static void stop_thread(struct volume_set *vs, bool *flag, pthread_cond_t *cond, pthread_t thread)
{
    pthread_mutex_lock(&vs->lock);
    *flag = true;
    pthread_cond_broadcast(cond);
    pthread_cond_broadcast(&vs->progress);
    pthread_mutex_unlock(&vs->lock);
    pthread_join(thread, NULL);
}

int vs_stop(struct volume_set *vs, struct err *e)
{
    int rc = 0;
    if (vs->threads > 1) { /* what waits for room gets it, as long as there is any to be had */
        HOLD_LOCK(&vs->lock);
        while (vs->parked_first && !writes_wait(vs)) {
            pthread_cond_signal(&vs->to_apply);
            pthread_cond_wait(&vs->progress, &vs->lock);
        }
    }
    if (vs->copies)
        stop_thread(vs, &vs->stop_copier, &vs->progress, vs->copier);
    if (vs->threads > 0)
        stop_thread(vs, &vs->stop_committer, &vs->to_commit, vs->committer);
    if (vs->threads > 1) {
        uint64_t applied;
        rc = vs_sync(vs, &applied, e);
        stop_thread(vs, &vs->stop_applier, &vs->to_apply, vs->applier);
    }
    reads_stop(vs->reads);
    vs->reads = NULL;
    if (rc == 0 && vs->threads > 1)
        rc = jw_set_applied(vs->jw, vs->synced_write, vs_mark_flags(vs, vs->synced_write == vs->durable_write), e);
    return rc;
}

