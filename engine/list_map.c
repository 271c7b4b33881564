/* `map`: the map of a view shown to people and tests, a JSON object a line: volumes, sources, extents. */
#include "list_map.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "block_map.h"
#include "command.h"

static int print(json_t *line)
{
    int rc = line && json_dumpf(line, stdout, JSON_COMPACT) == 0 && putchar('\n') != EOF ? 0 : -EIO;
    json_decref(line);
    return rc;
}

static int list(const struct block_map *m)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < m->volume_count; i++)
        rc = print(json_pack("{s:s, s:I, s:i}", "volume", m->volumes[i].name, "bytes", (json_int_t)m->volumes[i].bytes, "source",
                             (int)m->volumes[i].image));
    for (uint32_t i = 0; rc == 0 && i < m->source_count; i++)
        rc = print(json_pack("{s:s, s:s, s:I, s:s}", "source", m->sources[i].kind == FMT_MAP_IMAGE ? "image" : "frames", "content",
                             m->sources[i].content, "interval", (json_int_t)m->sources[i].interval, "path", m->sources[i].path));
    for (uint64_t i = 0; rc == 0 && i < m->extent_count; i++) {
        const struct fmt_map_extent *x = &m->extents[i];
        rc = print(json_pack("{s:I, s:i, s:I, s:s, s:I, s:I}", "block", (json_int_t)x->block, "on", (int)x->volume, "count",
                             (json_int_t)x->count, "kind", x->kind == FMT_EXTENT_ZEROS ? "zeros" : "data", "position",
                             (json_int_t)x->position, "source", (json_int_t)x->source));
    }
    return rc;
}

int cmd_map(int argc, char **argv)
{
    struct block_map *m;
    struct err e = {.message = "", .hint = ""};
    if (argc != 2) {
        err_set(&e, ERR_USAGE, "usage: pgcdp-engine map FILE");
        return command_failed(&e, ERR_USAGE);
    }
    int rc = block_map_load(&m, argv[1], &e);
    if (rc)
        return command_failed(&e, rc);
    rc = list(m);
    block_map_free(m);
    if (rc || fflush(stdout))
        return command_failed(&e, err_set(&e, -EIO, "cannot write the listing (a name may be no UTF-8)"));
    return 0;
}
