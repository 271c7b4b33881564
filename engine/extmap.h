/* Block range -> source: where the newest content of a block lies while it is not yet on its volume.
 *
 * A hash table of single blocks (their content is in memory) and a short list of ranges that read as zeros. A later entry
 * hides an earlier one. No locks; the caller has one. Fixed size: the table never holds more blocks than it was made for.
 */
#ifndef PGCDP_EXTMAP_H
#define PGCDP_EXTMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct extmap;

enum extmap_hit { EXTMAP_MISS, EXTMAP_DATA, EXTMAP_ZEROS };

#define EXTMAP_ZERO_RANGES 256u

/* Room for `blocks` blocks at once. */
struct extmap *extmap_new(size_t blocks);
void extmap_free(struct extmap *map);

/* The block's newest content is at `data` since write `number`. */
void extmap_put(struct extmap *map, unsigned volume, uint64_t block, const uint8_t *data, uint64_t number);

/* Blocks first..first+count-1 read as zeros since write `number`. The caller sees to extmap_zero_room. */
void extmap_put_zeros(struct extmap *map, unsigned volume, uint64_t first, uint64_t count, uint64_t number);
bool extmap_zero_room(const struct extmap *map);

enum extmap_hit extmap_get(const struct extmap *map, unsigned volume, uint64_t block, const uint8_t **data);

/* The volume now holds this block as of write `number`: forgets it unless it is newer. */
void extmap_drop(struct extmap *map, unsigned volume, uint64_t block, uint64_t number);
void extmap_drop_zeros(struct extmap *map, uint64_t number);

bool extmap_empty(const struct extmap *map);

#endif
