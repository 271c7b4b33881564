/* Reads a frames file (FORMAT.md 2) from its beginning on, one frame at a time, each checked. */
#ifndef PGCDP_FRAMES_H
#define PGCDP_FRAMES_H

#include <stdint.h>

#include "err.h"

struct frames;

struct frames_header {
    uint8_t set_id[16];
    uint64_t interval;
};

/* `content`: the four characters that the file must bear. ERR_DAMAGE with file and offset, or -errno. */
int frames_open(struct frames **out, const char *path, const char *content, struct err *e);
void frames_close(struct frames *f);

const struct frames_header *frames_header(const struct frames *f);

/* The next `length` bytes of the stream, in *data until the next call: 1. At the end of the stream, or where an
 * unfinished file has no further whole frame: 0, with fewer than `length` bytes left over unread. */
int frames_take(struct frames *f, uint64_t length, const uint8_t **data, struct err *e);

#endif
