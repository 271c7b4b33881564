/* See frames.h. */
#include "frames.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zstd.h>

#include "checksum.h"
#include "format.h"
#include "frame_file.h"
#include "io.h"
#include "util.h"

struct frames {
    int fd;
    char *path;
    struct frames_header header;
    uint64_t size;     /* of the file */
    uint64_t offset;   /* of the next frame */
    uint64_t position; /* of the next frame in the stream */
    bool ended;
    ZSTD_DCtx *zstd;
    struct seal *seal; /* NULL: plain */
    uint8_t *stored; /* FMT_FRAME_LIMIT bytes each */
    uint8_t *raw;
    uint64_t raw_begin, raw_end; /* what of `raw` was not taken yet */
    uint8_t *joined;             /* bytes that lie in several frames */
    uint64_t joined_room;
};

static int damage(const struct frames *f, struct err *e, const char *what)
{
    int rc = err_set(e, ERR_DAMAGE, "%s has %s at offset %" PRIu64, f->path, what, f->offset);
    err_hint(e, "pgcdp check --full tells what else is damaged and what can still be restored");
    return rc;
}

static int read_header(struct frames *f, const char *content, struct err *e)
{
    struct fmt_frames_file h;
    int rc = io_pread(f->fd, &h, sizeof h, 0);
    if (rc && rc != -ENODATA)
        return err_sys(e, rc, "cannot read %s", f->path);
    if (rc || memcmp(h.magic, FMT_FRAMES_MAGIC, sizeof h.magic) || (h.version != FORMAT_VERSION && h.version != FMT_FRAMES_SEALED) ||
        memcmp(h.content, content, sizeof h.content) || checksum_zeroed(&h, sizeof h, offsetof(struct fmt_frames_file, checksum)) != h.checksum)
        return damage(f, e, "a wrong header");
    memcpy(f->header.set_id, h.set_id, sizeof h.set_id);
    f->header.interval = h.interval;
    f->offset = sizeof h;
    bool sealed;
    uint8_t key[SEAL_KEY];
    rc = frame_key(f->path, &h, &sealed, key, e);
    if (!rc && sealed && (!(f->seal = seal_new()) || seal_use(f->seal, key)))
        rc = err_set(e, -ENOMEM, "no memory to decrypt %s", f->path);
    return rc;
}

int frames_open(struct frames **out, const char *path, const char *content, struct err *e)
{
    struct frames *f = calloc(1, sizeof *f);
    if (!f)
        return err_set(e, -ENOMEM, "no memory to read %s", path);
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = f->fd < 0 ? err_sys(e, -errno, "cannot open %s", path) : 0;
    f->path = strdup(path);
    f->zstd = ZSTD_createDCtx();
    f->stored = malloc(FMT_FRAME_LIMIT);
    f->raw = malloc(FMT_FRAME_LIMIT);
    if (!rc && (!f->path || !f->zstd || !f->stored || !f->raw))
        rc = err_set(e, -ENOMEM, "no memory to read %s", path);
    if (!rc && (rc = io_size(f->fd, &f->size)))
        rc = err_sys(e, rc, "cannot read %s", path);
    if (!rc)
        rc = read_header(f, content, e);
    if (rc) {
        frames_close(f);
        return rc;
    }
    *out = f;
    return 0;
}

void frames_close(struct frames *f)
{
    if (!f)
        return;
    if (f->fd >= 0)
        close(f->fd);
    ZSTD_freeDCtx(f->zstd);
    seal_free(f->seal);
    free(f->path);
    free(f->stored);
    free(f->raw);
    free(f->joined);
    free(f);
}

const struct frames_header *frames_header(const struct frames *f) { return &f->header; }

/* The frame at f->offset into f->raw: 1; 0 at the end of the stream. */
static int load(struct frames *f, struct err *e)
{
    struct fmt_frame h;
    if (f->ended || f->offset + sizeof h > f->size)
        return 0;
    int rc = io_pread(f->fd, &h, sizeof h, f->offset);
    if (rc)
        return err_sys(e, rc, "cannot read %s at offset %" PRIu64, f->path, f->offset);
    if (memcmp(h.magic, FMT_FRAME_MAGIC, sizeof h.magic) || h.stored_length > FMT_FRAME_LIMIT || h.raw_length > FMT_FRAME_LIMIT)
        return damage(f, e, "a damaged frame");
    if ((h.codec & ~(uint32_t)FMT_CODEC_SEALED) == FMT_CODEC_DIRECTORY) {
        f->ended = true;
        return 0;
    }
    if (f->offset + sizeof h + h.stored_length > f->size) /* the writer is not done with it, or a crash cut it off */
        return 0;
    if ((rc = io_pread(f->fd, f->stored, h.stored_length, f->offset + sizeof h)))
        return err_sys(e, rc, "cannot read %s at offset %" PRIu64, f->path, f->offset);
    if (h.position != f->position || !frame_unpack(&h, f->stored, f->seal, f->zstd, f->raw))
        return damage(f, e, "a damaged frame");
    f->raw_begin = 0;
    f->raw_end = h.raw_length;
    f->position += h.raw_length;
    f->offset += sizeof h + h.stored_length;
    return 1;
}

/* Bytes that lie in several frames, one after another. */
static int join(struct frames *f, uint64_t length, const uint8_t **data, struct err *e)
{
    if (f->joined_room < length) {
        uint8_t *grown = realloc(f->joined, length);
        if (!grown)
            return err_set(e, -ENOMEM, "no memory for %" PRIu64 " bytes of %s", length, f->path);
        f->joined = grown;
        f->joined_room = length;
    }
    uint64_t got = 0;
    while (got < length) {
        if (f->raw_begin == f->raw_end) {
            int rc = load(f, e);
            if (rc <= 0)
                return rc;
        }
        uint64_t part = min_u64(length - got, f->raw_end - f->raw_begin);
        memcpy(f->joined + got, f->raw + f->raw_begin, part);
        f->raw_begin += part;
        got += part;
    }
    *data = f->joined;
    return 1;
}

int frames_take(struct frames *f, uint64_t length, const uint8_t **data, struct err *e)
{
    if (f->raw_begin == f->raw_end && length) {
        int rc = load(f, e);
        if (rc <= 0)
            return rc;
    }
    if (f->raw_end - f->raw_begin < length)
        return join(f, length, data, e);
    *data = f->raw + f->raw_begin;
    f->raw_begin += length;
    return 1;
}
