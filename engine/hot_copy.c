/* The hot copy: marked blocks come into the journal while writes go on.
 *
 * While the set heals, a volume changes by journalled writes alone, and each of them takes its blocks off what is to do when it
 * is taken, under the lock. So a block that is still to do after it was read has on the volume what was read, and no
 * write to it lies between the reading and the record that is taken now. It needs no wait for anybody.
 *
 * It gives way: while the ring is filled or writes are parked it waits, and while the journal is nearly full, so that what Postgres
 * writes has the rest of it.
 */
#include <string.h>

#include "cleanup.h"
#include "io.h"
#include "tracking.h"
#include "util.h"

#define COPY_BYTES BACKEND_MAX_REQUEST
#define PAUSE_NS 10000000

/* Called with the lock. */
static void pause_a_little(struct volume_set *vs)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* as progress was made */
    until.tv_nsec += PAUSE_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&vs->progress, &vs->lock, &until);
}

static bool all_zeros(const uint8_t *data, size_t length)
{
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

static bool has_room(struct volume_set *vs)
{
    struct jw_status j;
    jw_get_status(vs->jw, &j);
    return j.bytes <= j.limit / 4 * 3;
}

/* The gap's end record, once nothing is to do. Called with the lock. */
static void take_end(struct volume_set *vs)
{
    char name[48];
    struct fmt_record r = {.kind = FMT_MARK, .flags = FMT_GAP_END, .volume = FMT_NO_VOLUME};
    r.data_length = (uint32_t)tracking_name(vs, name);
    if (!vs->end_taken && vs_take(vs, &r, name, NULL)) {
        vs->end_taken = true;
        pthread_cond_signal(&vs->to_commit);
    }
}

/* The next run, and in which `round` it is read; false when there is none to be copied now. */
static bool next_run(struct volume_set *vs, struct tracked_run *run, uint64_t *round, bool room)
{
    HOLD_LOCK(&vs->lock);
    bool busy = vs->data_head - vs->data_tail > RING_BYTES / 4 || vs->parked_first || vs->stalled;
    if (vs->mode != VS_HEALING || busy || !room) {
        pause_a_little(vs);
        return false;
    }
    *round = vs->tracked_batches;
    struct tracked_run from = {.volume = run->volume, .first = run->first + run->count};
    if (tracked_next(vs->tracked, from, COPY_BYTES / BLOCK, run))
        return true;
    *run = (struct tracked_run){.volume = 0};
    if (tracked_todo(vs->tracked) == 0) {
        take_end(vs);
        pause_a_little(vs);
    }
    return false;
}

/* Takes what is still to do of a run that was read, or as much as fits. Nothing of what was read before changes were tracked again. */
static void take_run(struct volume_set *vs, const struct tracked_run *run, uint64_t round, const uint8_t *data)
{
    HOLD_LOCK(&vs->lock);
    struct tracked_run part = {.volume = run->volume, .first = run->first};
    uint64_t end = run->first + run->count;
    while (vs->mode == VS_HEALING && vs->tracked_batches == round && tracked_next(vs->tracked, part, end - part.first, &part)) {
        if (part.volume != run->volume || part.first >= end)
            break;
        part.count = min_u64(part.count, end - part.first);
        const uint8_t *content = data + (part.first - run->first) * BLOCK;
        bool zeros = all_zeros(content, part.count * BLOCK);
        struct fmt_record r = {.kind = zeros ? FMT_ZERO : FMT_WRITE,
                               .volume = (uint16_t)part.volume,
                               .data_length = zeros ? 0 : (uint32_t)(part.count * BLOCK),
                               .offset = part.first * BLOCK,
                               .length = part.count * BLOCK};
        if (!vs_take(vs, &r, content, NULL))
            break; /* read again when its turn comes */
        part.first += part.count;
        if (part.first >= end)
            break;
    }
    pthread_cond_signal(&vs->to_commit);
}

void *copier_main(void *arg)
{
    struct volume_set *vs = arg;
    uint8_t *data = io_alloc(COPY_BYTES);
    struct tracked_run run = {.volume = 0};
    uint64_t round;
    if (!data)
        abort();
    for (;;) {
        {
            HOLD_LOCK(&vs->lock);
            if (vs->stop_copier)
                break;
            if (vs->mode != VS_HEALING) {
                pthread_cond_wait(&vs->progress, &vs->lock);
                continue;
            }
        }
        if (!next_run(vs, &run, &round, has_room(vs)))
            continue;
        const struct volume *v = &vs->volumes[run.volume];
        int rc = io_pread(v->fd, data, run.count * BLOCK, run.first * BLOCK);
        if (rc == 0) {
            take_run(vs, &run, round, data);
            continue;
        }
        vs_note_error(vs, VS_READ, "volume %s: cannot read %lu bytes at %lu: %s", v->name, run.count * BLOCK, run.first * BLOCK,
                      strerror(-rc));
        HOLD_LOCK(&vs->lock);
        pause_a_little(vs);
    }
    io_free(data, COPY_BYTES);
    return NULL;
}
