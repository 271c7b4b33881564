/* See frame_cache.h.
 *
 * An entry is in a chain of the hash table and, while nobody uses it, in the ring of unused ones, oldest first. One lock for
 * all; it is never held while a frame is read. An entry is put in place before its frame is read, so that others wait for
 * it; when that fails it is taken out again, and each who waited tries for himself and gets the error of his own try.
 *
 * Files come and go with the maps that name them. What an entry is known by is its file's serial number: the address of a
 * file that was closed may be that of the next one. Entries of closed files are never asked for again and go by their age.
 */
#include "frame_cache.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"
#include "util.h"

#define CHAINS 4096u

struct entry {
    uint64_t file; /* its serial number */
    size_t number;
    uint32_t length;
    uint8_t *raw;
    unsigned users;
    bool loading, failed;
    struct entry *chain;
    struct entry *older, *newer; /* in the ring; NULL while in use */
};

struct frame_cache {
    pthread_mutex_t lock;
    pthread_cond_t loaded;
    struct frame_cache_status status;
    struct entry *chains[CHAINS];
    struct entry ring; /* newer: the oldest, older: the newest */
};

struct frame_cache *frame_cache_new(uint64_t limit)
{
    struct frame_cache *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->loaded, NULL);
    c->status.limit = limit;
    c->ring.newer = c->ring.older = &c->ring;
    return c;
}

static struct entry **chain_of(struct frame_cache *c, uint64_t file, size_t number)
{
    uint64_t key = (file + 1) * 0x9E3779B97F4A7C15u + number * 0xC2B2AE3D27D4EB4Fu;
    return &c->chains[(key >> 32) % CHAINS];
}

static void forget(struct frame_cache *c, struct entry *entry)
{
    struct entry **link = chain_of(c, entry->file, entry->number);
    while (*link != entry)
        link = &(*link)->chain;
    *link = entry->chain;
    c->status.bytes -= entry->length;
}

static void destroy(struct entry *entry)
{
    free(entry->raw);
    free(entry);
}

static void leave_ring(struct entry *entry)
{
    entry->older->newer = entry->newer;
    entry->newer->older = entry->older;
    entry->older = entry->newer = NULL;
}

/* The oldest unused ones go until `length` more bytes are within the bound. */
static void make_room(struct frame_cache *c, uint64_t length)
{
    while (c->status.bytes + length > c->status.limit && c->ring.newer != &c->ring) {
        struct entry *oldest = c->ring.newer;
        leave_ring(oldest);
        forget(c, oldest);
        destroy(oldest);
    }
}

void frame_cache_free(struct frame_cache *c)
{
    if (!c)
        return;
    for (unsigned i = 0; i < CHAINS; i++)
        while (c->chains[i]) {
            struct entry *entry = c->chains[i];
            c->chains[i] = entry->chain;
            destroy(entry);
        }
    pthread_cond_destroy(&c->loaded);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static void release(struct frame_cache *c, struct entry *entry)
{
    HOLD_LOCK(&c->lock);
    if (--entry->users)
        return;
    if (entry->failed) {
        destroy(entry);
        return;
    }
    entry->older = c->ring.older; /* it is the newest now */
    entry->newer = &c->ring;
    entry->older->newer = entry->newer->older = entry;
    make_room(c, 0);
}

/* The frame if it is there or on its way; else a new entry that the caller must load (*fresh). NULL: no memory. */
static struct entry *acquire(struct frame_cache *c, const struct frame_file *f, size_t number, bool *fresh)
{
    HOLD_LOCK(&c->lock);
    uint64_t file = frame_file_serial(f);
    struct entry **chain = chain_of(c, file, number), *entry = *chain;
    while (entry && (entry->file != file || entry->number != number))
        entry = entry->chain;
    *fresh = !entry;
    if (entry) {
        if (entry->users++ == 0)
            leave_ring(entry);
        while (entry->loading)
            pthread_cond_wait(&c->loaded, &c->lock);
        c->status.hits += !entry->failed;
        return entry;
    }
    uint32_t length = frame_file_entry(f, number)->raw_length;
    make_room(c, length);
    entry = calloc(1, sizeof *entry);
    if (!entry || !(entry->raw = malloc((size_t)length + 1))) {
        free(entry);
        return NULL;
    }
    *entry = (struct entry){.file = file, .number = number, .length = length, .raw = entry->raw, .users = 1, .loading = true, .chain = *chain};
    *chain = entry;
    c->status.misses++;
    c->status.bytes += length;
    c->status.most_bytes = max_u64(c->status.most_bytes, c->status.bytes);
    return entry;
}

static int load(struct frame_cache *c, const struct frame_file *f, struct entry *entry, struct frame_scratch *s, struct err *e)
{
    int rc = frame_file_load(f, entry->number, s, entry->raw, e);
    HOLD_LOCK(&c->lock);
    entry->loading = false;
    if (rc) {
        entry->failed = true;
        forget(c, entry);
    }
    pthread_cond_broadcast(&c->loaded);
    return rc;
}

static int read_frame(struct frame_cache *c, const struct frame_file *f, size_t number, uint64_t begin, uint64_t length,
                      struct frame_scratch *s, uint8_t *to, struct err *e)
{
    for (;;) {
        bool fresh;
        struct entry *entry = acquire(c, f, number, &fresh);
        if (!entry)
            return err_set(e, -ENOMEM, "no memory for a frame of %s", frame_file_path(f));
        int rc = fresh ? load(c, f, entry, s, e) : 0;
        bool failed = entry->failed;
        if (!failed)
            memcpy(to, entry->raw + begin, length);
        release(c, entry);
        if (!failed || fresh)
            return rc;
    }
}

int frame_cache_read(struct frame_cache *c, const struct frame_file *f, uint64_t position, uint64_t length,
                     struct frame_scratch *s, uint8_t *to, struct err *e)
{
    size_t number = frame_file_find(f, position);
    while (length) {
        const struct fmt_frame_entry *frame = frame_file_entry(f, number);
        uint64_t begin = position - frame->position;
        uint64_t part = min_u64(length, frame->raw_length - begin);
        int rc = part ? read_frame(c, f, number, begin, part, s, to, e) : 0;
        if (rc)
            return rc;
        position += part;
        to += part;
        length -= part;
        number++;
    }
    return 0;
}

void frame_cache_get_status(struct frame_cache *c, struct frame_cache_status *status)
{
    HOLD_LOCK(&c->lock);
    *status = c->status;
}
