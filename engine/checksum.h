/* XXH3-64, seed 0, with the checksum's own eight bytes taken as zero (FORMAT.md, "zeroed field"). */
#ifndef PGCDP_CHECKSUM_H
#define PGCDP_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* Two pieces (a batch's header and data lie apart in memory); `field` is the checksum's offset in the first. */
static inline uint64_t checksum_zeroed2(const void *head, size_t head_length, size_t field, const void *data,
                                        size_t data_length)
{
    static const uint8_t zero[8];
    const uint8_t *bytes = head;
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, bytes, field);
    XXH3_64bits_update(&state, zero, sizeof zero);
    XXH3_64bits_update(&state, bytes + field + 8, head_length - field - 8);
    if (data_length)
        XXH3_64bits_update(&state, data, data_length);
    return XXH3_64bits_digest(&state);
}

static inline uint64_t checksum_zeroed(const void *bytes, size_t length, size_t field)
{
    return checksum_zeroed2(bytes, length, field, NULL, 0);
}

#endif
