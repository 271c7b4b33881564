/* See frame_file.h. */
#include "frame_file.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "io.h"

struct frame_file {
    uint64_t serial;
    int fd;
    char *path;
    uint64_t size;
    uint64_t length; /* of the stream */
    uint64_t count;
    struct fmt_frame_entry *entries;
    bool sealed;
    uint8_t key[SEAL_KEY];
};

static int damage(const struct frame_file *f, struct err *e, const char *what, uint64_t offset)
{
    int rc = err_set(e, ERR_DAMAGE, "%s has %s at offset %" PRIu64, f->path, what, offset);
    err_hint(e, "pgcdp check --full tells what else is damaged and what can still be restored");
    return rc;
}

static int read_at(const struct frame_file *f, void *data, size_t length, uint64_t offset, struct err *e)
{
    int rc = io_pread(f->fd, data, length, offset);
    if (rc == -ENODATA)
        return damage(f, e, "its end", offset);
    return rc ? err_sys(e, rc, "cannot read %s at offset %" PRIu64, f->path, offset) : 0;
}

int frame_key(const char *path, const struct fmt_frames_file *h, bool *sealed, uint8_t *key, struct err *e)
{
    static const char CLEAR[4] = {'P', 'T', 'C', 'H'}; /* a view's own, in no store */
    *sealed = h->version == FMT_FRAMES_SEALED;
    if (*sealed && !seal_has_key())
        return err_set(e, ERR_PRECONDITION, "%s is encrypted, and no key was given", path);
    if (!*sealed && seal_has_key() && memcmp(h->content, CLEAR, sizeof CLEAR) != 0) {
        err_set(e, ERR_DAMAGE, "%s is not encrypted as its store is, at offset 0", path);
        err_hint(e, "pgcdp check --full tells what else is damaged and what can still be restored");
        return ERR_DAMAGE;
    }
    const size_t begin = offsetof(struct fmt_frames_file, version), end = offsetof(struct fmt_frames_file, checksum);
    return *sealed ? seal_derive("pgcdp frames", (const uint8_t *)h + begin, end - begin, key, e) : 0;
}

static int check_header(struct frame_file *f, const struct frame_identity *wanted, struct err *e)
{
    struct fmt_frames_file h, expected = {.version = FORMAT_VERSION, .interval = wanted->interval};
    memcpy(expected.magic, FMT_FRAMES_MAGIC, sizeof expected.magic);
    memcpy(expected.content, wanted->content, sizeof expected.content);
    memcpy(expected.set_id, wanted->set_id, sizeof expected.set_id);
    int rc = read_at(f, &h, sizeof h, 0, e);
    if (rc)
        return rc;
    if (h.version == FMT_FRAMES_SEALED) {
        expected.version = FMT_FRAMES_SEALED;
        memcpy(expected.salt, h.salt, sizeof expected.salt);
    }
    expected.checksum = checksum_zeroed(&expected, sizeof expected, offsetof(struct fmt_frames_file, checksum));
    if (memcmp(&h, &expected, sizeof h) != 0)
        return damage(f, e, "a wrong header", 0);
    return frame_key(f->path, &h, &f->sealed, f->key, e);
}

/* The directory's bytes as they were before they were sealed, to the begin of `stored`; damage is told by the caller. */
static int open_directory(const struct frame_file *f, const struct fmt_frame *h, uint8_t *stored, struct err *e)
{
    if (!f->sealed)
        return 0;
    struct seal *seal = seal_new();
    if (!seal || seal_use(seal, f->key)) {
        seal_free(seal);
        return err_set(e, -ENOMEM, "no memory for the directory of %s", f->path);
    }
    size_t length = h->stored_length - SEAL_OVERHEAD;
    bool right = seal_open(seal, stored, stored + SEAL_NONCE + length, h, offsetof(struct fmt_frame, checksum), stored + SEAL_NONCE,
                           length, stored + SEAL_NONCE);
    seal_free(seal);
    if (!right)
        return ERR_DAMAGE;
    memmove(stored, stored + SEAL_NONCE, length);
    return 0;
}

/* The frames must lie one after another and fill the file up to the directory. */
static bool fits(const struct frame_file *f, uint64_t directory, uint64_t length)
{
    uint64_t offset = sizeof(struct fmt_frames_file), position = 0;
    for (uint64_t i = 0; i < f->count; i++) {
        const struct fmt_frame_entry *entry = &f->entries[i];
        if (entry->offset != offset || entry->position != position || entry->raw_length > FMT_FRAME_LIMIT ||
            entry->stored_length > FMT_FRAME_LIMIT)
            return false;
        offset += sizeof(struct fmt_frame) + entry->stored_length;
        position += entry->raw_length;
    }
    return offset == directory && position == length;
}

static int read_directory(struct frame_file *f, struct err *e)
{
    struct fmt_frames_trailer t;
    struct fmt_frame h;
    if (f->size < sizeof(struct fmt_frames_file) + sizeof h + sizeof t)
        return damage(f, e, "no trailer", f->size);
    uint64_t end = f->size - sizeof t;
    int rc = read_at(f, &t, sizeof t, end, e);
    if (rc)
        return rc;
    if (memcmp(t.magic, FMT_TRAILER_MAGIC, sizeof t.magic) || XXH3_64bits(&t, offsetof(struct fmt_frames_trailer, checksum)) != t.checksum)
        return damage(f, e, "a damaged trailer", end);
    if (t.directory > end - sizeof h)
        return damage(f, e, "a damaged trailer", end);
    if ((rc = read_at(f, &h, sizeof h, t.directory, e)))
        return rc;
    const uint32_t codec = FMT_CODEC_DIRECTORY | (f->sealed ? FMT_CODEC_SEALED : 0u), more = f->sealed ? SEAL_OVERHEAD : 0u;
    if (memcmp(h.magic, FMT_FRAME_MAGIC, sizeof h.magic) || h.codec != codec || h.stored_length < more ||
        t.directory + sizeof h + h.stored_length != end || (h.stored_length - more) % sizeof *f->entries ||
        (h.stored_length - more) / sizeof *f->entries != t.frames)
        return damage(f, e, "a damaged directory", t.directory);
    f->count = t.frames;
    f->entries = malloc((size_t)h.stored_length + 1);
    if (!f->entries)
        return err_set(e, -ENOMEM, "no memory for the directory of %s", f->path);
    if ((rc = read_at(f, f->entries, h.stored_length, t.directory + sizeof h, e)))
        return rc;
    if (checksum_zeroed2(&h, sizeof h, offsetof(struct fmt_frame, checksum), f->entries, h.stored_length) != h.checksum)
        return damage(f, e, "a damaged directory", t.directory);
    if ((rc = open_directory(f, &h, (uint8_t *)f->entries, e)))
        return rc == ERR_DAMAGE ? damage(f, e, "a damaged directory", t.directory) : rc;
    if (!fits(f, t.directory, h.position))
        return damage(f, e, "a directory that does not fit its frames", t.directory);
    f->length = h.position;
    return 0;
}

int frame_file_open(struct frame_file **out, const char *path, const struct frame_identity *wanted, struct err *e)
{
    static atomic_uint_least64_t opened;
    struct frame_file *f = calloc(1, sizeof *f);
    if (!f)
        return err_set(e, -ENOMEM, "no memory to read %s", path);
    f->serial = atomic_fetch_add(&opened, 1);
    f->path = strdup(path);
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = 0;
    if (f->fd < 0 && errno == ENOENT)
        rc = err_set(e, ERR_DAMAGE, "%s is missing (offset 0)", path);
    else if (f->fd < 0)
        rc = err_sys(e, -errno, "cannot open %s", path);
    else if (!f->path)
        rc = err_set(e, -ENOMEM, "no memory to read %s", path);
    else if ((rc = io_size(f->fd, &f->size)) != 0)
        err_sys(e, rc, "cannot read %s", path);
    if (rc == 0)
        rc = check_header(f, wanted, e);
    if (rc == 0)
        rc = read_directory(f, e);
    if (rc) {
        frame_file_close(f);
        return rc;
    }
    *out = f;
    return 0;
}

void frame_file_close(struct frame_file *f)
{
    if (!f)
        return;
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    free(f->entries);
    free(f);
}

const char *frame_file_path(const struct frame_file *f) { return f->path; }

uint64_t frame_file_serial(const struct frame_file *f) { return f->serial; }

uint64_t frame_file_length(const struct frame_file *f) { return f->length; }

const struct fmt_frame_entry *frame_file_entry(const struct frame_file *f, size_t number) { return &f->entries[number]; }

size_t frame_file_find(const struct frame_file *f, uint64_t position)
{
    size_t low = 0, high = f->count; /* the last frame that begins at or before it */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (f->entries[middle].position <= position)
            low = middle;
        else
            high = middle;
    }
    return low;
}

void frame_scratch_free(struct frame_scratch *s)
{
    ZSTD_freeDCtx(s->zstd);
    seal_free(s->seal);
    free(s->stored);
    *s = (struct frame_scratch){0};
}

static int make_room(struct frame_scratch *s, size_t length, const struct frame_file *f, struct err *e)
{
    if (!s->zstd && !(s->zstd = ZSTD_createDCtx()))
        return err_set(e, -ENOMEM, "no memory to unpack frames");
    if (f->sealed && ((!s->seal && !(s->seal = seal_new())) || seal_use(s->seal, f->key)))
        return err_set(e, -ENOMEM, "no memory to decrypt frames");
    if (s->room < length) {
        free(s->stored);
        s->room = 0;
        if (!(s->stored = malloc(length)))
            return err_set(e, -ENOMEM, "no memory for a frame of %zu bytes", length);
        s->room = length;
    }
    return 0;
}

bool frame_unpack(const struct fmt_frame *h, uint8_t *stored, struct seal *seal, ZSTD_DCtx *zstd, uint8_t *raw)
{
    uint32_t codec = h->codec, length = h->stored_length;
    if (checksum_zeroed2(h, sizeof *h, offsetof(struct fmt_frame, checksum), stored, h->stored_length) != h->checksum)
        return false;
    if (seal) {
        if (!(codec & FMT_CODEC_SEALED) || length < SEAL_OVERHEAD)
            return false;
        codec &= ~(uint32_t)FMT_CODEC_SEALED;
        length -= SEAL_OVERHEAD;
        if (!seal_open(seal, stored, stored + SEAL_NONCE + length, h, offsetof(struct fmt_frame, checksum), stored + SEAL_NONCE,
                       length, stored + SEAL_NONCE))
            return false;
        stored += SEAL_NONCE;
    }
    if (codec == FMT_CODEC_PLAIN && length == h->raw_length) {
        memcpy(raw, stored, length);
        return true;
    }
    return codec == FMT_CODEC_ZSTD && ZSTD_decompressDCtx(zstd, raw, h->raw_length, stored, length) == h->raw_length;
}

int frame_file_load(const struct frame_file *f, size_t number, struct frame_scratch *s, uint8_t *raw, struct err *e)
{
    const struct fmt_frame_entry *entry = &f->entries[number];
    struct fmt_frame h;
    int rc = make_room(s, (size_t)entry->stored_length + 1, f, e);
    if (rc == 0)
        rc = read_at(f, &h, sizeof h, entry->offset, e);
    if (rc == 0 && (memcmp(h.magic, FMT_FRAME_MAGIC, sizeof h.magic) || h.position != entry->position ||
                    h.raw_length != entry->raw_length || h.stored_length != entry->stored_length))
        rc = damage(f, e, "a damaged frame", entry->offset);
    if (rc == 0)
        rc = read_at(f, s->stored, entry->stored_length, entry->offset + sizeof h, e);
    if (rc == 0 && !frame_unpack(&h, s->stored, f->sealed ? s->seal : NULL, s->zstd, raw))
        rc = damage(f, e, "a damaged frame", entry->offset);
    return rc;
}
