/* See tracked.h. */
#include "tracked.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"
#include "io.h"
#include "log.h"
#include "util.h"

#define NAME "tracked"
#define NEW_NAME "tracked.new"
#define HEAD_BYTES ((uint64_t)2 * FMT_HEADER_BYTES)
#define PAGE_SECTORS (BLOCK / FMT_TRACKED_SECTOR)
#define PAGE_BITS (PAGE_SECTORS * FMT_TRACKED_BITS)
#define CHUNK_PAGES ((uint64_t)64)

struct tracked {
    int dir, fd;
    struct fmt_tracked head;
    bool unnamed; /* it has its name, but the directory's sync failed: after a power cut the old one may be there */
    uint64_t first_page[MAX_VOLUMES + 1]; /* of each volume; the last one is their number */
    uint8_t *marked, *todo;               /* as in the file: a page is 4096 bytes */
    uint8_t *dirty;                       /* of each page: whether the file may have something else */
    uint64_t marked_count, todo_count;
};

static uint64_t pages_of(const struct tracked *t) { return t->first_page[t->head.volumes]; }

/* ---- bits ---- */

static struct fmt_tracked_sector *sector_of(uint8_t *pages, uint64_t sector)
{
    return (void *)(pages + sector * FMT_TRACKED_SECTOR);
}

static uint64_t first_sector(const struct tracked *t, unsigned volume) { return t->first_page[volume] * PAGE_SECTORS; }

/* Sets or clears bits; how many were changed. */
static uint64_t change(struct tracked *t, uint8_t *pages, uint8_t *dirty, struct tracked_run run, bool set)
{
    uint64_t changed = 0;
    for (uint64_t block = run.first; block < run.first + run.count; block++) {
        uint64_t sector = first_sector(t, run.volume) + block / FMT_TRACKED_BITS, bit = block % FMT_TRACKED_BITS;
        uint8_t *byte = &sector_of(pages, sector)->bits[bit / 8], mask = (uint8_t)(1u << bit % 8);
        if (((*byte & mask) != 0) == set)
            continue;
        *byte ^= mask;
        changed++;
        if (dirty)
            dirty[sector / PAGE_SECTORS] = 1;
    }
    return changed;
}

static void count_marked(struct tracked *t, uint64_t by) { __atomic_add_fetch(&t->marked_count, by, __ATOMIC_RELAXED); }

void tracked_mark(struct tracked *t, unsigned volume, uint64_t first, uint64_t count)
{
    count_marked(t, change(t, t->marked, t->dirty, (struct tracked_run){volume, first, count}, true));
}

void tracked_unmark(struct tracked *t, unsigned volume, uint64_t first, uint64_t count)
{
    count_marked(t, 0 - change(t, t->marked, t->dirty, (struct tracked_run){volume, first, count}, false));
}

uint64_t tracked_marked(const struct tracked *t) { return __atomic_load_n(&t->marked_count, __ATOMIC_RELAXED); }

void tracked_add_todo(struct tracked *t, unsigned volume, uint64_t first, uint64_t count)
{
    t->todo_count += change(t, t->todo, NULL, (struct tracked_run){volume, first, count}, true);
}

void tracked_drop_todo(struct tracked *t, unsigned volume, uint64_t first, uint64_t count)
{
    if (t->todo_count)
        t->todo_count -= change(t, t->todo, NULL, (struct tracked_run){volume, first, count}, false);
}

uint64_t tracked_todo(const struct tracked *t) { return t->todo_count; }

static bool empty(const struct fmt_tracked_sector *s)
{
    static const uint8_t nothing[sizeof s->bits];
    return memcmp(s->bits, nothing, sizeof nothing) == 0;
}

static bool is_todo(const struct tracked *t, unsigned volume, uint64_t block)
{
    const struct fmt_tracked_sector *s = sector_of(t->todo, first_sector(t, volume) + block / FMT_TRACKED_BITS);
    return s->bits[block % FMT_TRACKED_BITS / 8] >> block % 8 & 1;
}

bool tracked_next(const struct tracked *t, struct tracked_run from, uint64_t most, struct tracked_run *out)
{
    uint64_t block = from.first;
    for (unsigned v = from.volume; v < t->head.volumes; v++, block = 0) {
        while (block < t->head.blocks[v] && !is_todo(t, v, block))
            if (block % FMT_TRACKED_BITS == 0 && empty(sector_of(t->todo, first_sector(t, v) + block / FMT_TRACKED_BITS)))
                block += FMT_TRACKED_BITS;
            else
                block++;
        if (block >= t->head.blocks[v])
            continue;
        *out = (struct tracked_run){.volume = v, .first = block, .count = 1};
        while (out->count < most && block + out->count < t->head.blocks[v] && is_todo(t, v, block + out->count))
            out->count++;
        return true;
    }
    return false;
}

/* ---- the file ---- */

static void seal(uint8_t *page, uint64_t number)
{
    for (uint64_t i = 0; i < PAGE_SECTORS; i++) {
        struct fmt_tracked_sector *s = sector_of(page, i);
        s->number = (uint32_t)(number * PAGE_SECTORS + i);
        s->checksum = checksum_zeroed(s, FMT_TRACKED_SECTOR, offsetof(struct fmt_tracked_sector, checksum));
    }
}

static int write_pages(struct tracked *t, uint64_t first, uint64_t count)
{
    for (uint64_t i = first; i < first + count; i++)
        seal(t->marked + i * BLOCK, i);
    return io_pwrite("tracked.bits.write", t->fd, t->marked + first * BLOCK, count * BLOCK, HEAD_BYTES + first * BLOCK);
}

int tracked_flush(struct tracked *t)
{
    uint64_t pages = pages_of(t), any = 0;
    for (uint64_t i = 0, count; i < pages; i += count) {
        for (count = 0; i + count < pages && count < CHUNK_PAGES && t->dirty[i + count]; count++)
            ;
        int rc = count ? write_pages(t, i, count) : 0;
        if (rc)
            return rc;
        any += count;
        if (count == 0)
            count = 1;
    }
    int rc = any ? io_fdatasync("tracked.bits.sync", t->fd) : 0;
    if (rc == 0 && any)
        memset(t->dirty, 0, pages); /* else all of them are written once more: what a failed sync has left is not known */
    return rc;
}

static int write_head(struct tracked *t)
{
    uint8_t *slot = io_alloc(FMT_HEADER_BYTES);
    if (!slot)
        return -ENOMEM;
    t->head.sequence++;
    t->head.checksum = 0;
    memcpy(slot, &t->head, sizeof t->head);
    t->head.checksum = checksum_zeroed(slot, FMT_HEADER_BYTES, offsetof(struct fmt_tracked, checksum));
    memcpy(slot, &t->head, sizeof t->head);
    int rc = t->unnamed ? io_fsync_dir("tracked.state.directory", t->dir) : 0;
    t->unnamed = t->unnamed && rc;
    for (uint64_t i = 0; rc == 0 && i < 2; i++) {
        rc = io_pwrite("tracked.state.write", t->fd, slot, FMT_HEADER_BYTES, i * FMT_HEADER_BYTES);
        if (rc == 0)
            rc = io_fdatasync("tracked.state.sync", t->fd);
    }
    io_free(slot, FMT_HEADER_BYTES);
    return rc;
}

struct fmt_tracking tracked_state(const struct tracked *t)
{
    if (!t || t->head.state == FMT_TRACKED_IDLE)
        return (struct fmt_tracking){.state = FMT_TRACKED_IDLE};
    return (struct fmt_tracking){
        .state = t->head.state, .since_ns = t->head.since_ns, .behind = t->head.behind, .begin_ns = t->head.begin_ns};
}

void tracked_take_state(struct tracked *t, const struct fmt_tracking *from)
{
    t->head.state = from->state;
    t->head.since_ns = from->since_ns;
    t->head.behind = from->behind;
    t->head.begin_ns = from->begin_ns;
}

int tracked_set_state(struct tracked *t, const struct fmt_tracking *to)
{
    struct fmt_tracked before = t->head;
    tracked_take_state(t, to);
    int rc = write_head(t);
    if (rc && to->state == FMT_TRACKED_IDLE) { /* the gap is told of until it is written */
        before.sequence = t->head.sequence;
        t->head = before;
    }
    return rc;
}

/* ---- opening ---- */

static int set_up(struct tracked *t, const uint64_t *blocks, unsigned count, struct err *e)
{
    t->head.volumes = count;
    for (unsigned v = 0; v < count; v++) {
        t->head.blocks[v] = blocks[v];
        t->first_page[v + 1] = t->first_page[v] + (blocks[v] + PAGE_BITS - 1) / PAGE_BITS;
    }
    uint64_t pages = pages_of(t);
    t->marked = io_alloc(pages * BLOCK);
    t->todo = io_alloc(pages * BLOCK);
    t->dirty = calloc(pages, 1);
    return t->marked && t->todo && t->dirty ? 0 : err_sys(e, -ENOMEM, "bitmap of changed blocks");
}

static struct tracked *new_tracked(int dir)
{
    struct tracked *t = calloc(1, sizeof *t);
    if (t)
        *t = (struct tracked){.dir = fcntl(dir, F_DUPFD_CLOEXEC, 0), .fd = -1};
    return t;
}

static int write_all(struct tracked *t)
{
    uint64_t pages = pages_of(t);
    uint8_t *chunk = io_alloc(CHUNK_PAGES * BLOCK);
    int rc = chunk ? io_reserve("tracked.new.reserve", t->fd, HEAD_BYTES + pages * BLOCK) : -ENOMEM;
    for (uint64_t i = 0; rc == 0 && i < pages; i += CHUNK_PAGES) {
        uint64_t count = min_u64(CHUNK_PAGES, pages - i);
        if (t->marked_count) /* else its memory is not touched */
            memcpy(chunk, t->marked + i * BLOCK, count * BLOCK);
        for (uint64_t k = 0; k < count; k++)
            seal(chunk + k * BLOCK, i + k);
        rc = io_pwrite("tracked.new.write", t->fd, chunk, count * BLOCK, HEAD_BYTES + i * BLOCK);
    }
    io_free(chunk, CHUNK_PAGES * BLOCK);
    if (rc == 0)
        rc = write_head(t);
    return rc ? rc : io_fsync_file("tracked.new.sync", t->fd);
}

/* Nothing of a bitmap that is lost is known: each block counts as changed. */
static void mark_all(struct tracked *t)
{
    for (unsigned v = 0; v < t->head.volumes; v++)
        tracked_mark(t, v, 0, t->head.blocks[v]);
}

/* What another one has to do, of which all is marked, and nothing behind the end of these volumes. */
static void mark_as(struct tracked *t, const struct tracked *other)
{
    struct tracked_run run = {.count = 0};
    while (tracked_next(other, (struct tracked_run){run.volume, run.first + run.count, 0}, UINT64_MAX, &run))
        tracked_mark(t, run.volume, run.first, run.count);
}

/* All that is marked is to do. */
static void do_marked(struct tracked *t)
{
    for (uint64_t sector = 0; sector < pages_of(t) * PAGE_SECTORS; sector++) /* pages without a bit stay untouched in memory */
        if (!empty(sector_of(t->marked, sector)))
            memcpy(sector_of(t->todo, sector), sector_of(t->marked, sector), FMT_TRACKED_SECTOR);
    t->todo_count = t->marked_count;
}

/* One in the place of any other, durably there with its next state at the latest. It is idle, or in that `state`, with
 * what the `other` one says, or, if that is lost (NULL), with each block marked. */
static int make(struct tracked **out, int dir, const uint8_t set_id[16], const uint64_t *blocks, unsigned count,
                const struct fmt_tracking *state, const struct tracked *other, struct err *e)
{
    struct tracked *t = new_tracked(dir);
    if (!t)
        return err_sys(e, -ENOMEM, "bitmap of changed blocks");
    memcpy(t->head.magic, FMT_TRACKED_MAGIC, 8);
    t->head.version = FORMAT_VERSION;
    memcpy(t->head.set_id, set_id, 16);
    int rc = set_up(t, blocks, count, e);
    if (rc == 0 && state) {
        tracked_take_state(t, state);
        if (other)
            mark_as(t, other);
        else
            mark_all(t);
        do_marked(t);
    }
    if (rc == 0) {
        t->fd = openat(dir, NEW_NAME, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_DIRECT, 0600);
        rc = t->fd < 0 ? -errno : write_all(t);
        if (rc == 0)
            rc = io_rename("tracked.new.rename", dir, NEW_NAME, NAME);
        if (rc == 0) /* from here on the old one has no name any more */
            t->unnamed = io_fsync_dir("tracked.new.directory", dir) != 0;
        if (rc) {
            err_sys(e, rc, "cannot make the bitmap of changed blocks, %lu bytes in the journal's directory",
                    HEAD_BYTES + pages_of(t) * BLOCK);
            err_hint(e, "on_full = track needs it before the journal is full: give that disk room");
            io_unlink("tracked.new.unlink", dir, NEW_NAME);
            rc = ERR_PRECONDITION;
        }
    }
    if (rc) {
        tracked_close(t);
        return rc;
    }
    *out = t;
    return 0;
}

/* 1 with the better slot, 0 when there is none, or -errno. */
static int read_head(int fd, struct fmt_tracked *out, struct err *e)
{
    int found = 0;
    for (uint64_t slot = 0; slot < 2; slot++) {
        uint8_t *block = io_alloc(FMT_HEADER_BYTES);
        int rc = block ? io_pread(fd, block, FMT_HEADER_BYTES, slot * FMT_HEADER_BYTES) : -ENOMEM;
        struct fmt_tracked h;
        if (rc == 0)
            memcpy(&h, block, sizeof h);
        bool right = rc == 0 && memcmp(h.magic, FMT_TRACKED_MAGIC, 8) == 0 &&
                     checksum_zeroed(block, FMT_HEADER_BYTES, offsetof(struct fmt_tracked, checksum)) == h.checksum;
        io_free(block, FMT_HEADER_BYTES);
        if (rc && rc != -ENODATA)
            return err_sys(e, rc, "cannot read the journal's bitmap of changed blocks");
        if (right && (!found || h.sequence > out->sequence)) {
            *out = h;
            found = 1;
        }
    }
    return found;
}

/* A sector that is not what was written: each of its blocks may have been changed. */
static void take_sector(struct tracked *t, unsigned volume, uint64_t sector, const uint8_t *read)
{
    struct fmt_tracked_sector *s = sector_of(t->marked, sector);
    struct fmt_tracked_sector found;
    memcpy(&found, read, FMT_TRACKED_SECTOR);
    uint64_t first = (sector - first_sector(t, volume)) * FMT_TRACKED_BITS;
    if (found.number == sector &&
        checksum_zeroed(read, FMT_TRACKED_SECTOR, offsetof(struct fmt_tracked_sector, checksum)) == found.checksum) {
        if (empty(&found))
            return; /* its memory is not touched */
        memcpy(s, read, FMT_TRACKED_SECTOR);
        for (unsigned i = 0; i < sizeof found.bits; i++)
            t->marked_count += (unsigned)__builtin_popcount(found.bits[i]);
    } else if (first < t->head.blocks[volume]) {
        log_warn("journal: tracked is damaged at offset %lu: blocks %lu and following of volume %u count as changed",
                 HEAD_BYTES + sector * FMT_TRACKED_SECTOR, first, volume);
        tracked_mark(t, volume, first, min_u64(FMT_TRACKED_BITS, t->head.blocks[volume] - first));
    }
}

/* `blocks`: of each volume; one that was to grow, and did not, has fewer than the bitmap, or more. */
static int load(struct tracked *t, const uint64_t *blocks, struct err *e)
{
    uint8_t *page = io_alloc(BLOCK);
    int rc = page ? 0 : -ENOMEM;
    for (unsigned v = 0; v < t->head.volumes; v++)
        for (uint64_t i = t->first_page[v]; rc == 0 && i < t->first_page[v + 1]; i++) {
            rc = io_pread(t->fd, page, BLOCK, HEAD_BYTES + i * BLOCK);
            if (rc == -ENODATA) { /* it was cut off: no sector of zeros is one that was written */
                memset(page, 0, BLOCK);
                rc = 0;
            }
            for (uint64_t k = 0; rc == 0 && k < PAGE_SECTORS; k++)
                take_sector(t, v, i * PAGE_SECTORS + k, page + k * FMT_TRACKED_SECTOR);
        }
    io_free(page, BLOCK);
    if (rc)
        return err_sys(e, rc, "cannot read the journal's bitmap of changed blocks");
    for (unsigned v = 0; v < t->head.volumes; v++)
        if (blocks[v] < t->head.blocks[v])
            tracked_unmark(t, v, blocks[v], t->head.blocks[v] - blocks[v]);
    do_marked(t);
    return 0;
}

enum fit { NOT_AT_ALL, MADE_ANEW, AS_IT_IS };

/* What a bitmap is to these volumes. A grow that was interrupted leaves either of both larger. */
static enum fit fit_of(const struct fmt_tracked *h, const uint64_t *blocks, unsigned count)
{
    bool idle = h->state == FMT_TRACKED_IDLE;
    enum fit fit = AS_IT_IS;
    if (h->volumes != count)
        return NOT_AT_ALL;
    for (unsigned v = 0; v < count; v++)
        if (h->blocks[v] < blocks[v] || (idle && h->blocks[v] > blocks[v]))
            fit = MADE_ANEW;
    return fit;
}

static int refuse_head(const struct fmt_tracked *h, const uint8_t set_id[16], struct err *e)
{
    if (h->version != FORMAT_VERSION)
        return err_set(e, ERR_PRECONDITION, "tracked has format version %u, this program knows %u", h->version, FORMAT_VERSION);
    if (memcmp(h->set_id, set_id, 16) != 0)
        return err_set(e, ERR_PRECONDITION, "tracked belongs to another volume set");
    return 0;
}

/* What is not there yet may be lacking: production does not wait for a bitmap that has nothing to say. */
static int make_or_warn(struct tracked **out, int dir, const uint8_t set_id[16], const uint64_t *blocks, unsigned count)
{
    struct err e = {.message = ""};
    if (make(out, dir, set_id, blocks, count, NULL, NULL, &e) != 0)
        log_warn("%s; until the next start writes wait when the journal is full, as with on_full = stall", e.message);
    return 0;
}

/* The file is not there, or neither of its heads is what was written (`damaged`): the applied mark tells what it said. */
static int make_anew(struct tracked **out, int dir, const uint8_t set_id[16], const uint64_t *blocks, unsigned count, bool wanted,
                     bool damaged, const struct fmt_tracking *marked, struct err *e)
{
    const char *how = damaged ? "damaged: neither slot of tracked is what was written" : "missing: the file tracked";
    if (damaged && !marked) {
        err_set(e, ERR_DAMAGE, "the journal's bitmap of changed blocks is %s, and there is no applied mark", how);
        err_hint(e, "bring the files tracked and applied back");
        return ERR_DAMAGE;
    }
    if (marked && marked->state != FMT_TRACKED_IDLE) {
        int rc = make(out, dir, set_id, blocks, count, marked, NULL, e);
        if (rc == 0)
            log_error("the journal's bitmap of changed blocks is %s, though changes are tracked: each block counts as changed, and "
                      "comes into the journal", how);
        return rc;
    }
    if (damaged)
        log_warn("the journal's bitmap of changed blocks is %s; nothing was tracked", how);
    return wanted ? make_or_warn(out, dir, set_id, blocks, count) : 0;
}

/* One that is not idle, from its file. The file is the bitmap's, also when this fails. */
static int take_up(struct tracked **out, int dir, int fd, const struct fmt_tracked *head, const uint64_t *blocks, struct err *e)
{
    struct tracked *t = new_tracked(dir);
    if (!t) {
        close(fd);
        return err_sys(e, -ENOMEM, "bitmap of changed blocks");
    }
    t->head = *head;
    t->fd = fd;
    int rc = set_up(t, head->blocks, head->volumes, e);
    if (rc == 0) /* also when idle: a kill may have come between that and the last bit's clearing */
        rc = load(t, blocks, e);
    if (rc) {
        tracked_close(t);
        return rc;
    }
    *out = t;
    return 0;
}

int tracked_open(struct tracked **out, const char *directory, const uint8_t set_id[16], const struct volume *volumes,
                 unsigned count, bool wanted, bool put_back, const struct fmt_tracking *marked, struct err *e)
{
    uint64_t blocks[MAX_VOLUMES];
    struct fmt_tracked head = {.volumes = 0};
    CLEANUP_CLOSE int dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *out = NULL;
    if (dir < 0)
        return err_sys(e, -errno, "cannot open the journal %s", directory);
    for (unsigned v = 0; v < count; v++)
        blocks[v] = volume_size(&volumes[v]) / BLOCK;
    CLEANUP_CLOSE int fd = openat(dir, NAME, O_RDWR | O_CLOEXEC | O_DIRECT);
    if (fd < 0 && errno != ENOENT)
        return err_sys(e, -errno, "cannot open the journal's bitmap of changed blocks");
    int rc = fd < 0 ? 0 : read_head(fd, &head, e);
    if (rc == 0)
        return make_anew(out, dir, set_id, blocks, count, wanted, fd >= 0, marked, e);
    if (rc < 0 || (rc = refuse_head(&head, set_id, e)) != 0)
        return rc;
    bool idle = head.state == FMT_TRACKED_IDLE, one_less = put_back && !idle && head.volumes == count + 1;
    if (one_less) /* its pages are the last ones: the file need not be another for that, nor find room */
        head.volumes = count;
    enum fit fit = fit_of(&head, blocks, count);
    if (idle && !wanted)
        return 0;
    if (idle && fit != AS_IT_IS)
        return make_or_warn(out, dir, set_id, blocks, count);
    if (fit == NOT_AT_ALL) {
        err_set(e, ERR_PRECONDITION, "the journal tracks changed blocks of %u volumes, not of these %u", head.volumes, count);
        err_hint(e, "give the volumes as they were, and change them when the set has healed");
        return ERR_PRECONDITION;
    }
    struct tracked *found = NULL;
    rc = take_up(&found, dir, fd, &head, blocks, e);
    fd = -1;
    if (rc == 0 && one_less && (rc = write_head(found)) != 0)
        err_sys(e, rc, "cannot write the journal's bitmap of changed blocks");
    if (rc == 0 && fit == MADE_ANEW) {
        struct fmt_tracking state = tracked_state(found);
        rc = make(out, dir, set_id, blocks, count, &state, found, e);
    } else if (rc == 0) {
        *out = found;
        found = NULL;
    }
    if (found)
        tracked_close(found);
    return rc;
}

int tracked_grown(struct tracked **out, const struct tracked *t, unsigned volume, uint64_t bytes, struct err *e)
{
    uint64_t blocks[MAX_VOLUMES];
    memcpy(blocks, t->head.blocks, sizeof blocks);
    blocks[volume] = bytes / BLOCK;
    return make(out, t->dir, t->head.set_id, blocks, t->head.volumes, NULL, NULL, e);
}

void tracked_close(struct tracked *t)
{
    if (!t)
        return;
    if (t->fd >= 0)
        close(t->fd);
    if (t->dir >= 0)
        close(t->dir);
    io_free(t->marked, pages_of(t) * BLOCK);
    io_free(t->todo, pages_of(t) * BLOCK);
    free(t->dirty);
    free(t);
}
