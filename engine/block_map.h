/* The map of a view (FORMAT.md 5), read whole and checked: where the bytes of each block are. Does not change once loaded. */
#ifndef PGCDP_BLOCK_MAP_H
#define PGCDP_BLOCK_MAP_H

#include <stdint.h>

#include "err.h"
#include "format.h"

struct block_map_volume {
    const char *name;
    uint64_t bytes;
    uint32_t image;         /* its source */
    uint64_t first, behind; /* its extents */
};

struct block_map_source {
    enum fmt_map_source_kind kind;
    char content[5];
    uint64_t interval;
    char *path;
};

struct block_map {
    char *path;
    uint8_t *bytes; /* the whole file */
    const uint8_t *set_id;
    uint32_t volume_count, source_count;
    uint64_t extent_count;
    struct block_map_volume *volumes;
    struct block_map_source *sources;
    const struct fmt_map_extent *extents;
};

/* ERR_DAMAGE with file and offset for anything that FORMAT.md does not allow, or -errno. */
int block_map_load(struct block_map **out, const char *path, struct err *e);
void block_map_free(struct block_map *m);

/* The extent that names `block`, or NULL: the image has it. *run: for how many blocks from it on, at least 1, that is so. */
const struct fmt_map_extent *block_map_find(const struct block_map *m, uint32_t volume, uint64_t block, uint64_t *run);

#endif
