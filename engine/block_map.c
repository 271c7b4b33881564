/* See block_map.h. Nothing of the file is believed: the checksum tells of accidents, every length and index is looked at
 * all the same, before it is used.
 */
#include "block_map.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"
#include "io.h"
#include "util.h"

#define LONGEST_PATH (PATH_MAX - 8u) /* with the ends of an image's files */
#define MOST_BYTES ((uint64_t)1 << 58) /* of a volume: a block number and a volume fit into 64 bits elsewhere */

static int damage(const struct block_map *m, struct err *e, const char *what, uint64_t offset)
{
    int rc = err_set(e, ERR_DAMAGE, "%s has %s at offset %" PRIu64, m->path, what, offset);
    err_hint(e, "it belongs to one view: run the command again");
    return rc;
}

static int read_whole(struct block_map *m, uint64_t *size, struct err *e)
{
    CLEANUP_CLOSE int fd = open(m->path, O_RDONLY | O_CLOEXEC);
    int rc = fd < 0 ? -errno : io_size(fd, size);
    if (rc)
        return err_sys(e, rc, "cannot open the map %s", m->path);
    if (*size < sizeof(struct fmt_map))
        return damage(m, e, "its end", *size);
    m->bytes = malloc(*size);
    if (!m->bytes)
        return err_set(e, -ENOMEM, "no memory for the map %s of %" PRIu64 " bytes", m->path, *size);
    if ((rc = io_pread(fd, m->bytes, *size, 0)))
        return err_sys(e, rc, "cannot read the map %s", m->path);
    return 0;
}

/* Sizes: *paths is where the paths begin, *extents where they end. */
static int check_head(struct block_map *m, uint64_t size, uint64_t *paths, uint64_t *extents, struct err *e)
{
    const struct fmt_map *h = (const struct fmt_map *)m->bytes;
    if (memcmp(h->magic, FMT_MAP_MAGIC, sizeof h->magic) || h->version != FORMAT_VERSION || h->length != size ||
        checksum_zeroed(m->bytes, size, offsetof(struct fmt_map, checksum)) != h->checksum)
        return damage(m, e, "a wrong header or checksum", 0);
    if (h->volumes == 0 || h->volumes > FMT_MAP_VOLUMES || h->sources > INT32_MAX || h->extents > size / sizeof *m->extents)
        return damage(m, e, "a wrong number of volumes, sources or extents", offsetof(struct fmt_map, volumes));
    *paths = sizeof *h + (uint64_t)h->volumes * sizeof(struct fmt_map_volume) + (uint64_t)h->sources * sizeof(struct fmt_map_source);
    *extents = size - h->extents * sizeof *m->extents;
    if (*paths > *extents || *extents % 8)
        return damage(m, e, "more volumes, sources and extents than bytes", offsetof(struct fmt_map, volumes));
    m->set_id = h->set_id;
    m->volume_count = h->volumes;
    m->source_count = h->sources;
    m->extent_count = h->extents;
    m->extents = (const struct fmt_map_extent *)(m->bytes + *extents);
    m->volumes = calloc(m->volume_count, sizeof *m->volumes);
    m->sources = calloc((size_t)m->source_count + 1, sizeof *m->sources);
    return m->volumes && m->sources ? 0 : err_set(e, -ENOMEM, "no memory for the map %s", m->path);
}

static int check_sources(struct block_map *m, uint64_t paths, uint64_t extents, struct err *e)
{
    uint64_t at = sizeof(struct fmt_map) + m->volume_count * sizeof(struct fmt_map_volume);
    for (uint32_t i = 0; i < m->source_count; i++, at += sizeof(struct fmt_map_source)) {
        const struct fmt_map_source *from = (const struct fmt_map_source *)(m->bytes + at);
        struct block_map_source *to = &m->sources[i];
        if (from->kind != FMT_MAP_IMAGE && from->kind != FMT_MAP_FRAMES)
            return damage(m, e, "a source of an unknown kind", at);
        if (from->path_length == 0 || from->path_length > LONGEST_PATH || from->path < paths || from->path > extents ||
            from->path_length > extents - from->path)
            return damage(m, e, "a source whose path is elsewhere", at);
        const uint8_t *path = m->bytes + from->path;
        if (path[0] != '/' || memchr(path, 0, from->path_length))
            return damage(m, e, "a path that is none", from->path);
        to->kind = from->kind;
        memcpy(to->content, from->content, sizeof from->content);
        to->interval = from->interval;
        to->path = strndup((const char *)path, from->path_length);
        if (!to->path)
            return err_set(e, -ENOMEM, "no memory for the map %s", m->path);
    }
    return 0;
}

static bool name_is_good(const struct block_map *m, const char *name, uint32_t before)
{
    if (!*name || strnlen(name, 64) == 64 || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return false;
    for (uint32_t i = 0; i < before; i++)
        if (strcmp(m->volumes[i].name, name) == 0)
            return false;
    return true;
}

static int check_volumes(struct block_map *m, struct err *e)
{
    uint64_t at = sizeof(struct fmt_map);
    for (uint32_t i = 0; i < m->volume_count; i++, at += sizeof(struct fmt_map_volume)) {
        const struct fmt_map_volume *v = (const struct fmt_map_volume *)(m->bytes + at);
        if (!name_is_good(m, v->name, i))
            return damage(m, e, "a volume whose name cannot be", at);
        if (v->bytes == 0 || v->bytes % BLOCK || v->bytes > MOST_BYTES)
            return damage(m, e, "a volume whose size cannot be", at);
        if (v->source >= m->source_count || m->sources[v->source].kind != FMT_MAP_IMAGE)
            return damage(m, e, "a volume without an image", at);
        m->volumes[i] = (struct block_map_volume){.name = v->name, .bytes = v->bytes, .image = v->source};
    }
    return 0;
}

static int check_extents(struct block_map *m, uint64_t at, struct err *e)
{
    uint32_t volume = 0;
    uint64_t end = 0; /* of the extent before, in this volume */
    for (uint64_t i = 0; i < m->extent_count; i++, at += sizeof *m->extents) {
        const struct fmt_map_extent *x = &m->extents[i];
        if (x->volume >= m->volume_count || x->volume < volume)
            return damage(m, e, "an extent of a wrong volume", at);
        if (x->volume != volume)
            end = 0;
        volume = x->volume;
        uint64_t blocks = m->volumes[volume].bytes / BLOCK;
        if (x->count == 0 || x->block < end || x->block > blocks || x->count > blocks - x->block)
            return damage(m, e, "an extent that overlaps or lies outside of its volume", at);
        if (x->kind != FMT_EXTENT_DATA && x->kind != FMT_EXTENT_ZEROS)
            return damage(m, e, "an extent of an unknown kind", at);
        if (x->kind == FMT_EXTENT_DATA &&
            (x->source >= m->source_count || m->sources[x->source].kind != FMT_MAP_FRAMES ||
             x->position > UINT64_MAX - (uint64_t)x->count * BLOCK))
            return damage(m, e, "an extent without a source", at);
        end = x->block + x->count;
        if (m->volumes[volume].behind == 0)
            m->volumes[volume].first = i;
        m->volumes[volume].behind = i + 1;
    }
    return 0;
}

int block_map_load(struct block_map **out, const char *path, struct err *e)
{
    uint64_t size = 0, paths = 0, extents = 0;
    struct block_map *m = calloc(1, sizeof *m);
    if (!m || !(m->path = strdup(path))) {
        free(m);
        return err_set(e, -ENOMEM, "no memory for the map %s", path);
    }
    int rc = read_whole(m, &size, e);
    if (rc == 0)
        rc = check_head(m, size, &paths, &extents, e);
    if (rc == 0)
        rc = check_sources(m, paths, extents, e);
    if (rc == 0)
        rc = check_volumes(m, e);
    if (rc == 0)
        rc = check_extents(m, extents, e);
    if (rc) {
        block_map_free(m);
        return rc;
    }
    *out = m;
    return 0;
}

void block_map_free(struct block_map *m)
{
    if (!m)
        return;
    for (uint32_t i = 0; m->sources && i < m->source_count; i++)
        free(m->sources[i].path);
    free(m->volumes);
    free(m->sources);
    free(m->bytes);
    free(m->path);
    free(m);
}

const struct fmt_map_extent *block_map_find(const struct block_map *m, uint32_t volume, uint64_t block, uint64_t *run)
{
    const struct block_map_volume *v = &m->volumes[volume];
    uint64_t low = v->first, high = v->behind; /* the first extent that ends behind `block` */
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (m->extents[middle].block + m->extents[middle].count <= block)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == v->behind) {
        *run = v->bytes / BLOCK - block;
        return NULL;
    }
    const struct fmt_map_extent *x = &m->extents[low];
    if (x->block > block) {
        *run = x->block - block;
        return NULL;
    }
    *run = x->block + x->count - block;
    return x;
}
