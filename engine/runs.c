/* See runs.h. */
#include "runs.h"

#include <stdlib.h>

#include "io.h"
#include "util.h"

#define MAX_IOV 256

static int by_place_then_newest(const void *a, const void *b)
{
    const struct block *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return x->order > y->order ? -1 : 1;
}

static int write_run(const char *point, const struct volume *volumes, uint64_t key, struct iovec *iov, int iovs, struct err *e)
{
    const struct volume *v = &volumes[key >> 48];
    uint64_t block = key & (((uint64_t)1 << 48) - 1);
    int rc = io_pwritev(point, v->fd, iov, iovs, block * BLOCK);
    return rc ? err_sys(e, rc, "volume %s: cannot write at block %lu", v->name, block) : 0;
}

int runs_write(const char *point, const struct volume *volumes, struct block *blocks, size_t count, struct err *e)
{
    struct iovec iov[MAX_IOV];
    int iovs = 0, rc = 0;
    uint64_t run = 0, next = 0;
    qsort(blocks, count, sizeof *blocks, by_place_then_newest);
    for (size_t i = 0; i < count && rc == 0; i++) {
        const struct block *b = &blocks[i];
        if (i > 0 && b->key == b[-1].key)
            continue;
        if (iovs && (b->key != next || iovs == MAX_IOV)) {
            rc = write_run(point, volumes, run, iov, iovs, e);
            iovs = 0;
        }
        if (iovs == 0)
            run = b->key;
        if (iovs && (const uint8_t *)iov[iovs - 1].iov_base + iov[iovs - 1].iov_len == b->data)
            iov[iovs - 1].iov_len += BLOCK;
        else
            iov[iovs++] = (struct iovec){.iov_base = (void *)(uintptr_t)b->data, .iov_len = BLOCK};
        next = b->key + 1;
    }
    if (rc == 0 && iovs)
        rc = write_run(point, volumes, run, iov, iovs, e);
    return rc;
}
