/* The backup image of one volume (FORMAT.md 3.3): each block checked against its sum when it is read. Any thread. */
#ifndef PGCDP_IMAGE_H
#define PGCDP_IMAGE_H

#include <stdint.h>

#include "err.h"

struct image;

/* `stem`.img and `stem`.sums of a volume of `bytes`. ERR_DAMAGE when one is missing or has another length, or -errno. */
int image_open(struct image **out, const char *stem, uint64_t bytes, struct err *e);
void image_close(struct image *i);

/* Blocks inside of the volume. ERR_DAMAGE with file and offset of the first block that is not what its sum says. */
int image_read(const struct image *i, uint64_t block, uint64_t count, uint8_t *to, struct err *e);

#endif
