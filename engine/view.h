/* A view: the image rolled to a recovery point by a map, and what was written to it since (a backend). */
#ifndef PGCDP_VIEW_H
#define PGCDP_VIEW_H

#include <limits.h>

#include "backend.h"
#include "err.h"
#include "faults.h"
#include "frame_cache.h"

struct view;

struct view_options {
    const char *map;     /* file (FORMAT.md 5) */
    const char *overlay; /* directory for what is written */
    uint64_t cache;      /* bytes of unpacked frames */
};

struct view_status {
    uint64_t reads, bytes_read, writes, bytes_written, reloads;
    char map[PATH_MAX]; /* the last that was acknowledged */
    struct frame_cache_status cache;
    uint64_t fault_count;
    unsigned faults;
    struct fault fault[FAULTS_KEPT];
};

/* Loads the map and opens the images. ERR_DAMAGE for what is not right with them, or -errno. */
int view_open(struct view **out, const struct view_options *options, struct err *e);

struct backend view_backend(struct view *v);

/* Shows another map of the same volumes; what was written to the view stays on top. When this returns, no read goes by the map
 * before, which must be `from` unless that is NULL. ERR_DAMAGE or -errno: that one goes on. Any thread. */
int view_reload(struct view *v, const char *map, const char *from, struct err *e);

void view_get_status(struct view *v, struct view_status *status);

/* Ends what is under way, then frees everything. The door must be closed to new requests. */
void view_close(struct view *v);

#endif
