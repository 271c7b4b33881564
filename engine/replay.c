/* Like the applier (apply.c): each block once in a window. What is above the volumes waits for this when a capture process
 * follows one that died, and WAL tail pages are in the last seconds of a journal dozens of times. */
#include "replay.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "runs.h"
#include "util.h"

#define WINDOW_BYTES ((uint64_t)16 << 20)
#define WINDOW_BLOCKS (WINDOW_BYTES / BLOCK)

struct window {
    uint8_t *data;
    struct block *blocks;
    size_t count;
};

static int flush(const struct replay_volumes *to, struct window *w, struct err *e)
{
    int rc = runs_write("volume.replay.write", to->volumes, w->blocks, w->count, e);
    w->count = 0;
    return rc;
}

static int replay_zero(const struct replay_volumes *to, struct window *w, const struct fmt_record *r, struct err *e)
{
    int rc = flush(to, w, e); /* what came before it is written first */
    if (rc)
        return rc;
    const struct volume *v = &to->volumes[r->volume];
    rc = io_zero("volume.replay.zero", v->fd, r->offset, r->length);
    return rc ? err_sys(e, rc, "cannot replay write %lu to volume %s", r->number, v->name) : 0;
}

static int replay_write(const struct replay_volumes *to, struct window *w, const struct fmt_record *r, const uint8_t *data,
                        struct err *e)
{
    for (uint64_t i = 0; i < r->length; i += BLOCK) {
        int rc = w->count == WINDOW_BLOCKS ? flush(to, w, e) : 0;
        if (rc)
            return rc;
        uint8_t *copy = w->data + w->count * BLOCK;
        memcpy(copy, data + i, BLOCK);
        w->blocks[w->count++] =
            (struct block){.key = block_key(r->volume, (r->offset + i) / BLOCK), .order = r->number, .data = copy};
    }
    return 0;
}

static int replay_record(const struct replay_volumes *to, struct window *w, const struct fmt_record *r, const uint8_t *data,
                         struct err *e)
{
    if (r->kind == FMT_MARK || r->kind == FMT_FLUSH)
        return 0;
    if (to->put_back && r->volume == to->count)
        return 0; /* its backing may be what made it be given up */
    if (r->volume >= to->count || r->offset + r->length > to->volumes[r->volume].size) {
        err_set(e, ERR_PRECONDITION, "write %lu of the journal lies outside volume %u", r->number, r->volume);
        err_hint(e, "give the same volumes in the same order as when it was written");
        return ERR_PRECONDITION;
    }
    return r->kind == FMT_WRITE ? replay_write(to, w, r, data, e) : replay_zero(to, w, r, e);
}

static int replay_batches(struct jr *jr, const struct replay_volumes *to, struct window *w, uint64_t applied, uint64_t last,
                          struct replayed *out, struct err *e)
{
    struct jr_batch b;
    int rc = 0;
    /* Never past `last`: where the journal is written meanwhile, a batch behind it may be half there. */
    for (uint64_t next = applied + 1; next <= last && (rc = jr_next(jr, &b, e)) == 1; next = b.first_write + b.records) {
        const uint8_t *data = b.data;
        for (uint32_t i = 0; i < b.records && b.record[i].number <= last; i++) {
            if (b.record[i].number > applied) {
                rc = replay_record(to, w, &b.record[i], data, e);
                if (rc)
                    return rc;
                out->writes++;
                out->inside = fmt_inside(out->inside, &b.record[i], data);
            }
            data += round_block(b.record[i].data_length);
        }
    }
    return rc < 0 ? rc : 0;
}

int replay(struct jr *jr, const struct replay_volumes *to, uint64_t applied, uint64_t last, struct replayed *out, struct err *e)
{
    struct window w = {.data = io_alloc(WINDOW_BYTES), .blocks = calloc(WINDOW_BLOCKS, sizeof *w.blocks)};
    int rc = w.data && w.blocks ? 0 : err_sys(e, -ENOMEM, "replay");
    if (rc == 0)
        rc = replay_batches(jr, to, &w, applied, last, out, e);
    if (rc == 0)
        rc = flush(to, &w, e);
    for (unsigned i = 0; rc == 0 && i < to->count; i++)
        if ((rc = io_fdatasync("volume.replay.sync", to->volumes[i].fd)) != 0)
            err_sys(e, rc, "cannot sync volume %s", to->volumes[i].name);
    io_free(w.data, WINDOW_BYTES);
    free(w.blocks);
    return rc;
}
