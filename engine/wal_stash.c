/* See wal_stash.h. */
#include "wal_stash.h"

#include <stdlib.h>
#include <string.h>

#include "util.h"

bool stash_open(struct stash *s)
{
    s->data = calloc(STASHED, sizeof *s->data);
    return s->data;
}

void stash_close(struct stash *s) { free(s->data); }

uint32_t stash_find(const struct stash *s, uint16_t volume, uint64_t place)
{
    for (uint32_t i = 0; i < STASHED; i++)
        if (s->place[i] == place && s->write[i] && s->volume[i] == volume)
            return i;
    return STASHED;
}

static bool within(struct stash_span span, uint64_t write) { return write >= span.from && write <= span.to; }

/* The oldest one, of those that are not kept if there is any. */
static uint32_t oldest(const struct stash *s, struct stash_span kept)
{
    uint32_t found = 0;
    bool found_kept = true;
    for (uint32_t i = 0; i < STASHED; i++) {
        bool is_kept = s->write[i] && within(kept, s->write[i]);
        if (i && (is_kept != found_kept ? is_kept : s->write[i] >= s->write[found]))
            continue;
        found = i;
        found_kept = is_kept;
    }
    return found;
}

static void put_at(struct stash *s, uint32_t i, uint16_t volume, uint64_t place, uint64_t write)
{
    s->place[i] = place;
    s->write[i] = write;
    s->volume[i] = volume;
}

uint32_t stash_put(struct stash *s, uint16_t volume, uint64_t place, uint64_t write, const uint8_t *block,
                   struct stash_span kept)
{
    uint32_t i = stash_find(s, volume, place);
    if (i == STASHED)
        i = oldest(s, kept);
    put_at(s, i, volume, place, write);
    memcpy(s->data[i], block, BLOCK);
    return i;
}

/* ---- between runs ---- */

struct saved_half { /* FORMAT.md 4.2 */
    uint64_t place, write;
    uint16_t volume, reserved[3];
};

static bool worth_saving(const struct stash *s, uint32_t i, uint64_t write, struct stash_span kept)
{
    return s->write[i] && (s->write[i] + STASH_WRITES > write || within(kept, s->write[i]));
}

uint32_t stash_save_count(const struct stash *s, uint64_t write, struct stash_span kept)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < STASHED; i++)
        count += worth_saving(s, i, write, kept);
    return count;
}

void stash_save(const struct stash *s, uint64_t write, struct stash_span kept, FILE *out)
{
    for (uint32_t i = 0; i < STASHED; i++) {
        if (!worth_saving(s, i, write, kept))
            continue;
        struct saved_half saved = {.place = s->place[i], .write = s->write[i], .volume = s->volume[i]};
        fwrite(&saved, sizeof saved, 1, out);
        fwrite(s->data[i], BLOCK, 1, out);
    }
}

bool stash_restore(struct stash *s, uint32_t count, struct cursor *in)
{
    for (uint32_t i = 0; i < count; i++) {
        struct saved_half saved;
        if (i == STASHED || !cursor_copy(in, &saved, sizeof saved) || !cursor_copy(in, s->data[i], BLOCK))
            return false;
        put_at(s, i, saved.volume, saved.place, saved.write);
    }
    return true;
}
