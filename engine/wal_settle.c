/* See wal_settle.h. */
#include "wal_settle.h"

#include <stdlib.h>
#include <string.h>

#include "ext4_log.h"
#include "util.h"
#include "wal_files.h"
#include "xfs_log.h"

#define VOLUMES 256u
#define WAITING 1024u /* rows, each a write; one flush may be many */
#define WITHIN 16u    /* writes behind the last of them, where the log is not read */

/* fs/jbd2: JBD2_MAGIC_NUMBER and JBD2_COMMIT_BLOCK, both big-endian; fs/xfs: XLOG_HEADER_MAGIC_NUM. */
static const uint8_t EXT4_COMMIT[8] = {0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 2};
static const uint8_t XFS_LOG[4] = {0xFE, 0xED, 0xBA, 0xBE};

struct settle_log { /* the log of the filesystem on a volume */
    struct settle *settle;
    uint16_t volume;
    struct xfs_log *xfs; /* one of the two */
    struct ext4_log *ext4;
};

struct settle {
    bool holes, tree; /* `tree`: a file as long as a segment was told of that has its extents in a B-tree */
    uint64_t segment_bytes;
    struct wal *wal;
    struct tables *tables;
    uint64_t commit; /* the newest write since the last that waits which may have made it durable; 0: none */
    uint64_t newest; /* `durable` of the last row that was handed on */
    uint16_t volume; /* of the last write that waits */
    uint32_t count;
    struct fmt_wal_write waiting[WAITING];
    struct settle_log *log[VOLUMES];
    struct wal_files files;
};

/* ---- rows ---- */

static int hand_on(struct settle *s, struct fmt_wal_write row, uint64_t durable)
{
    row.durable = s->newest = max_u64(max_u64(durable, row.write), s->newest);
    return tables_write(s->tables, &row);
}

/* Nothing will say more about what waits. */
static int release(struct settle *s)
{
    int rc = 0;
    for (uint32_t i = 0; !rc && i < s->count; i++) {
        wal_mapped_upto(s->wal, s->waiting[i].write);
        rc = hand_on(s, s->waiting[i], s->commit);
    }
    s->count = 0;
    s->commit = 0;
    return rc;
}

/* Hands on what is mapped now, by a write. */
static int hand_on_mapped(struct settle *s, uint64_t write)
{
    uint32_t done = 0;
    int rc = 0;
    while (!rc && done < s->count && !wal_unmapped(s->wal, s->waiting[done].from_lsn, s->waiting[done].to_lsn))
        rc = hand_on(s, s->waiting[done++], write);
    if (!done)
        return 0;
    s->count -= done;
    s->commit = s->count ? s->commit : 0;
    memmove(s->waiting, s->waiting + done, s->count * sizeof *s->waiting);
    return rc;
}

int settle_wal(struct settle *s, struct fmt_wal_write row, uint16_t volume)
{
    if (!s->holes)
        return hand_on(s, row, 0);
    bool is_read = volume < VOLUMES && s->log[volume];
    int rc = wal_again(s->wal) || s->count == WAITING || (s->commit && !is_read) ? release(s) : 0;
    uint64_t unmapped = wal_unmapped_from(s->wal);
    if (unmapped && !wal_unmapped(s->wal, unmapped, row.to_lsn))
        unmapped = 0;
    struct fmt_wal_write rest = row;
    if (!rc && !s->count && unmapped != row.from_lsn) { /* what lies in blocks that were there is durable at once */
        row.to_lsn = rest.from_lsn = unmapped > row.from_lsn ? unmapped : row.to_lsn;
        rc = hand_on(s, row, 0);
    }
    if (rest.from_lsn != rest.to_lsn) {
        s->waiting[s->count++] = rest;
        s->volume = volume;
    }
    return rc;
}

/* ---- logs ---- */

struct found {
    uint16_t volume;
    const struct logged_file *file;
};

static bool found_has(void *arg, uint16_t volume, uint64_t at, uint64_t place)
{
    const struct found *found = arg;
    return found->volume == volume && files_extents_have(found->file->extent, found->file->extents, at, place);
}

bool settle_mapped(void *arg, uint16_t volume, uint64_t at, uint64_t place)
{
    const struct settle *s = arg;
    return s->holes && files_any_has(&s->files, volume, at, place);
}

static void file_found(void *arg, const struct logged_file *file)
{
    struct settle_log *log = arg;
    struct settle *s = log->settle;
    struct found found = {.volume = log->volume, .file = file};
    if (file->which == LOGGED_APART && log->xfs && file->size == s->segment_bytes)
        s->tree = true;
    if (file->which == LOGGED_PART || (files_take(&s->files, log->volume, file, s->segment_bytes) && file->extents))
        wal_map(s->wal, s->count ? s->waiting[0].from_lsn : wal_next_lsn(s->wal), found_has, &found);
}

static int take_log(struct settle *s, struct settle_log *log, uint64_t write, uint64_t offset, const uint8_t *data,
                    uint64_t length)
{
    s->tree = false;
    enum logged_said said = log->xfs ? xfs_log_take(log->xfs, offset, data, length)
                                     : ext4_log_take(log->ext4, offset, data, length);
    if (said == LOGGED_NOTHING)
        return 0;
    if (said == LOGGED_UNSURE)
        files_forget(&s->files, log->volume);
    int rc = hand_on_mapped(s, write);
    if (s->count && (said == LOGGED_UNSURE || s->tree) && log->volume == s->volume)
        s->commit = write;
    return rc;
}

int settle_other(struct settle *s, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    if (volume < VOLUMES && s->log[volume])
        return take_log(s, s->log[volume], write, offset, data, length);
    if (!s->count || s->volume != volume)
        return 0;
    if (write > s->waiting[s->count - 1].write + WITHIN)
        return release(s);
    for (uint64_t at = 0; at < length; at += BLOCK)
        if (!memcmp(data + at, EXT4_COMMIT, sizeof EXT4_COMMIT) || !memcmp(data + at, XFS_LOG, sizeof XFS_LOG))
            s->commit = write;
    return 0;
}

bool settle_waits(const struct settle *s) { return s->count; }

int settle_end(struct settle *s) { return release(s); }

/* ---- life ---- */

struct settle *settle_open(bool holes, uint64_t segment_bytes)
{
    struct settle *s = calloc(1, sizeof *s);
    if (s) {
        s->holes = holes;
        s->segment_bytes = segment_bytes;
    }
    return s;
}

void settle_between(struct settle *s, struct wal *wal, struct tables *t)
{
    s->wal = wal;
    s->tables = t;
}

void settle_volume(struct settle *s, uint16_t volume, const uint8_t *superblock)
{
    if (!s->holes || volume >= VOLUMES || s->log[volume])
        return;
    struct settle_log *log = calloc(1, sizeof *log);
    if (!log)
        return;
    *log = (struct settle_log){
        .settle = s, .volume = volume, .xfs = xfs_log_open(superblock, file_found, log),
        .ext4 = ext4_log_open(superblock, s->segment_bytes, file_found, log),
    };
    if (log->xfs || log->ext4)
        s->log[volume] = log;
    else
        free(log);
}

void settle_close(struct settle *s)
{
    for (uint32_t i = 0; s && i < VOLUMES; i++) {
        if (s->log[i]) {
            xfs_log_close(s->log[i]->xfs);
            ext4_log_close(s->log[i]->ext4);
        }
        free(s->log[i]);
    }
    free(s);
}
