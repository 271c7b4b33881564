/* Opening a journal and reading its blocks (FORMAT.md 1.1 to 1.4). Which batches belong to it: journal_read.c. */
#include "journal_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"
#include "io.h"
#include "util.h"

void jr_segment_name(char out[32], uint64_t sequence) { snprintf(out, 32, "%016" PRIu64 ".seg", sequence); }

/* ---- reading blocks ---- */

int jr_stale(const struct jr *jr, size_t index, struct err *e)
{
    char name[32];
    jr_segment_name(name, jr->segments[index].sequence);
    err_set(e, JR_STALE, "segment %s of journal %s was recycled while it was read", name, jr->dir);
    err_hint(e, "run the command again, or from a later write");
    return JR_STALE;
}

static int use_segment(struct jr *jr, size_t index, struct err *e)
{
    if (jr->fd >= 0 && jr->fd_of == index)
        return 0;
    if (jr->fd >= 0)
        close(jr->fd);
    char name[32];
    jr_segment_name(name, jr->segments[index].sequence);
    jr->fd_of = index;
    jr->fd = openat(jr->dir_fd, name, O_RDONLY | O_CLOEXEC);
    if (jr->fd >= 0)
        return 0;
    int code = -errno;
    return code == -ENOENT ? jr_stale(jr, index, e) : err_sys(e, code, "cannot open segment %s/%s", jr->dir, name);
}

int jr_read_segment(struct jr *jr, size_t index, void *data, uint64_t length, uint64_t offset, struct err *e)
{
    int rc = use_segment(jr, index, e);
    if (rc)
        return rc;
    rc = io_pread(jr->fd, data, length, offset);
    if (!rc)
        return 0;
    char name[32];
    jr_segment_name(name, jr->segments[index].sequence);
    return err_sys(e, rc, "cannot read %" PRIu64 " bytes at offset %" PRIu64 " of segment %s/%s", length, offset,
                   jr->dir, name);
}

bool jr_plausible(const struct fmt_batch *h, const struct jr_segment *s, uint64_t offset)
{
    return memcmp(h->magic, FMT_BATCH_MAGIC, 8) == 0 && h->salt == s->salt && h->records >= 1 &&
           h->header_length == fmt_batch_header(h->records) && h->length >= h->header_length &&
           h->length % BLOCK == 0 && h->length <= s->size - offset;
}

int jr_read_header(struct jr *jr, size_t index, uint64_t offset, struct fmt_batch *out, struct err *e)
{
    const struct jr_segment *s = &jr->segments[index];
    if (offset + BLOCK > s->size)
        return 0;
    int rc = jr_read_segment(jr, index, out, sizeof *out, offset, e);
    return rc ? rc : jr_plausible(out, s, offset);
}

static int reserve_batch(struct jr *jr, uint64_t length, struct err *e)
{
    if (length <= jr->batch_size)
        return 0;
    if (jr->batch)
        io_free(jr->batch, jr->batch_size);
    jr->batch_size = 0;
    jr->batch = io_alloc(length);
    if (!jr->batch)
        return err_set(e, -ENOMEM, "no memory for a batch of %" PRIu64 " bytes", length);
    jr->batch_size = length;
    return 0;
}

int jr_read_batch(struct jr *jr, size_t index, uint64_t offset, struct err *e)
{
    struct fmt_batch h;
    int rc = jr_read_header(jr, index, offset, &h, e);
    if (rc != 1)
        return rc;
    uint64_t length = h.length;
    rc = reserve_batch(jr, length, e);
    if (!rc)
        rc = jr_read_segment(jr, index, jr->batch, length, offset, e);
    if (rc)
        return rc;
    const struct fmt_batch *read = (const struct fmt_batch *)(const void *)jr->batch;
    return read->length == length && jr_plausible(read, &jr->segments[index], offset) &&
           checksum_zeroed(jr->batch, length, offsetof(struct fmt_batch, checksum)) == read->checksum;
}

/* ---- open ---- */

static int compare_segments(const void *a, const void *b)
{
    const struct jr_segment *x = a, *y = b;
    return x->sequence < y->sequence ? -1 : x->sequence > y->sequence;
}

/* The sequence number in "0000000000000003.seg", 0 for any other name. */
static uint64_t sequence_of(const char *name)
{
    if (strlen(name) != 20 || strcmp(name + 16, ".seg") != 0 || strspn(name, "0123456789") != 16)
        return 0;
    return strtoull(name, NULL, 10);
}

static int add_segment(struct jr *jr, uint64_t sequence, struct err *e)
{
    if (jr->count == jr->capacity) {
        size_t capacity = jr->capacity ? jr->capacity * 2 : 64;
        void *grown = reallocarray(jr->segments, capacity, sizeof *jr->segments);
        if (!grown)
            return err_set(e, -ENOMEM, "no memory for %zu segments", capacity);
        jr->segments = grown;
        jr->capacity = capacity;
    }
    jr->segments[jr->count++] = (struct jr_segment){.sequence = sequence};
    return 0;
}

static int list_segments(struct jr *jr, struct err *e)
{
    int fd = dup(jr->dir_fd);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        int code = -errno;
        if (fd >= 0)
            close(fd);
        return err_sys(e, code, "cannot list journal %s", jr->dir);
    }
    int rc = 0;
    for (struct dirent *entry; !rc && (entry = readdir(dir));) {
        uint64_t sequence = sequence_of(entry->d_name);
        if (sequence)
            rc = add_segment(jr, sequence, e);
    }
    closedir(dir);
    if (!rc && jr->count)
        qsort(jr->segments, jr->count, sizeof *jr->segments, compare_segments);
    return rc;
}

static int wrong_set(const struct jr *jr, const char *name, struct err *e)
{
    err_set(e, ERR_PRECONDITION, "%s in journal %s belongs to another volume set", name, jr->dir);
    err_hint(e, "give the journal directory and the set id that belong together");
    return ERR_PRECONDITION;
}

/* Checks the header block of one segment and takes its salt and size. */
static int open_segment(struct jr *jr, size_t index, const uint8_t *set_id, struct err *e)
{
    struct jr_segment *s = &jr->segments[index];
    char name[32];
    jr_segment_name(name, s->sequence);
    if (index && jr->segments[index - 1].sequence + 1 != s->sequence)
        return err_set(e, JR_DAMAGE, "segment %016" PRIu64 ".seg is missing from journal %s, though %s is there",
                       jr->segments[index - 1].sequence + 1, jr->dir, name);
    int rc = use_segment(jr, index, e);
    uint64_t size = 0;
    if (rc || (rc = io_size(jr->fd, &size)))
        return rc;
    uint8_t block[FMT_HEADER_BYTES];
    struct fmt_segment h;
    if (size < sizeof block)
        return err_set(e, JR_DAMAGE, "segment %s/%s is damaged: it has only %" PRIu64 " bytes", jr->dir, name, size);
    rc = jr_read_segment(jr, index, block, sizeof block, 0, e);
    if (rc)
        return rc;
    memcpy(&h, block, sizeof h);
    if (memcmp(h.magic, FMT_SEGMENT_MAGIC, 8) != 0 ||
        checksum_zeroed(block, sizeof block, offsetof(struct fmt_segment, checksum)) != h.checksum)
        return err_set(e, JR_DAMAGE, "segment %s/%s is damaged at offset 0: its header is not what was written",
                       jr->dir, name);
    if (h.version != FORMAT_VERSION)
        return err_set(e, ERR_PRECONDITION, "segment %s/%s has format version %u, this program knows %u", jr->dir, name,
                       h.version, FORMAT_VERSION);
    if (memcmp(h.set_id, set_id ? set_id : index ? jr->set_id : h.set_id, 16) != 0)
        return wrong_set(jr, name, e);
    if (h.sequence != s->sequence || h.size != size || size % BLOCK != 0)
        return err_set(e, JR_DAMAGE,
                       "segment %s/%s is damaged at offset 0: its header speaks of segment %" PRIu64 " of %" PRIu64
                       " bytes, the file has %" PRIu64,
                       jr->dir, name, h.sequence, h.size, size);
    memcpy(jr->set_id, h.set_id, 16);
    s->salt = h.salt;
    s->size = size;
    return 0;
}

/* Takes the better slot of the applied mark. A file of zeros is one that was being made: no mark. */
static int read_mark(struct jr *jr, const uint8_t *set_id, struct err *e)
{
    CLEANUP_CLOSE int fd = openat(jr->dir_fd, "applied", O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return 0;
    if (fd < 0)
        return err_sys(e, -errno, "cannot open %s/applied", jr->dir);
    bool written = false;
    for (uint64_t slot = 0; slot < 2; slot++) {
        uint8_t block[FMT_HEADER_BYTES];
        struct fmt_applied m;
        int rc = io_pread(fd, block, sizeof block, slot * BLOCK);
        if (rc == -ENODATA)
            continue;
        if (rc)
            return err_sys(e, rc, "cannot read %s/applied at offset %" PRIu64, jr->dir, slot * BLOCK);
        memcpy(&m, block, sizeof m);
        for (size_t i = 0; i < sizeof block && !written; i++)
            written = block[i] != 0;
        if (memcmp(m.magic, FMT_APPLIED_MAGIC, 8) != 0 ||
            checksum_zeroed(block, sizeof block, offsetof(struct fmt_applied, checksum)) != m.checksum)
            continue;
        if (m.version != FORMAT_VERSION)
            return err_set(e, ERR_PRECONDITION, "%s/applied has format version %u, this program knows %u", jr->dir,
                           m.version, FORMAT_VERSION);
        const uint8_t *expected = set_id ? set_id : jr->count ? jr->set_id : m.set_id;
        if (memcmp(m.set_id, expected, 16) != 0)
            return wrong_set(jr, "applied", e);
        if (!jr->marked || m.sequence > jr->mark.sequence)
            jr->mark = m;
        jr->marked = true;
    }
    if (written && !jr->marked)
        return err_set(e, JR_DAMAGE, "%s/applied is damaged: neither slot, at offset 0 and 4096, is what was written",
                       jr->dir);
    return 0;
}

static int open_files(struct jr *jr, const uint8_t *set_id, struct err *e)
{
    jr->dir_fd = open(jr->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (jr->dir_fd < 0)
        return err_sys(e, -errno, "cannot open journal %s", jr->dir);
    int rc = list_segments(jr, e);
    for (size_t i = 0; !rc && i < jr->count; i++)
        rc = open_segment(jr, i, set_id, e);
    if (!rc)
        rc = read_mark(jr, set_id, e);
    /* Segments that nothing needs any more may all be gone: the mark knows where the numbers stand. Not after a crash: one
     * that came behind the mark would have been answered. */
    bool needed = jr->mark.durable_write > min_u64(jr->mark.applied_write, jr->mark.released_write);
    bool clean = (jr->mark.flags & FMT_APPLIED_CLEAN) != 0;
    if (!rc && !jr->count && jr->mark.durable_write && (needed || !clean))
        rc = err_set(e, JR_DAMAGE, "journal %s has no segments, though %" PRIu64 " writes were in it", jr->dir,
                     jr->mark.durable_write);
    return rc;
}

int jr_open(struct jr **out, const char *dir, const uint8_t set_id[16], struct err *e)
{
    *out = NULL;
    struct jr *jr = calloc(1, sizeof *jr);
    if (!jr)
        return err_set(e, -ENOMEM, "no memory to read journal %s", dir);
    jr->dir_fd = -1;
    jr->fd = -1;
    jr->dir = strdup(dir);
    jr->scan = io_alloc(SCAN_BYTES);
    int rc = jr->dir && jr->scan ? open_files(jr, set_id, e) : err_set(e, -ENOMEM, "no memory to read journal %s", dir);
    if (rc) {
        jr_close(jr);
        return rc;
    }
    *out = jr;
    return 0;
}

int jr_sync(struct jr *jr, struct err *e)
{
    for (size_t i = jr->at; i < jr->count; i++) {
        char name[32];
        jr_segment_name(name, jr->segments[i].sequence);
        CLEANUP_CLOSE int fd = openat(jr->dir_fd, name, O_RDONLY | O_CLOEXEC);
        int rc = fd < 0 ? -errno : io_fdatasync("journal.replay.sync", fd);
        if (rc)
            return err_sys(e, rc, "cannot sync segment %s of journal %s", name, jr->dir);
    }
    return 0;
}

void jr_close(struct jr *jr)
{
    if (!jr)
        return;
    if (jr->fd >= 0)
        close(jr->fd);
    if (jr->dir_fd >= 0)
        close(jr->dir_fd);
    if (jr->batch)
        io_free(jr->batch, jr->batch_size);
    if (jr->scan)
        io_free(jr->scan, SCAN_BYTES);
    free(jr->segments);
    free(jr->dir);
    free(jr);
}
