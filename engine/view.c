/* Notes on the design.
 *
 * A block of a view is, in this order: what was written to the view (overlay), what the map says of it (bytes in a frames
 * file, or zeros), the image's block. Requests need no order among each other: the reader thread only copies a request and
 * queues it, a few workers do the I/O and answer.
 *
 * The image moves on underneath. Before it does, a new map is loaded that names all blocks which the move changes: a request
 * is served by the map that was shown when a worker took it up, and the new one is acknowledged when the last request of the
 * old one is done. So a block of the image is only read, and judged by its sum, while nobody changes it.
 *
 * A request is served whole or not at all: the first wrong byte under it makes it EIO, alone. So nobody above ever sees a
 * byte that was not checked, and what lies elsewhere can still be read.
 *
 * Frames files are opened when they are first needed: a map may name thousands.
 */
#include "view.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "io.h"
#include "overlay.h"
#include "pool.h"
#include "shown_map.h"
#include "util.h"

#define WORKERS 4u
#define MOST_WAITING ((uint64_t)32 << 20) /* bytes of writes that wait for a worker */

struct worker_state {
    struct frame_scratch scratch;
    uint8_t *buffer; /* BACKEND_MAX_REQUEST */
};

struct view_volume {
    char *name;
    uint64_t bytes;
    struct image *image;
    struct overlay *overlay;
};

struct view {
    struct shown_map *map;
    unsigned volume_count;
    struct view_volume *volumes; /* the same under every map */
    struct frame_cache *cache;
    struct pool *pool;
    struct worker_state workers[WORKERS];
    struct done done;
    struct faults faults;
    atomic_uint_least64_t reads, bytes_read, writes, bytes_written;
};

enum request_kind { REQUEST_READ, REQUEST_WRITE, REQUEST_ZERO };

struct request {
    struct task task;
    enum request_kind kind;
    unsigned volume;
    uint64_t offset, length;
    void *cookie;
    uint8_t data[]; /* of a write */
};

/* ---- reading ---- */

static int read_frames(struct view *v, struct worker_state *w, struct taken_map *map, const struct fmt_map_extent *x,
                       uint64_t position, uint64_t length, uint8_t *to, struct err *e)
{
    const struct frame_file *file;
    int rc = taken_map_file(map, x->source, &file, e);
    if (rc)
        return rc;
    uint64_t have = frame_file_length(file);
    if (position > have || length > have - position)
        return err_set(e, ERR_DAMAGE, "%s has a stream of %" PRIu64 " bytes, the map names %" PRIu64 " at offset %" PRIu64 " of it",
                       frame_file_path(file), have, length, position);
    return frame_cache_read(v->cache, file, position, length, &w->scratch, to, e);
}

/* What the view showed before anything was written to it. */
static int read_below(struct view *v, struct worker_state *w, struct taken_map *map, unsigned volume, uint64_t block,
                      uint64_t count, uint8_t *to, struct err *e)
{
    while (count) {
        uint64_t run;
        int rc = 0;
        const struct fmt_map_extent *x = block_map_find(taken_map_blocks(map), volume, block, &run);
        run = min_u64(run, count);
        if (!x)
            rc = image_read(v->volumes[volume].image, block, run, to, e);
        else if (x->kind == FMT_EXTENT_ZEROS)
            memset(to, 0, run * BLOCK);
        else
            rc = read_frames(v, w, map, x, x->position + (block - x->block) * BLOCK, run * BLOCK, to, e);
        if (rc)
            return rc;
        block += run;
        count -= run;
        to += run * BLOCK;
    }
    return 0;
}

static int read_by(struct view *v, struct worker_state *w, struct taken_map *map, unsigned volume, uint64_t block,
                   uint64_t count, uint8_t *to, struct err *e)
{
    while (count) {
        bool written;
        uint64_t run = overlay_run(v->volumes[volume].overlay, block, count, &written);
        int rc = written ? overlay_read(v->volumes[volume].overlay, block, run, to, e)
                         : read_below(v, w, map, volume, block, run, to, e);
        if (rc)
            return rc;
        block += run;
        count -= run;
        to += run * BLOCK;
    }
    return 0;
}

static int read_blocks(struct view *v, struct worker_state *w, unsigned volume, uint64_t block, uint64_t count, uint8_t *to,
                       struct err *e)
{
    struct taken_map *map = shown_map_take(v->map);
    int rc = read_by(v, w, map, volume, block, count, to, e);
    shown_map_give(v->map, map);
    return rc;
}

/* ---- requests ---- */

/* What the reader gets: any wrong byte is EIO. A full disk under a write is told as such. */
static int answer(struct view *v, const struct request *r, int rc, const struct err *e)
{
    if (rc == 0)
        return 0;
    char where[160];
    snprintf(where, sizeof where, "volume %s offset %" PRIu64, v->volumes[r->volume].name, r->offset);
    faults_add(&v->faults, rc, e, where);
    return rc == -ENOSPC && r->kind != REQUEST_READ ? -ENOSPC : -EIO;
}

static void run_request(void *self, struct task *task, unsigned worker)
{
    struct view *v = self;
    struct request *r = (struct request *)task;
    struct worker_state *w = &v->workers[worker];
    struct err e = {.message = ""};
    uint64_t block = r->offset / BLOCK, count = r->length / BLOCK;
    int rc;
    switch (r->kind) {
    case REQUEST_READ:
        rc = answer(v, r, read_blocks(v, w, r->volume, block, count, w->buffer, &e), &e);
        atomic_fetch_add(&v->reads, 1);
        atomic_fetch_add(&v->bytes_read, r->length);
        v->done.read(r->cookie, w->buffer, (size_t)r->length, rc);
        break;
    case REQUEST_WRITE:
        rc = answer(v, r, overlay_write(v->volumes[r->volume].overlay, block, count, r->data, &e), &e);
        atomic_fetch_add(&v->writes, 1);
        atomic_fetch_add(&v->bytes_written, r->length);
        v->done.write(r->cookie, (size_t)r->length, rc);
        break;
    case REQUEST_ZERO:
        rc = answer(v, r, overlay_zero(v->volumes[r->volume].overlay, block, count, &e), &e);
        atomic_fetch_add(&v->writes, 1);
        v->done.write(r->cookie, 0, rc);
        break;
    }
    free(r);
}

static struct request *new_request(enum request_kind kind, unsigned volume, uint64_t offset, uint64_t length, size_t data,
                                   void *cookie)
{
    struct request *r = malloc(sizeof *r + data);
    if (r)
        *r = (struct request){.task.weight = sizeof *r + data,
                              .kind = kind,
                              .volume = volume,
                              .offset = offset,
                              .length = length,
                              .cookie = cookie};
    return r;
}

static void view_read(void *self, unsigned volume, uint64_t offset, size_t length, void *cookie)
{
    struct view *v = self;
    struct request *r = length <= BACKEND_MAX_REQUEST ? new_request(REQUEST_READ, volume, offset, length, 0, cookie) : NULL;
    if (r)
        pool_put(v->pool, &r->task);
    else
        v->done.read(cookie, NULL, 0, length <= BACKEND_MAX_REQUEST ? -ENOMEM : -EINVAL);
}

static void view_write(void *self, unsigned volume, uint64_t offset, const void *data, size_t length, void *cookie)
{
    struct view *v = self;
    struct request *r = new_request(REQUEST_WRITE, volume, offset, length, length, cookie);
    if (!r) {
        v->done.write(cookie, 0, -ENOMEM);
        return;
    }
    memcpy(r->data, data, length);
    pool_put(v->pool, &r->task);
}

static void view_zero(void *self, unsigned volume, uint64_t offset, uint64_t length, bool discard, void *cookie)
{
    (void)discard;
    struct view *v = self;
    struct request *r = new_request(REQUEST_ZERO, volume, offset, length, 0, cookie);
    if (r)
        pool_put(v->pool, &r->task);
    else
        v->done.write(cookie, 0, -ENOMEM);
}

static const char *view_name(void *self, unsigned volume) { return ((struct view *)self)->volumes[volume].name; }

static uint64_t view_size(void *self, unsigned volume) { return ((struct view *)self)->volumes[volume].bytes; }

static void view_set_done(void *self, const struct done *done) { ((struct view *)self)->done = *done; }

struct backend view_backend(struct view *v)
{
    return (struct backend){.self = v,
                            .volumes = v->volume_count,
                            .name = view_name,
                            .size = view_size,
                            .read = view_read,
                            .write = view_write,
                            .zero = view_zero,
                            .set_done = view_set_done};
}

/* ---- beginning and end ---- */

static int open_volumes(struct view *v, const struct block_map *map, const char *overlay, struct err *e)
{
    v->volumes = calloc(map->volume_count, sizeof *v->volumes);
    if (!v->volumes)
        return err_set(e, -ENOMEM, "no memory for a view");
    v->volume_count = map->volume_count;
    for (unsigned i = 0; i < v->volume_count; i++) {
        const struct block_map_volume *from = &map->volumes[i];
        struct view_volume *to = &v->volumes[i];
        to->bytes = from->bytes;
        if (!(to->name = strdup(from->name)))
            return err_set(e, -ENOMEM, "no memory for a view");
        int rc = image_open(&to->image, map->sources[from->image].path, (uint16_t)i, to->bytes, e);
        if (rc == 0)
            rc = overlay_open(&to->overlay, overlay, to->name, to->bytes, e);
        if (rc)
            return rc;
    }
    return 0;
}

static int open_map(struct view *v, const struct view_options *options, struct err *e)
{
    if (!(v->map = shown_map_new()))
        return err_set(e, -ENOMEM, "no memory for a view");
    int rc = shown_map_exchange(v->map, options->map, NULL, e);
    if (rc)
        return rc;
    struct taken_map *map = shown_map_take(v->map);
    rc = open_volumes(v, taken_map_blocks(map), options->overlay, e);
    shown_map_give(v->map, map);
    return rc;
}

int view_open(struct view **out, const struct view_options *options, struct err *e)
{
    struct view *v = calloc(1, sizeof *v);
    if (!v)
        return err_set(e, -ENOMEM, "no memory for a view");
    pthread_mutex_init(&v->faults.lock, NULL);
    int rc = open_map(v, options, e);
    if (rc == 0 && !(v->cache = frame_cache_new(options->cache)))
        rc = err_set(e, -ENOMEM, "no memory for a view");
    for (unsigned i = 0; rc == 0 && i < WORKERS; i++)
        if (!(v->workers[i].buffer = io_alloc(BACKEND_MAX_REQUEST)))
            rc = err_set(e, -ENOMEM, "no memory for a view");
    if (rc == 0)
        rc = pool_start(&v->pool, WORKERS, MOST_WAITING, run_request, v, e);
    if (rc) {
        view_close(v);
        return rc;
    }
    *out = v;
    return 0;
}

int view_reload(struct view *v, const char *map, const char *from, struct err *e)
{
    return shown_map_exchange(v->map, map, from, e);
}

void view_get_status(struct view *v, struct view_status *status)
{
    *status = (struct view_status){.reads = atomic_load(&v->reads),
                                   .bytes_read = atomic_load(&v->bytes_read),
                                   .writes = atomic_load(&v->writes),
                                   .bytes_written = atomic_load(&v->bytes_written)};
    status->reloads = shown_map_get_status(v->map, status->map, sizeof status->map);
    frame_cache_get_status(v->cache, &status->cache);
    status->faults = faults_get(&v->faults, status->fault, &status->fault_count);
}

void view_close(struct view *v)
{
    if (!v)
        return;
    pool_stop(v->pool);
    frame_cache_free(v->cache);
    for (unsigned i = 0; i < v->volume_count; i++) {
        image_close(v->volumes[i].image);
        overlay_close(v->volumes[i].overlay);
        free(v->volumes[i].name);
    }
    for (unsigned i = 0; i < WORKERS; i++) {
        frame_scratch_free(&v->workers[i].scratch);
        io_free(v->workers[i].buffer, BACKEND_MAX_REQUEST);
    }
    free(v->volumes);
    shown_map_free(v->map);
    free(v);
}
