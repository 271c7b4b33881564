/* See wal_state.h. */
#include "wal_state.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"
#include "format.h"
#include "io.h"

static int write_file(const char *path, const char *content, size_t length, struct err *e)
{
    CLEANUP_CLOSE int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_sys(e, -errno, "cannot make %s", path);
    int rc = io_pwrite("wal.state.write", fd, content, length, 0);
    if (!rc)
        rc = io_fdatasync("wal.state.sync", fd);
    return rc ? err_sys(e, rc, "cannot write %s", path) : 0;
}

int state_save(const struct wal_reading *r, const char *path, struct err *e)
{
    CLEANUP_FREE char *content = NULL;
    size_t length = 0;
    struct fmt_wal_state head = {
        .version = FMT_WAL_STATE_VERSION, .segment_bytes = r->segment_bytes, .system_identifier = r->system_identifier,
        .write = r->write,
    };
    memcpy(head.magic, FMT_WAL_STATE_MAGIC, sizeof head.magic);
    FILE *out = open_memstream(&content, &length);
    if (!out)
        return err_set(e, -ENOMEM, "no memory for %s", path);
    fwrite(&head, sizeof head, 1, out);
    wal_save(r->wal, out);
    xacts_save(r->xacts, out);
    notes_save(&r->notes, out);
    if (ferror(out) | fclose(out))
        return err_set(e, -ENOMEM, "no memory for %s", path);
    head.length = length;
    memcpy(content, &head, sizeof head);
    head.checksum = checksum_zeroed(content, length, offsetof(struct fmt_wal_state, checksum));
    memcpy(content, &head, sizeof head);
    return write_file(path, content, length, e);
}

int state_load(struct wal_reading *r, const char *path, struct err *e)
{
    CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t length = 0;
    if (fd < 0 || io_size(fd, &length))
        return err_sys(e, -errno, "cannot open %s", path);
    CLEANUP_FREE uint8_t *content = malloc(length ? length : 1);
    if (!content)
        return err_set(e, -ENOMEM, "no memory for %" PRIu64 " bytes of %s", length, path);
    int rc = io_pread(fd, content, length, 0);
    if (rc)
        return err_sys(e, rc, "cannot read %s", path);
    struct fmt_wal_state head = {0};
    struct cursor in = {.at = content, .end = content + length};
    if (!cursor_copy(&in, &head, sizeof head) || memcmp(head.magic, FMT_WAL_STATE_MAGIC, sizeof head.magic) ||
        head.length != length || checksum_zeroed(content, length, offsetof(struct fmt_wal_state, checksum)) != head.checksum)
        return err_set(e, ERR_DAMAGE, "%s is damaged (offset 0)", path);
    if (head.version != FMT_WAL_STATE_VERSION || head.system_identifier != r->system_identifier || head.segment_bytes != r->segment_bytes)
        return err_set(e, ERR_PRECONDITION, "%s is of cluster %" PRIu64 " with segments of %" PRIu32 " bytes", path,
                       head.system_identifier, head.segment_bytes);
    r->write = head.write;
    if (!wal_restore(r->wal, &in) || !xacts_restore(r->xacts, &in) || !notes_restore(&r->notes, &in) || in.at != in.end)
        return err_set(e, ERR_DAMAGE, "%s contradicts itself (offset %zu)", path, sizeof head);
    return 0;
}
