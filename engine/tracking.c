/* Notes on the design (truth 8; docs/decisions/2026-11-27-track.md).
 *
 * When a batch has waited for room in the journal for TRACK_AFTER_NS, this is done, each step durable before the next:
 *
 *   1. what the journal holds is on the volumes and synced; the applied mark says so     (so nothing is ever replayed over what follows)
 *   2. the bitmap says: tracking, behind write W, the journal's last; and so does, here and below, the applied mark, in front of it:
 *      should the bitmap be lost, then not this
 *   3. of each batch: its blocks are marked in the bitmap (synced unless all were), then it is written to the volumes, these are
 *      synced, its writes are answered
 *
 * A kill at any place leaves W in the mark, and the bits of all blocks that may have been written since. A batch of which the journal
 * could not say whether it is durable may lie behind W: the bitmap's state says that it does not count (capture.c).
 *
 * Back, when there is room:
 *
 *   4. the bitmap says: healing, behind W, with a time; the journal gets the begin record of a gap, with that time
 *   5. writes go to the journal again; the hot copy (hot_copy.c) puts each marked block there as well. A block that is written
 *      meanwhile needs no copy. A bit is cleared when the record that has the block is durable
 *   6. no block is left: the end record; then the bitmap is flushed and says: idle
 *
 * When the journal is full again before 6, it goes back to 1, with the bits that are left: the gap goes on. After a restart the bitmap
 * says tracking again, behind the journal's last write then, and 4 follows with another begin record.
 *
 * Nothing is tracked between begin and end of a rewind in place, or of a gap that `up --heal` takes in: Postgres does not run then, and their
 * end record needs the journal.
 */
#include "tracking.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cleanup.h"
#include "io.h"
#include "log.h"
#include "util.h"

#define RETRY_NS 1000000000u
#define FLUSH_NS ((uint64_t)5000000000)

size_t tracking_name(const struct volume_set *vs, char out[48])
{
    return (size_t)snprintf(out, 48, FMT_UNTRACKED "%" PRIu64, tracked_state(vs->tracked).since_ns);
}

static bool changes(const struct fmt_record *r)
{
    return r->kind == FMT_WRITE || r->kind == FMT_ZERO || r->kind == FMT_DISCARD;
}

/* What applied mark and bitmap say, durably; else either may be there, and what fails is noted. */
static int set_state(struct volume_set *vs, enum fmt_tracked_state state, uint64_t since_ns, uint64_t begin_ns)
{
    struct fmt_tracking to = {.state = state,
                              .since_ns = since_ns,
                              .behind = state == FMT_TRACKED_IDLE ? 0 : vs->durable_write,
                              .begin_ns = begin_ns};
    struct err e = {.message = ""};
    if (state != FMT_TRACKED_IDLE) /* also when it cannot be written: the next try has to know since when */
        tracked_take_state(vs->tracked, &to);
    int rc = jw_set_tracking(vs->jw, &to, &e);
    if (rc)
        vs_note_error(vs, VS_TRACK, "journal: %s", e.message);
    else if ((rc = tracked_set_state(vs->tracked, &to)) != 0)
        vs_note_error(vs, VS_TRACK, "journal: the bitmap of changed blocks cannot be written: %s", strerror(-rc));
    vs->state_told = rc == 0;
    return rc;
}

static void set_mode(struct volume_set *vs, enum vs_mode mode)
{
    vs->mode = mode;
    vs->end_taken = vs->ended = false;
    vs->errors[VS_TRACK][0] = '\0';
    pthread_cond_broadcast(&vs->progress);
}

/* ---- forth ---- */

/* The bitmap is the caller's when it returns true. */
static bool may_begin(struct volume_set *vs)
{
    HOLD_LOCK(&vs->lock);
    bool may = vs->tracked && vs->track && !vs->inside && !vs->begin_taken && !vs->bitmap_busy;
    vs->bitmap_busy = vs->bitmap_busy || may;
    return may;
}

static int begin(struct volume_set *vs, uint64_t since_ns)
{
    struct err e = {.message = ""};
    uint64_t applied;
    int rc = vs_sync(vs, &applied, &e);
    if (rc)
        return rc;
    /* From the attempt on the file may say it, whatever becomes of it: nothing may go to the journal before heal() has written otherwise.
     * tracking_commit writes it again before anything else. */
    set_state(vs, FMT_TRACKED_TRACKING, vs->mode == VS_HEALING && !vs->ended ? tracked_state(vs->tracked).since_ns : since_ns, 0);
    return 0;
}

int tracking_begin(struct volume_set *vs, uint64_t since_ns)
{
    if (!may_begin(vs))
        return -EAGAIN;
    int rc = begin(vs, since_ns);
    HOLD_LOCK(&vs->lock);
    vs->bitmap_busy = false;
    if (rc)
        return rc;
    log_warn("the journal cannot grow: changes are tracked behind write %lu, and no point from there on can be restored until they "
             "are in the journal",
             vs->durable_write);
    set_mode(vs, VS_TRACKING);
    while (vs->syncing) /* of a write that fails once it is told to one thread alone, which must be this one from now on */
        pthread_cond_wait(&vs->progress, &vs->lock);
    return 0;
}

static int note_bits(struct volume_set *vs)
{
    int rc = tracked_flush(vs->tracked);
    if (rc)
        vs_note_error(vs, VS_TRACK, "journal: the bitmap of changed blocks cannot be written: %s", strerror(-rc));
    return rc;
}

int tracking_commit(struct volume_set *vs, const struct fmt_record *records, uint32_t count, struct block *room)
{
    struct fmt_tracking state = tracked_state(vs->tracked);
    if (state.state != FMT_TRACKED_TRACKING || !vs->state_told) { /* a try to heal that failed */
        int rc = set_state(vs, FMT_TRACKED_TRACKING, state.since_ns, 0);
        if (rc)
            return rc;
    }
    {
        HOLD_LOCK(&vs->lock);
        for (uint32_t i = 0; i < count; i++)
            if (changes(&records[i])) {
                tracked_mark(vs->tracked, records[i].volume, records[i].offset / BLOCK, records[i].length / BLOCK);
                tracked_add_todo(vs->tracked, records[i].volume, records[i].offset / BLOCK, records[i].length / BLOCK);
            }
    }
#ifdef WITHOUT_SYNC /* a test build only: bits come behind their blocks, which the power cuts of the tests must notice */
    int late = vs_apply_unjournalled(vs, room);
    return late ? late : note_bits(vs);
#endif
    int rc = note_bits(vs);
    if (rc == 0)
        rc = vs_apply_unjournalled(vs, room);
    if (rc == 0) {
        HOLD_LOCK(&vs->lock);
        vs->errors[VS_TRACK][0] = '\0';
    }
    return rc;
}

void tracking_wait(struct volume_set *vs)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* as to_commit was made */
    until.tv_sec += 1;
    pthread_cond_timedwait(&vs->to_commit, &vs->lock, &until);
}

/* ---- back ---- */

static int append_begin(struct volume_set *vs, uint64_t begin_ns, uint64_t boot_ns)
{
    uint8_t *memory = io_alloc(2 * BLOCK);
    if (!memory)
        return -ENOMEM;
    char name[48];
    size_t length = tracking_name(vs, name);
    struct fmt_record *r = (struct fmt_record *)(memory + sizeof(struct fmt_batch));
    *r = (struct fmt_record){.kind = FMT_MARK,
                             .flags = FMT_GAP_BEGIN,
                             .volume = FMT_NO_VOLUME,
                             .data_length = (uint32_t)length,
                             .number = vs->durable_write + 1,
                             .wall_ns = begin_ns,
                             .boot_ns = boot_ns};
    memcpy(memory + BLOCK, name, length);
    int rc = jw_append(vs->jw, memory, 1, memory + BLOCK, BLOCK);
    io_free(memory, 2 * BLOCK);
    return rc;
}

/* The journal goes on; what was taken and is not committed yet goes there, and needs no copy. Called with the lock. */
static void go_back(struct volume_set *vs)
{
    vs->durable_write++;
    vs->applied_write = vs->durable_write; /* a mark changes nothing on any volume */
    vs->tracked_batches++; /* what was taken before lies in the gap: a mark there, and what the copier has read */
    set_mode(vs, VS_HEALING);
    for (uint64_t i = vs->record_commit; i < vs->record_head; i++)
        tracking_taken(vs, &vs->records[i % RECORDS]);
}

/* An end record from before the journal was full again must not come behind the next begin record. */
static bool end_is_pending(struct volume_set *vs)
{
    HOLD_LOCK(&vs->lock);
    for (uint64_t i = vs->record_commit; i < vs->record_head; i++) {
        const struct fmt_record *r = &vs->records[i % RECORDS];
        if (r->kind == FMT_MARK && r->flags == FMT_GAP_END)
            return true;
    }
    return false;
}

static int heal(struct volume_set *vs, char why[400])
{
    struct jw_status j;
    if (vs->mode != VS_TRACKING)
        return 0;
    jw_get_status(vs->jw, &j);
    if (!j.ready || j.bytes > j.limit / 2) {
        snprintf(why, 400, "the journal has %lu of %lu bytes in use%s%s", j.bytes, j.limit, j.error[0] ? ": " : ", and no room", j.error);
        return -EAGAIN;
    }
    if (end_is_pending(vs)) {
        snprintf(why, 400, "writes of before wait still");
        return -EAGAIN;
    }
    /* Of one moment: a disk that is slow between the two would look like a clock that was set. */
    uint64_t now = clock_ns(CLOCK_REALTIME), boot = clock_ns(CLOCK_BOOTTIME);
    int rc = set_state(vs, FMT_TRACKED_HEALING, tracked_state(vs->tracked).since_ns, now);
    if (rc == 0)
        rc = append_begin(vs, now, boot);
    if (rc) {
        snprintf(why, 400, "the journal cannot take writes: %s", strerror(-rc));
        return -EAGAIN;
    }
    log_info("%lu changed blocks are brought into the journal behind write %lu", tracked_todo(vs->tracked), vs->durable_write);
    HOLD_LOCK(&vs->lock);
    go_back(vs);
    return 0;
}

void tracking_heal(struct volume_set *vs)
{
    char why[400] = "";
    heal(vs, why);
    HOLD_LOCK(&vs->lock);
    vs->heal_wanted = false;
    memcpy(vs->not_healed, why, sizeof why);
    pthread_cond_broadcast(&vs->progress);
}

void tracking_taken(struct volume_set *vs, const struct fmt_record *r)
{
    if (changes(r))
        tracked_drop_todo(vs->tracked, r->volume, r->offset / BLOCK, r->length / BLOCK);
}

/* The end record is durable: nothing is lacking any more. While the bitmap cannot be written, again behind the next batch, or in a second
 * when none comes: a start would take it for a gap. */
static void end(struct volume_set *vs)
{
    if (note_bits(vs) || set_state(vs, FMT_TRACKED_IDLE, 0, 0))
        return;
    log_info("the gap has ended with write %lu: the journal has what was tracked", vs->durable_write);
    HOLD_LOCK(&vs->lock);
    set_mode(vs, VS_CAPTURING);
}

void tracking_journalled(struct volume_set *vs, const struct fmt_record *records, uint32_t count)
{
    static uint64_t flushed_ns; /* of the committer alone */
    bool ended = vs->ended; /* only this thread changes it */
    for (uint32_t i = 0; i < count; i++) {
        if (changes(&records[i]))
            tracked_unmark(vs->tracked, records[i].volume, records[i].offset / BLOCK, records[i].length / BLOCK);
        ended = ended || (records[i].kind == FMT_MARK && records[i].flags == FMT_GAP_END);
    }
    vs->ended = ended;
    if (ended) {
        end(vs);
    } else if (clock_ns(CLOCK_MONOTONIC) - flushed_ns > FLUSH_NS) { /* so that a restart need not copy all of it again */
        note_bits(vs);
        flushed_ns = clock_ns(CLOCK_MONOTONIC);
    }
}

void tracking_marks(struct volume_set *vs, const struct fmt_record *records, uint32_t count, const uint8_t *data)
{
    for (uint32_t i = 0; i < count; i++) {
        const struct fmt_record *r = &records[i];
        if (data) {
            vs->inside = fmt_inside(vs->inside, r, data);
            data += round_block(r->data_length);
        }
        if (r->kind == FMT_MARK && (r->flags == FMT_REWIND_BEGIN || r->flags == FMT_GAP_BEGIN))
            vs->begin_taken = false;
    }
}

/* ---- asked for ---- */

int vs_heal(struct volume_set *vs, struct err *e)
{
    HOLD_LOCK(&vs->lock);
    if (vs->mode == VS_CAPTURING)
        return err_set(e, ERR_PRECONDITION, "heal: no changes are tracked");
    vs->heal_wanted = true;
    pthread_cond_signal(&vs->to_commit);
    while (vs->heal_wanted && !vs->stop_committer)
        pthread_cond_wait(&vs->progress, &vs->lock);
    if (vs->mode != VS_TRACKING)
        return 0;
    return err_set(e, -EAGAIN, "heal: %s", vs->not_healed[0] ? vs->not_healed : "stopping");
}

int vs_grow(struct volume_set *vs, unsigned volume, uint64_t bytes, struct err *e)
{
    struct tracked *larger = NULL, *old;
    {
        HOLD_LOCK(&vs->lock);
        if (!vs->tracked)
            return 0;
        if (vs->mode != VS_CAPTURING || vs->bitmap_busy) {
            err_set(e, VS_IN_GAP, "grow: changes are tracked, their bitmap cannot be made larger now");
            err_hint(e, "pgcdp status tells when the set has healed; then run this again");
            return VS_IN_GAP;
        }
        vs->bitmap_busy = true;
    }
    int rc = tracked_grown(&larger, vs->tracked, volume, bytes, e);
    HOLD_LOCK(&vs->lock);
    vs->bitmap_busy = false;
    if (rc)
        return rc;
    old = vs->tracked;
    vs->tracked = larger;
    tracked_close(old);
    return 0;
}

void tracking_status(struct volume_set *vs, struct volume_status *out)
{
    out->tracks = vs->tracked && vs->track;
    if (!vs->tracked || vs->mode == VS_CAPTURING)
        return;
    out->tracking = true;
    out->healing = vs->mode == VS_HEALING;
    out->tracked_blocks = tracked_marked(vs->tracked);
    out->tracked_behind = tracked_state(vs->tracked).behind;
    out->tracked_since_ns = tracked_state(vs->tracked).since_ns;
}

int tracking_resume(struct volume_set *vs, struct err *e)
{
    struct fmt_tracking state = tracked_state(vs->tracked);
    if (state.state == FMT_TRACKED_IDLE)
        return 0;
    bool healing = state.state == FMT_TRACKED_HEALING;
    int rc = set_state(vs, FMT_TRACKED_TRACKING, state.since_ns, 0);
    if (rc)
        return err_sys(e, rc, "cannot write the journal's bitmap of changed blocks");
    log_warn("%lu blocks were changed while the journal could not grow: it goes on %s", tracked_marked(vs->tracked),
             healing ? "with bringing them into the journal" : "tracking changes");
    vs->mode = VS_TRACKING;
    vs->heal_wanted = healing;
    return 0;
}
