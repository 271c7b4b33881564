/* Notes on the design.
 *
 * A read must see every write answered before it was sent. Its blocks are looked up in the map of what is not yet applied,
 * hits are copied under the lock, and only then the volume is read for the misses: a miss means that the volume already
 * holds what had been answered. The other order would be wrong: a block could be applied and dropped from the map between
 * reading the volume and looking it up.
 *
 * The reader looks up, and hands what misses to the kernel (AIO, O_DIRECT); one thread, the completer, answers it when it
 * has come. So a read from the volume costs one wake-up and no hand-over between threads: with a pool of threads it cost
 * two, and random reads were at half of a plain loop device's. RWF_NOWAIT keeps the reader from waiting for locks and
 * mappings (not for a place in the device's queue when that is full); what would have to wait is sent again by the
 * completer. Where a backing does not know the flag (some device mapper targets, network filesystems), it goes without.
 *
 * Behind a failed sync a volume may lack what it had (rewrite.c). What has not come from it then is not answered with it: it waits in its
 * slot until the volume has everything again, and is looked up and read anew.
 *
 * Memory is fixed: a read takes a slot with its buffer, small or large. When there is none, it is queued without data and
 * looked up again when its turn comes, which is later and so no worse.
 */
#include "reads.h"

#include <errno.h>
#include <libaio.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "cleanup.h"
#include "io.h"
#include "util.h"
#include "volume_set.h"

#define SMALL_BYTES ((size_t)128 << 10) /* the kernel's usual read-ahead */
#define SMALL_SLOTS 32u
#define LARGE_SLOTS 8u
#define SLOTS (SMALL_SLOTS + LARGE_SLOTS)
#define EVENTS 16

enum size_class { SMALL, LARGE, CLASSES };

struct request {
    unsigned volume;
    uint64_t offset;
    size_t length;
    void *cookie;
};

struct slot {
    struct iocb iocb; /* first: the kernel gives it back */
    struct slot *next;
    enum size_class class;
    struct request request;
    size_t found;
    uint64_t losses; /* of the volume set, when it was looked up */
    uint8_t *buffer, *overlay; /* the overlay takes blocks that are newer than the volume */
    uint8_t hits[BACKEND_MAX_REQUEST / 4096];
};

struct queued {
    struct queued *next;
    struct request request;
};

struct reads {
    struct volume_set *vs;
    io_context_t aio;
    pthread_t completer;
    struct iocb stop_iocb;
    int stop_fd;
    uint8_t *hit_buffer; /* of the reader, for reads that need no volume */
    uint8_t *memory;
    struct slot slots[SLOTS];
    uint64_t bad; /* where the last failed read began, 0: that is over */
    atomic_bool may_wait[MAX_VOLUMES]; /* its backing does not know RWF_NOWAIT */

    /* Under the volume set's lock. */
    struct slot *free[CLASSES];
    struct slot *waiting; /* until the volumes have again what a failed sync may have lost */
    struct queued *first[CLASSES], **last[CLASSES];
    unsigned under_way; /* slots that are neither free nor wait */
};

static const size_t MEMORY = SMALL_SLOTS * 2 * SMALL_BYTES + LARGE_SLOTS * 2 * BACKEND_MAX_REQUEST;

/* Copies what is newer than the volume; returns how many blocks those were. Called with the lock. */
static size_t copy_hits(struct volume_set *vs, const struct request *q, uint8_t *to, uint8_t *hits)
{
    size_t found = 0;
    if (extmap_empty(vs->map))
        return 0;
    for (size_t i = 0; i < q->length / BLOCK; i++) {
        const uint8_t *data = NULL;
        enum extmap_hit hit = extmap_get(vs->map, q->volume, q->offset / BLOCK + i, &data);
        hits[i] = hit != EXTMAP_MISS;
        if (hit == EXTMAP_DATA)
            memcpy(to + i * BLOCK, data, BLOCK);
        else if (hit == EXTMAP_ZEROS)
            memset(to + i * BLOCK, 0, BLOCK);
        found += hits[i];
    }
    return found;
}

static void copy_blocks(uint8_t *to, const uint8_t *from, const uint8_t *hits, size_t blocks)
{
    for (size_t i = 0; i < blocks; i++)
        if (hits[i])
            memcpy(to + i * BLOCK, from + i * BLOCK, BLOCK);
}

/* Where a read begins, never 0. */
static uint64_t at_of(const struct request *q) { return ((uint64_t)q->volume + 1) << 52 | q->offset / BLOCK; }

/* What could not be read last can be read now: only that says that it is over. */
static void can_be_read(struct reads *r)
{
    HOLD_LOCK(&r->vs->lock);
    r->vs->errors[VS_READ][0] = '\0';
    __atomic_store_n(&r->bad, 0, __ATOMIC_RELAXED);
}

static void answer(struct reads *r, struct slot *s, int error)
{
    const struct request *q = &s->request;
    const struct volume *v = &r->vs->volumes[q->volume];
    if (error) {
        vs_note_error(r->vs, VS_READ, "volume %s: cannot read %zu bytes at %lu: %s", v->name, q->length, q->offset,
                      strerror(-error));
        __atomic_store_n(&r->bad, at_of(q), __ATOMIC_RELAXED);
    } else {
        if (s->found)
            copy_blocks(s->buffer, s->overlay, s->hits, q->length / BLOCK);
        if (__atomic_load_n(&r->bad, __ATOMIC_RELAXED) == at_of(q))
            can_be_read(r);
    }
    r->vs->done.read(q->cookie, s->buffer, error ? 0 : q->length, error);
}

/* Reads into the slot's buffer on this thread. */
static int read_now(struct reads *r, struct slot *s)
{
    return io_pread(r->vs->volumes[s->request.volume].fd, s->buffer, s->request.length, s->request.offset);
}

/* 0 when the kernel has it and gives it back to the completer, else -errno. */
static int to_kernel(struct reads *r, struct slot *s, unsigned flags)
{
    struct iocb *iocb = &s->iocb;
    io_prep_pread(iocb, r->vs->volumes[s->request.volume].fd, s->buffer, s->request.length, (long long)s->request.offset);
    iocb->aio_rw_flags = flags;
    int rc = io_submit(r->aio, 1, &iocb);
    return rc == 1 ? 0 : rc < 0 ? rc : -EAGAIN;
}

/* The same from the reader, which shall not wait. */
static int to_kernel_at_once(struct reads *r, struct slot *s)
{
    atomic_bool *may_wait = &r->may_wait[s->request.volume];
    int rc = atomic_load(may_wait) ? -EOPNOTSUPP : to_kernel(r, s, RWF_NOWAIT);
    if (rc != -EOPNOTSUPP)
        return rc;
    atomic_store(may_wait, true);
    return to_kernel(r, s, 0);
}

/* What is newer than the volume, and how much the volume may have lost until now. False when the volume cannot be read now: the slot
 * waits, and is whoever calls reads_again's. Called with the lock. */
static bool look_up(struct reads *r, struct slot *s)
{
    if (r->vs->volume_failed) {
        s->next = r->waiting;
        r->waiting = s;
        r->under_way--;
        return false;
    }
    s->losses = r->vs->losses;
    s->found = copy_hits(r->vs, &s->request, s->overlay, s->hits);
    return true;
}

/* Gives the slot to the next that waits for one, true, or back. Called with the lock. */
static bool next_request(struct reads *r, struct slot *s)
{
    struct queued *queued = r->first[s->class];
    if (!queued) {
        s->next = r->free[s->class];
        r->free[s->class] = s;
        r->under_way--;
        return false;
    }
    r->first[s->class] = queued->next;
    if (!queued->next)
        r->last[s->class] = &r->first[s->class];
    s->request = queued->request;
    free(queued);
    return look_up(r, s);
}

/* What came was read before the volume lost something, or before it had that again: it must not be answered with. */
static bool came_too_late(const struct reads *r, const struct slot *s)
{
    return __atomic_load_n(&r->vs->losses, __ATOMIC_SEQ_CST) != s->losses;
}

/* Brings a slot that was looked up to its end: true when it is answered, false when that comes later. */
static bool serve(struct reads *r, struct slot *s)
{
    for (;;) {
        bool whole = s->found == s->request.length / BLOCK;
        if (!whole && to_kernel(r, s, 0) == 0)
            return false;
        int rc = whole ? 0 : read_now(r, s);
        if (whole || !came_too_late(r, s)) {
            answer(r, s, rc);
            return true;
        }
        HOLD_LOCK(&r->vs->lock);
        if (!look_up(r, s))
            return false;
    }
}

/* The slot's read is answered: goes on with those that waited for it. */
static void reuse(struct reads *r, struct slot *s)
{
    bool more;
    do {
        HOLD_LOCK(&r->vs->lock);
        more = next_request(r, s);
    } while (more && serve(r, s));
}

static void completed(struct reads *r, struct slot *s, long result)
{
    if (result == -EOPNOTSUPP)
        atomic_store(&r->may_wait[s->request.volume], true);
    if ((result == -EAGAIN || result == -EOPNOTSUPP) && to_kernel(r, s, 0) == 0)
        return;
    bool odd = result >= 0 || result == -EAGAIN || result == -EOPNOTSUPP;
    int rc = result == (long)s->request.length ? 0 : odd ? read_now(r, s) : (int)result; /* a short read, or the kernel takes none */
    if (came_too_late(r, s)) {
        pthread_mutex_lock(&r->vs->lock);
        bool found = look_up(r, s);
        pthread_mutex_unlock(&r->vs->lock);
        if (!found || !serve(r, s))
            return;
    } else {
        answer(r, s, rc);
    }
    reuse(r, s);
}

void reads_again(struct reads *r)
{
    if (!r)
        return;
    for (;;) {
        struct slot *s;
        {
            HOLD_LOCK(&r->vs->lock);
            s = r->waiting;
            if (!s)
                return;
            r->waiting = s->next;
            r->under_way++;
            if (!look_up(r, s))
                return;
        }
        if (serve(r, s))
            reuse(r, s);
    }
}

static bool idle(struct reads *r)
{
    pthread_mutex_lock(&r->vs->lock);
    bool none = r->under_way == 0;
    pthread_mutex_unlock(&r->vs->lock);
    return none;
}

static void *completer_main(void *arg)
{
    struct reads *r = arg;
    struct io_event events[EVENTS];
    for (bool stopping = false; !stopping || !idle(r);) {
        int n = io_getevents(r->aio, 1, EVENTS, events, NULL);
        for (int i = 0; i < n; i++)
            if (events[i].obj == &r->stop_iocb)
                stopping = true;
            else
                completed(r, (struct slot *)events[i].obj, (long)events[i].res);
    }
    return NULL;
}

/* Called with the lock. */
static void queue(struct reads *r, enum size_class class, struct queued *queued)
{
    *r->last[class] = queued;
    r->last[class] = &queued->next;
}

void reads_take(struct reads *r, unsigned volume, uint64_t offset, size_t length, void *cookie)
{
    struct volume_set *vs = r->vs;
    struct request q = {.volume = volume, .offset = offset, .length = length, .cookie = cookie};
    enum size_class class = length <= SMALL_BYTES ? SMALL : LARGE;
    uint8_t hits[BACKEND_MAX_REQUEST / 4096];
    pthread_mutex_lock(&vs->lock);
    vs->reads_taken++;
    vs->bytes_read += length;
    size_t found = copy_hits(vs, &q, r->hit_buffer, hits);
    bool whole = found == length / BLOCK, waits = false;
    struct slot *s = whole ? NULL : r->free[class];
    struct queued *queued = whole || s ? NULL : malloc(sizeof *queued);
    if (s) {
        r->free[class] = s->next;
        r->under_way++;
        s->request = q;
        s->found = found;
        s->losses = vs->losses;
        waits = vs->volume_failed && !look_up(r, s);
    } else if (queued) {
        *queued = (struct queued){.request = q};
        queue(r, class, queued);
    }
    pthread_mutex_unlock(&vs->lock);
    if (waits)
        return;
    if (s) {
        if (found) {
            copy_blocks(s->overlay, r->hit_buffer, hits, length / BLOCK);
            memcpy(s->hits, hits, sizeof hits);
        }
        if (to_kernel_at_once(r, s))
            completed(r, s, -EAGAIN);
    } else if (!queued) {
        vs->done.read(cookie, r->hit_buffer, whole ? length : 0, whole ? 0 : -ENOMEM);
    }
}

/* Whatever there is of it; no thread uses it any more. */
static void release(struct reads *r)
{
    for (int i = 0; i < CLASSES; i++)
        while (r->first[i]) { /* a volume lacks something still: whoever serves it next is asked again */
            struct queued *queued = r->first[i];
            r->first[i] = queued->next;
            free(queued);
        }
    if (r->aio)
        io_destroy(r->aio);
    if (r->stop_fd >= 0)
        close(r->stop_fd);
    io_free(r->memory, MEMORY);
    io_free(r->hit_buffer, BACKEND_MAX_REQUEST);
    free(r);
}

int reads_start(struct reads **out, struct volume_set *vs)
{
    struct reads *r = calloc(1, sizeof *r);
    if (!r)
        return -ENOMEM;
    r->vs = vs;
    r->memory = io_alloc(MEMORY);
    r->hit_buffer = io_alloc(BACKEND_MAX_REQUEST);
    r->stop_fd = eventfd(0, EFD_CLOEXEC);
    int rc = !r->memory || !r->hit_buffer ? -ENOMEM : r->stop_fd < 0 ? -errno : io_setup(SLOTS + 1, &r->aio);
    uint8_t *at = r->memory;
    for (unsigned i = 0; rc == 0 && i < SLOTS; i++) {
        struct slot *s = &r->slots[i];
        s->class = i < SMALL_SLOTS ? SMALL : LARGE;
        size_t bytes = s->class == SMALL ? SMALL_BYTES : BACKEND_MAX_REQUEST;
        s->buffer = at;
        s->overlay = at + bytes;
        at += 2 * bytes;
        s->next = r->free[s->class];
        r->free[s->class] = s;
    }
    for (int i = 0; i < CLASSES; i++)
        r->last[i] = &r->first[i];
    if (rc == 0) {
        struct iocb *iocb = &r->stop_iocb;
        io_prep_poll(iocb, r->stop_fd, POLLIN);
        rc = io_submit(r->aio, 1, &iocb);
        rc = rc == 1 ? -pthread_create(&r->completer, NULL, completer_main, r) : rc < 0 ? rc : -EAGAIN;
    }
    if (rc == 0) {
        *out = r;
        return 0;
    }
    release(r);
    return rc;
}

void reads_stop(struct reads *r)
{
    if (!r)
        return;
    eventfd_write(r->stop_fd, 1);
    pthread_join(r->completer, NULL);
    release(r);
}
