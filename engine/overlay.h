/* What was written to a view of one volume: a sparse file, and in memory one bit a block that says which are in it.
 *
 * It is gone with the view: nothing is ever synced. Any thread; the content comes before the bit, so that a block is either
 * what it was or what was written. Who writes a block from two threads at once gets either of both.
 */
#ifndef PGCDP_OVERLAY_H
#define PGCDP_OVERLAY_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"

struct overlay;

/* `directory`/`name`.cow, made anew. */
int overlay_open(struct overlay **out, const char *directory, const char *name, uint64_t bytes, struct err *e);
void overlay_close(struct overlay *o);

/* Blocks from `block` on, at most `count`, that are all in it (*has) or all not. */
uint64_t overlay_run(const struct overlay *o, uint64_t block, uint64_t count, bool *has);

int overlay_read(const struct overlay *o, uint64_t block, uint64_t count, uint8_t *to, struct err *e);
int overlay_write(struct overlay *o, uint64_t block, uint64_t count, const uint8_t *from, struct err *e);

/* They read back as zeros. */
int overlay_zero(struct overlay *o, uint64_t block, uint64_t count, struct err *e);

#endif
