/* What a volume's bytes lie on: an image file or a block device, opened for this process alone. */
#ifndef PGCDP_BACKING_H
#define PGCDP_BACKING_H

#include <stdint.h>

#include "err.h"

#define MAX_VOLUMES 256u

struct volume { /* one opened backing */
    char name[64];
    char path[512];
    int fd; /* O_DIRECT, locked */
    uint64_t size; /* it may grow while it is served: volume_size, volume_grow */
};

/* Any thread. */
static inline uint64_t volume_size(const struct volume *v) { return __atomic_load_n(&v->size, __ATOMIC_ACQUIRE); }

/* Opens and locks a backing. O_EXCL, flock: one capture process a backing (exit 6 when it is in use).
 *
 * `size` of its bytes are the volume, 0: all of them. A backing that somebody has made larger shows no more than it did:
 * what was written behind that would have no place in the store's image. */
int volume_open(struct volume *v, const char *name, const char *path, uint64_t size, struct err *e);

/* Makes the volume `size` bytes of its backing, which are there. Never smaller: ERR_PRECONDITION. Any thread. */
int volume_grow(struct volume *v, uint64_t size, struct err *e);

#endif
