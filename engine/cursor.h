/* Taking values off the front of bytes that may be too few: then zeros come, and `short_of` says so at the end. */
#ifndef PGCDP_CURSOR_H
#define PGCDP_CURSOR_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

struct cursor {
    const uint8_t *at, *end;
    bool short_of; /* more was asked for than there is */
};

/* The next `length` bytes; eight zeros when there are fewer, so only ask for the content of up to eight unseen. */
static inline const uint8_t *cursor_take(struct cursor *c, uint64_t length)
{
    static const uint8_t nothing[8];
    if ((uint64_t)(c->end - c->at) < length) {
        c->short_of = true;
        c->at = c->end;
        return nothing;
    }
    const uint8_t *here = c->at;
    c->at += length;
    return here;
}

/* Copies the next `length` bytes; false, and nothing copied, when there are fewer. */
static inline bool cursor_copy(struct cursor *c, void *to, uint64_t length)
{
    const uint8_t *from = cursor_take(c, length);
    if (c->short_of)
        return false;
    memcpy(to, from, length);
    return true;
}

static inline uint8_t cursor_u8(struct cursor *c) { return *cursor_take(c, 1); }

static inline uint16_t cursor_u16(struct cursor *c)
{
    uint16_t v;
    memcpy(&v, cursor_take(c, sizeof v), sizeof v);
    return v;
}

static inline uint32_t cursor_u32(struct cursor *c)
{
    uint32_t v;
    memcpy(&v, cursor_take(c, sizeof v), sizeof v);
    return v;
}

#endif
