/* See image.h. */
#include "image.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "format.h"
#include "io.h"
#include "seal.h"
#include "util.h"

#define SUMS_AT_ONCE 256u

struct image {
    int fd, sums_fd;
    char *path;
    char *sums_path;
    uint64_t zero; /* the sum of a block of zeros, before the XOR */
    uint16_t volume;
    bool sealed;
};

static int open_one(const char *path, uint64_t size, int *fd, struct err *e)
{
    uint64_t found;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0 && errno == ENOENT)
        return err_set(e, ERR_DAMAGE, "%s is missing (offset 0)", path);
    int rc = *fd < 0 ? -errno : io_size(*fd, &found);
    if (rc)
        return err_sys(e, rc, "cannot open %s", path);
    if (found < size) /* longer it is when the volume has become larger since */
        return err_set(e, ERR_DAMAGE, "%s ends at offset %" PRIu64 " instead of %" PRIu64, path, found, size);
    return 0;
}

int image_open(struct image **out, const char *stem, uint16_t volume, uint64_t bytes, struct err *e)
{
    static const uint8_t zeros[BLOCK];
    struct image *i = calloc(1, sizeof *i);
    if (!i)
        return err_set(e, -ENOMEM, "no memory to read %s", stem);
    i->fd = i->sums_fd = -1;
    i->volume = volume;
    i->sealed = seal_has_key();
    i->zero = XXH3_64bits(zeros, sizeof zeros);
    if (asprintf(&i->path, "%s.img", stem) < 0)
        i->path = NULL;
    if (asprintf(&i->sums_path, "%s.sums", stem) < 0)
        i->sums_path = NULL;
    int rc = i->path && i->sums_path ? 0 : err_set(e, -ENOMEM, "no memory to read %s", stem);
    if (rc == 0)
        rc = open_one(i->path, bytes, &i->fd, e);
    if (rc == 0)
        rc = open_one(i->sums_path, bytes / BLOCK * (i->sealed ? sizeof(struct fmt_sealed_block) : sizeof(uint64_t)), &i->sums_fd, e);
    if (rc) {
        image_close(i);
        return rc;
    }
    *out = i;
    return 0;
}

void image_close(struct image *i)
{
    if (!i)
        return;
    if (i->fd >= 0)
        close(i->fd);
    if (i->sums_fd >= 0)
        close(i->sums_fd);
    free(i->path);
    free(i->sums_path);
    free(i);
}

static int damaged(const struct image *i, uint64_t block, struct err *e)
{
    err_set(e, ERR_DAMAGE, "%s has a damaged block %" PRIu64 " at offset %" PRIu64, i->path, block, block * BLOCK);
    err_hint(e, "pgcdp check --full tells which boundaries can still be restored");
    return ERR_DAMAGE;
}

static int judge(const struct image *i, uint64_t block, size_t count, const uint8_t *data, const uint64_t *sums, struct err *e)
{
    for (size_t k = 0; k < count; k++)
        if ((XXH3_64bits(data + k * BLOCK, BLOCK) ^ i->zero) != sums[k])
            return damaged(i, block + k, e);
    return 0;
}

/* ---- encrypted ---- */

/* From now on the blocks of this piece are decrypted. */
static int use_piece(const struct image *i, struct seal *seal, uint64_t piece, struct err *e)
{
    struct fmt_piece named = {.volume = i->volume, .number = {(uint16_t)piece, (uint16_t)(piece >> 16)}};
    uint8_t key[SEAL_KEY];
    int rc = seal_derive("pgcdp image", &named, sizeof named, key, e);
    if (rc == 0 && seal_use(seal, key))
        rc = err_set(e, -ENOMEM, "no memory to decrypt %s", i->path);
    return rc;
}

static bool open_block(struct seal *seal, uint64_t block, const struct fmt_sealed_block *entry, uint8_t *data)
{
    static const struct fmt_sealed_block none;
    static const uint8_t zeros[BLOCK];
    if (memcmp(entry, &none, sizeof none) == 0)
        return memcmp(data, zeros, BLOCK) == 0;
    return entry->in_use == 1 && seal_open(seal, entry->nonce, entry->tag, &block, sizeof block, data, BLOCK, data);
}

static int open_blocks(const struct image *i, struct seal *seal, uint64_t *piece, uint64_t block, size_t count, uint8_t *data,
                       struct err *e)
{
    struct fmt_sealed_block entries[SUMS_AT_ONCE];
    int rc = io_pread(i->sums_fd, entries, count * sizeof *entries, block * sizeof *entries);
    if (rc)
        return err_sys(e, rc, "cannot read %s at offset %" PRIu64, i->sums_path, (uint64_t)(block * sizeof *entries));
    for (size_t k = 0; k < count; k++) {
        uint64_t wanted = (block + k) / FMT_PIECE_BLOCKS;
        if (*piece != wanted && (rc = use_piece(i, seal, wanted, e)))
            return rc;
        *piece = wanted;
        if (!open_block(seal, block + k, &entries[k], data + k * BLOCK))
            return damaged(i, block + k, e);
    }
    return 0;
}

static int read_sealed(const struct image *i, uint64_t block, uint64_t count, uint8_t *to, struct err *e)
{
    uint64_t piece = UINT64_MAX;
    struct seal *seal = seal_new();
    int rc = seal ? 0 : err_set(e, -ENOMEM, "no memory to decrypt %s", i->path);
    while (rc == 0 && count) {
        size_t part = (size_t)min_u64(count, SUMS_AT_ONCE);
        if ((rc = io_pread(i->fd, to, part * BLOCK, block * BLOCK)))
            rc = err_sys(e, rc, "cannot read %s at offset %" PRIu64, i->path, block * BLOCK);
        else
            rc = open_blocks(i, seal, &piece, block, part, to, e);
        to += part * BLOCK;
        block += part;
        count -= part;
    }
    seal_free(seal);
    return rc;
}

int image_read(const struct image *i, uint64_t block, uint64_t count, uint8_t *to, struct err *e)
{
    uint64_t sums[SUMS_AT_ONCE];
    if (i->sealed)
        return read_sealed(i, block, count, to, e);
    while (count) {
        size_t part = (size_t)min_u64(count, SUMS_AT_ONCE);
        int rc = io_pread(i->fd, to, part * BLOCK, block * BLOCK);
        if (rc)
            return err_sys(e, rc, "cannot read %s at offset %" PRIu64, i->path, block * BLOCK);
        rc = io_pread(i->sums_fd, sums, part * sizeof *sums, block * sizeof *sums);
        if (rc)
            return err_sys(e, rc, "cannot read %s at offset %" PRIu64, i->sums_path, (uint64_t)(block * sizeof *sums));
        if ((rc = judge(i, block, part, to, sums, e)))
            return rc;
        to += part * BLOCK;
        block += part;
        count -= part;
    }
    return 0;
}
