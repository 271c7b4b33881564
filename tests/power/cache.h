/* A disk with a volatile write cache: what was written is read back at once, and durable only after a sync. Not thread-safe. */
#ifndef PGCDP_TEST_CACHE_H
#define PGCDP_TEST_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BLOCK ((uint64_t)4096) /* requests are of whole blocks, as the loop devices over it have it */
#define SECTOR ((uint64_t)512)

struct cached;

struct disk {
    int fd; /* the backing: what survives a power cut */
    uint64_t size;
    uint64_t limit; /* bytes of data in the cache; beyond, the oldest writes become durable by themselves */
    const uint8_t **newest; /* for each block: its bytes in the cache, NULL when it is not there */
    struct cached *first, **last; /* writes since the last sync, in order */
    uint64_t cached_writes, cached_bytes;
    uint64_t writes, syncs, evicted; /* since the program began */
};

struct cut {
    uint64_t unsynced, kept, torn, lost; /* writes; kept are those kept whole */
};

/* 0 or -errno, as all below. */
int disk_open(struct disk *d, const char *path, uint64_t limit);

int disk_read(struct disk *d, uint8_t *data, size_t length, uint64_t offset);

/* `data` NULL: zeros. */
int disk_write(struct disk *d, const uint8_t *data, uint64_t length, uint64_t offset);

int disk_sync(struct disk *d);

/* The power is gone: some of the writes since the last sync reach the backing, in another order, some of them torn at `tear`
 * bytes (a multiple of a sector). The same `random` makes the same choice. The disk must not be used again. */
int disk_cut(struct disk *d, uint64_t *random, uint64_t tear, struct cut *out);

#endif
