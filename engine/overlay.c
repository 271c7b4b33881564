/* See overlay.h. */
#include "overlay.h"

#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "io.h"
#include "util.h"

#define BITS 64u

struct overlay {
    int fd;
    char *path;
    _Atomic uint64_t *bits; /* pages of it that nobody sets take no memory */
};

int overlay_open(struct overlay **out, const char *directory, const char *name, uint64_t bytes, struct err *e)
{
    struct overlay *o = calloc(1, sizeof *o);
    if (!o)
        return err_set(e, -ENOMEM, "no memory for what is written to %s", name);
    o->fd = -1;
    o->bits = calloc(bytes / BLOCK / BITS + 1, sizeof *o->bits);
    if (asprintf(&o->path, "%s/%s.cow", directory, name) < 0)
        o->path = NULL;
    int rc = o->bits && o->path ? 0 : err_set(e, -ENOMEM, "no memory for what is written to %s", name);
    if (rc == 0 && ((o->fd = open(o->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600)) < 0 ||
                    ftruncate(o->fd, (off_t)bytes) < 0))
        rc = err_sys(e, -errno, "cannot make %s", o->path);
    if (rc) {
        overlay_close(o);
        return rc;
    }
    *out = o;
    return 0;
}

void overlay_close(struct overlay *o)
{
    if (!o)
        return;
    if (o->fd >= 0)
        close(o->fd);
    free(o->bits);
    free(o->path);
    free(o);
}

static bool bit(const struct overlay *o, uint64_t block)
{
    return atomic_load_explicit(&o->bits[block / BITS], memory_order_acquire) >> block % BITS & 1;
}

uint64_t overlay_run(const struct overlay *o, uint64_t block, uint64_t count, bool *has)
{
    uint64_t run = 1;
    *has = bit(o, block);
    while (run < count && bit(o, block + run) == *has)
        run++;
    return run;
}

static void set_bits(struct overlay *o, uint64_t block, uint64_t count)
{
    while (count) {
        uint64_t shift = block % BITS, part = min_u64(count, BITS - shift);
        uint64_t mask = (part == BITS ? UINT64_MAX : ((uint64_t)1 << part) - 1) << shift;
        atomic_fetch_or_explicit(&o->bits[block / BITS], mask, memory_order_release);
        block += part;
        count -= part;
    }
}

int overlay_read(const struct overlay *o, uint64_t block, uint64_t count, uint8_t *to, struct err *e)
{
    int rc = io_pread(o->fd, to, count * BLOCK, block * BLOCK);
    return rc ? err_sys(e, rc, "cannot read %s at offset %" PRIu64, o->path, block * BLOCK) : 0;
}

int overlay_write(struct overlay *o, uint64_t block, uint64_t count, const uint8_t *from, struct err *e)
{
    int rc = io_pwrite("clone.write", o->fd, from, count * BLOCK, block * BLOCK);
    if (rc)
        return err_sys(e, rc, "cannot write %s at offset %" PRIu64, o->path, block * BLOCK);
    set_bits(o, block, count);
    return 0;
}

int overlay_zero(struct overlay *o, uint64_t block, uint64_t count, struct err *e)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int rc = fallocate(o->fd, mode, (off_t)(block * BLOCK), (off_t)(count * BLOCK)) < 0 ? -errno : 0;
    if (rc == -EOPNOTSUPP)
        rc = io_zero("clone.zero", o->fd, block * BLOCK, count * BLOCK);
    if (rc)
        return err_sys(e, rc, "cannot punch a hole into %s at offset %" PRIu64, o->path, block * BLOCK);
    set_bits(o, block, count);
    return 0;
}
