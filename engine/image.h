/* The backup image of one volume (FORMAT.md 3.3): each block checked against its sum when it is read; in an encrypted store, of
 * which this engine was given the key, decrypted and judged by its tag (7.4). Any thread. */
#ifndef PGCDP_IMAGE_H
#define PGCDP_IMAGE_H

#include <stdint.h>

#include "err.h"

struct image;

/* `stem`.img and `stem`.sums of a volume of `bytes`, whose number is `volume`. ERR_DAMAGE when one is missing or has another length, or -errno. */
int image_open(struct image **out, const char *stem, uint16_t volume, uint64_t bytes, struct err *e);
void image_close(struct image *i);

/* Blocks inside of the volume. ERR_DAMAGE with file and offset of the first block that is not what its sum says. */
int image_read(const struct image *i, uint64_t block, uint64_t count, uint8_t *to, struct err *e);

#endif
