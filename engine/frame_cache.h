/* Bytes anywhere in the streams of frames files, with unpacked frames kept: a bounded number of bytes, the least recently
 * used go first.
 *
 * Any thread. A frame that several want at once is read once. What is being read from counts and cannot go, so with
 * frames larger than the bound there may be one frame a thread beyond it.
 */
#ifndef PGCDP_FRAME_CACHE_H
#define PGCDP_FRAME_CACHE_H

#include <stdint.h>

#include "err.h"
#include "frame_file.h"

struct frame_cache;

struct frame_cache_status {
    uint64_t hits, misses; /* frames */
    uint64_t bytes, most_bytes, limit;
};

struct frame_cache *frame_cache_new(uint64_t limit);
void frame_cache_free(struct frame_cache *c);

/* Copies `length` bytes of the stream from `position` on; the range must lie inside of it. ERR_DAMAGE or -errno. */
int frame_cache_read(struct frame_cache *c, const struct frame_file *f, uint64_t position, uint64_t length,
                     struct frame_scratch *s, uint8_t *to, struct err *e);

void frame_cache_get_status(struct frame_cache *c, struct frame_cache_status *status);

#endif
