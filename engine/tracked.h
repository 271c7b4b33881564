/* The durable bitmap of blocks that were changed while the journal could not grow: file `tracked` of a journal (FORMAT.md 1.8).
 *
 * It is written whole when it is made, so that a bit never needs room on a full disk. Two bitmaps are in memory: `marked` is
 * what the file says, or will after the next flush; `todo` are the blocks whose newest content is not on its way to the
 * journal. No locks: who calls has one, and of `marked` and the file one thread at a time is the user.
 */
#ifndef PGCDP_TRACKED_H
#define PGCDP_TRACKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backing.h"
#include "err.h"
#include "format.h"

struct tracked;

/* Opens the bitmap in the journal `directory`. Makes it, for these volumes, when it is `wanted` and is not there, or is of other
 * volumes and idle. Where it is lost, and `marked`, what the applied mark says (NULL: there is none), is not idle, it is made
 * with that state, and each block counts as changed. `put_back`: it may be of one volume more, which is given up. Where a
 * volume is larger than it knows, since it was to grow, it is made anew with what it says. `*out` is NULL when there is none and
 * none is wanted, or it is idle and not wanted, or there is no room, which is logged. ERR_PRECONDITION when it is not idle and
 * of other volumes, or is lost and there is no room; ERR_DAMAGE when it is not known whether it is idle. */
int tracked_open(struct tracked **out, const char *directory, const uint8_t set_id[16], const struct volume *volumes,
                 unsigned count, bool wanted, bool put_back, const struct fmt_tracking *marked, struct err *e);
void tracked_close(struct tracked *t);

/* An idle one that has taken the place of `t` in the directory, with so many bytes of a volume. `t` stays as it is. */
int tracked_grown(struct tracked **out, const struct tracked *t, unsigned volume, uint64_t bytes, struct err *e);

/* What the file says, or was to say when the last change of it failed; idle without a bitmap (NULL). */
struct fmt_tracking tracked_state(const struct tracked *t);

/* In memory alone: what the next try to write it has to say. */
void tracked_take_state(struct tracked *t, const struct fmt_tracking *from);

/* Durable when it returns 0. */
int tracked_set_state(struct tracked *t, const struct fmt_tracking *to);

void tracked_mark(struct tracked *t, unsigned volume, uint64_t first, uint64_t count);
void tracked_unmark(struct tracked *t, unsigned volume, uint64_t first, uint64_t count);
uint64_t tracked_marked(const struct tracked *t);

/* What was marked and unmarked since the last flush is durable when it returns 0. */
int tracked_flush(struct tracked *t);

void tracked_add_todo(struct tracked *t, unsigned volume, uint64_t first, uint64_t count);
void tracked_drop_todo(struct tracked *t, unsigned volume, uint64_t first, uint64_t count);
uint64_t tracked_todo(const struct tracked *t);

struct tracked_run {
    unsigned volume;
    uint64_t first, count;
};

/* The first run of blocks to do at or behind `from` (volume, first), at most `most` long; false when there is none. */
bool tracked_next(const struct tracked *t, struct tracked_run from, uint64_t most, struct tracked_run *out);

#endif
