/* See shown_map.h. A frames file belongs to all maps that name it: those of an exchange share it, and the last one closes it.
 *
 * Lock order: exchanging, lock. A file's own lock is taken under neither.
 */
#include "shown_map.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cleanup.h"

struct source_file {
    unsigned maps; /* that name it; changes under `exchanging` only */
    pthread_mutex_t lock;
    _Atomic(struct frame_file *) file; /* NULL until needed */
};

struct taken_map {
    struct block_map *blocks;
    struct source_file **files; /* by source; NULL for an image */
    uint64_t readers;           /* under the lock of the shown map */
};

struct shown_map {
    pthread_mutex_t exchanging;
    pthread_mutex_t lock;
    pthread_cond_t unread;
    struct taken_map *now;
    char *acknowledged; /* path of the map */
    uint64_t exchanges;
};

struct shown_map *shown_map_new(void)
{
    struct shown_map *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    pthread_mutex_init(&s->exchanging, NULL);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->unread, NULL);
    return s;
}

static void forget_file(struct source_file *f)
{
    if (!f || --f->maps)
        return;
    frame_file_close(atomic_load(&f->file));
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static void forget(struct taken_map *t)
{
    if (!t)
        return;
    for (uint32_t i = 0; t->files && i < t->blocks->source_count; i++)
        forget_file(t->files[i]);
    free(t->files);
    block_map_free(t->blocks);
    free(t);
}

void shown_map_free(struct shown_map *s)
{
    if (!s)
        return;
    forget(s->now);
    free(s->acknowledged);
    pthread_cond_destroy(&s->unread);
    pthread_mutex_destroy(&s->lock);
    pthread_mutex_destroy(&s->exchanging);
    free(s);
}

/* ---- loading ---- */

static bool is_same(const struct block_map_source *a, const struct block_map_source *b)
{
    return a->kind == b->kind && a->interval == b->interval && memcmp(a->content, b->content, sizeof a->content) == 0 &&
           strcmp(a->path, b->path) == 0;
}

/* Of the map before. A new map mostly has its sources in the same order, with more behind them: *next is where to look first. */
static struct source_file *known_file(const struct taken_map *before, const struct block_map_source *wanted, uint32_t *next)
{
    for (uint32_t i = 0; before && i < before->blocks->source_count; i++) {
        uint32_t at = (*next + i) % before->blocks->source_count;
        if (before->files[at] && is_same(&before->blocks->sources[at], wanted)) {
            *next = at + 1;
            return before->files[at];
        }
    }
    return NULL;
}

static struct source_file *new_file(void)
{
    struct source_file *f = calloc(1, sizeof *f);
    if (f)
        pthread_mutex_init(&f->lock, NULL);
    return f;
}

static int find_files(struct taken_map *t, const struct taken_map *before, struct err *e)
{
    uint32_t next = 0;
    t->files = calloc((size_t)t->blocks->source_count + 1, sizeof *t->files);
    if (!t->files)
        return err_set(e, -ENOMEM, "no memory for the map %s", t->blocks->path);
    for (uint32_t i = 0; i < t->blocks->source_count; i++) {
        const struct block_map_source *source = &t->blocks->sources[i];
        if (source->kind != FMT_MAP_FRAMES)
            continue;
        struct source_file *file = known_file(before, source, &next);
        if (!file && !(file = new_file()))
            return err_set(e, -ENOMEM, "no memory for the map %s", t->blocks->path);
        file->maps++;
        t->files[i] = file;
    }
    return 0;
}

static int check_like(const struct block_map *m, const struct block_map *before, struct err *e)
{
    const size_t id_bytes = sizeof ((const struct fmt_map *)m->bytes)->set_id;
    bool same = m->volume_count == before->volume_count && memcmp(m->set_id, before->set_id, id_bytes) == 0;
    for (uint32_t i = 0; same && i < m->volume_count; i++) {
        const struct block_map_volume *a = &m->volumes[i], *b = &before->volumes[i];
        same = strcmp(a->name, b->name) == 0 && a->bytes == b->bytes &&
               strcmp(m->sources[a->image].path, before->sources[b->image].path) == 0;
    }
    return same ? 0 : err_set(e, ERR_DAMAGE, "%s has other volumes than the map that is shown, at offset 0", m->path);
}

static int load(struct taken_map **out, const char *path, const struct taken_map *before, struct err *e)
{
    struct taken_map *t = calloc(1, sizeof *t);
    if (!t)
        return err_set(e, -ENOMEM, "no memory for the map %s", path);
    int rc = block_map_load(&t->blocks, path, e);
    if (rc == 0 && before)
        rc = check_like(t->blocks, before->blocks, e);
    if (rc == 0)
        rc = find_files(t, before, e);
    if (rc) {
        forget(t);
        return rc;
    }
    *out = t;
    return 0;
}

/* ---- exchanging ---- */

int shown_map_exchange(struct shown_map *s, const char *path, const char *from, struct err *e)
{
    struct taken_map *before, *now = NULL;
    HOLD_LOCK(&s->exchanging);
    if (from && strcmp(from, s->acknowledged) != 0)
        return err_set(e, -EBUSY, "the map %s is shown, not %s", s->acknowledged, from);
    CLEANUP_FREE char *name = strdup(path);
    int rc = name ? load(&now, path, s->now, e) : err_set(e, -ENOMEM, "no memory for the map %s", path);
    if (rc)
        return rc;
    pthread_mutex_lock(&s->lock);
    before = s->now;
    s->now = now;
    while (before && before->readers)
        pthread_cond_wait(&s->unread, &s->lock);
    s->exchanges += before != NULL;
    char *told = s->acknowledged;
    s->acknowledged = name;
    name = told;
    pthread_mutex_unlock(&s->lock);
    forget(before);
    return 0;
}

struct taken_map *shown_map_take(struct shown_map *s)
{
    HOLD_LOCK(&s->lock);
    s->now->readers++;
    return s->now;
}

void shown_map_give(struct shown_map *s, struct taken_map *t)
{
    HOLD_LOCK(&s->lock);
    if (--t->readers == 0)
        pthread_cond_signal(&s->unread);
}

uint64_t shown_map_get_status(struct shown_map *s, char *path, size_t room)
{
    HOLD_LOCK(&s->lock);
    snprintf(path, room, "%s", s->acknowledged);
    return s->exchanges;
}

/* ---- reading by it ---- */

const struct block_map *taken_map_blocks(const struct taken_map *t) { return t->blocks; }

int taken_map_file(struct taken_map *t, uint32_t source, const struct frame_file **file, struct err *e)
{
    struct source_file *f = t->files[source];
    if ((*file = atomic_load(&f->file)))
        return 0;
    HOLD_LOCK(&f->lock);
    if ((*file = atomic_load(&f->file)))
        return 0;
    const struct block_map_source *found = &t->blocks->sources[source];
    struct frame_identity wanted = {.content = found->content, .set_id = t->blocks->set_id, .interval = found->interval};
    struct frame_file *opened;
    int rc = frame_file_open(&opened, found->path, &wanted, e);
    if (rc)
        return rc;
    atomic_store(&f->file, opened);
    *file = opened;
    return 0;
}
