/* Notes on the design: the cache is a list of writes in the order in which they came, and for each block of the disk a pointer
 * to its newest bytes. A sync writes each block once and empties the list. So what a cut finds is every write since the last
 * sync, one by one, also those that were overwritten since: a disk may have brought any of them to its medium.
 *
 *     received   W1(a) W2(b) SYNC W3(a) W4(c) W5(a) CUT
 *     durable    a1 b2, then for a any of 1, 3, 5 or a mixture of their sectors, and for c 0 or 4, whatever a is
 *
 * Nothing is synced to the medium under the backing: it is the machine of the test, whose power stays.
 */
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct cached {
    struct cached *next;
    uint64_t offset, length;
    bool zeros;
    uint8_t data[];
};

static const uint8_t ZEROS[BLOCK];

static const uint8_t *bytes_of(const struct cached *w, uint64_t at) { return w->zeros ? ZEROS : w->data + at; }

int disk_open(struct disk *d, const char *path, uint64_t limit)
{
    struct stat st;
    *d = (struct disk){.fd = open(path, O_RDWR | O_CLOEXEC), .limit = limit};
    if (d->fd < 0 || fstat(d->fd, &st) < 0)
        return -errno;
    d->size = (uint64_t)st.st_size;
    if (!S_ISREG(st.st_mode) || d->size == 0 || d->size % BLOCK)
        return -EINVAL;
    d->newest = calloc(d->size / BLOCK, sizeof *d->newest);
    d->last = &d->first;
    return d->newest ? 0 : -ENOMEM;
}

static int put(struct disk *d, const struct cached *w, uint64_t from, uint64_t to)
{
    uint64_t at = w->offset + from;
    if (w->zeros)
        return fallocate(d->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)(to - from)) < 0 ? -errno : 0;
    while (from < to) {
        ssize_t n = pwrite(d->fd, w->data + from, to - from, (off_t)(w->offset + from));
        if (n < 0)
            return -errno;
        from += (uint64_t)n;
    }
    return 0;
}

/* The oldest write leaves the cache; blocks that were written again since stay with the later one. */
static int settle_first(struct disk *d)
{
    struct cached *w = d->first;
    int rc = 0;
    for (uint64_t at = 0; at < w->length && rc == 0;) {
        uint64_t end = at;
        while (end < w->length && d->newest[(w->offset + end) / BLOCK] == bytes_of(w, end)) {
            d->newest[(w->offset + end) / BLOCK] = NULL;
            end += BLOCK;
        }
        if (end > at)
            rc = put(d, w, at, end);
        at = end > at ? end : at + BLOCK;
    }
    d->first = w->next;
    if (!d->first)
        d->last = &d->first;
    d->cached_writes--;
    d->cached_bytes -= w->zeros ? 0 : w->length;
    free(w);
    return rc;
}

int disk_read(struct disk *d, uint8_t *data, size_t length, uint64_t offset)
{
    for (uint64_t at = 0; at < length;) {
        uint64_t end = at;
        while (end < length && !d->newest[(offset + end) / BLOCK])
            end += BLOCK;
        if (end > at && pread(d->fd, data + at, end - at, (off_t)(offset + at)) != (ssize_t)(end - at))
            return -EIO;
        for (; end < length && d->newest[(offset + end) / BLOCK]; end += BLOCK)
            memcpy(data + end, d->newest[(offset + end) / BLOCK], BLOCK);
        at = end;
    }
    return 0;
}

int disk_write(struct disk *d, const uint8_t *data, uint64_t length, uint64_t offset)
{
    struct cached *w = malloc(sizeof *w + (data ? length : 0));
    if (!w)
        return -ENOMEM;
    *w = (struct cached){.offset = offset, .length = length, .zeros = !data};
    if (data)
        memcpy(w->data, data, length);
    for (uint64_t at = 0; at < length; at += BLOCK)
        d->newest[(offset + at) / BLOCK] = bytes_of(w, at);
    *d->last = w;
    d->last = &w->next;
    d->cached_writes++;
    d->cached_bytes += data ? length : 0;
    d->writes++;
    int rc = 0;
    for (; rc == 0 && d->cached_bytes > d->limit; d->evicted++)
        rc = settle_first(d);
    return rc;
}

int disk_sync(struct disk *d)
{
    int rc = 0;
    while (d->first && rc == 0)
        rc = settle_first(d);
    d->syncs++;
    return rc;
}

/* splitmix64 */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Part of a write: one run of its sectors, or all but one run. */
static int put_torn(struct disk *d, const struct cached *w, uint64_t *random, uint64_t tear)
{
    uint64_t pieces = w->length / tear;
    uint64_t a = next_random(random) % (pieces + 1) * tear, b = next_random(random) % (pieces + 1) * tear;
    uint64_t from = a < b ? a : b, to = a < b ? b : a;
    if (next_random(random) % 2)
        return put(d, w, from, to);
    int rc = put(d, w, 0, from);
    return rc ? rc : put(d, w, to, w->length);
}

int disk_cut(struct disk *d, uint64_t *random, uint64_t tear, struct cut *out)
{
    struct cached **order = calloc(d->cached_writes + 1, sizeof *order);
    if (!order)
        return -ENOMEM;
    *out = (struct cut){.unsynced = d->cached_writes};
    uint64_t count = 0;
    for (struct cached *w = d->first; w; w = w->next)
        order[count++] = w;
    for (uint64_t i = count; i > 1; i--) {
        uint64_t k = next_random(random) % i;
        struct cached *other = order[k];
        order[k] = order[i - 1];
        order[i - 1] = other;
    }
    /* Some cuts take nearly everything, some hardly anything. */
    uint64_t keep = next_random(random) % 5 * 25;
    int rc = 0;
    for (uint64_t i = 0; i < count && rc == 0; i++) {
        bool kept = next_random(random) % 100 < keep;
        /* Not the first block: ext4 cannot be mounted with half of its superblock, whatever lies on it. */
        bool torn = kept && next_random(random) % 4 == 0 && order[i]->offset >= BLOCK && order[i]->length > tear;
        out->lost += !kept;
        out->torn += torn;
        out->kept += kept && !torn;
        if (kept)
            rc = torn ? put_torn(d, order[i], random, tear) : put(d, order[i], 0, order[i]->length);
    }
    free(order);
    return rc;
}
