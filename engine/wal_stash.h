/* Blocks that came lately and may be the second half of a page whose first half lies elsewhere.
 *
 * As many as STASHED. For a new one the oldest goes, but not one of those that came about when a page did that is still
 * torn: the rest of a record may come long after its page, as when the next segment must be made while a checkpoint writes. */
#ifndef PGCDP_WAL_STASH_H
#define PGCDP_WAL_STASH_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "cursor.h"

#define STASHED 256u
#define STASH_WRITES 64u /* a second half comes within so many writes of its first, in either order */

struct stash {
    uint64_t place[STASHED];
    uint64_t write[STASHED]; /* 0: nothing in it */
    uint16_t volume[STASHED];
    uint8_t (*data)[4096];
};

struct stash_span { /* writes; what came with them is kept. `to` 0: none */
    uint64_t from, to;
};

/* False: no memory. */
bool stash_open(struct stash *s);
void stash_close(struct stash *s);

/* Where the block at a place is, or STASHED. */
uint32_t stash_find(const struct stash *s, uint16_t volume, uint64_t place);

/* Where the block is now. It takes the place of an older one at the same place. */
uint32_t stash_put(struct stash *s, uint16_t volume, uint64_t place, uint64_t write, const uint8_t *block,
                   struct stash_span kept);

/* Those of the last writes before `write`, and those that are kept (FORMAT.md 4.2). False: that is not it. */
uint32_t stash_save_count(const struct stash *s, uint64_t write, struct stash_span kept);
void stash_save(const struct stash *s, uint64_t write, struct stash_span kept, FILE *out);
bool stash_restore(struct stash *s, uint32_t count, struct cursor *in);

#endif
