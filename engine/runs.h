/* Blocks on their way to the volumes: newest version of each, in order of place, neighbours together. */
#ifndef PGCDP_RUNS_H
#define PGCDP_RUNS_H

#include <stddef.h>
#include <stdint.h>

#include "backing.h"
#include "err.h"

struct block {
    uint64_t key; /* volume in the upper 16 bits, block below */
    uint64_t order;
    const uint8_t *data;
};

static inline uint64_t block_key(uint64_t volume, uint64_t block) { return volume << 48 | block; }

/* Writes the newest (highest `order`) version of each; sorts them for that. -errno, told in `e`. Nothing is synced. `point`: as io.h
 * names what is written. */
int runs_write(const char *point, const struct volume *volumes, struct block *blocks, size_t count, struct err *e);

#endif
