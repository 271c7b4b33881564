/* See ext4_log.h. */
#include "ext4_log.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

#define EXT4_MAGIC 0xEF53u
#define HAS_JOURNAL 0x4u        /* EXT4_FEATURE_COMPAT_HAS_JOURNAL */
#define FAST_COMMIT 0x400u      /* EXT4_FEATURE_COMPAT_FAST_COMMIT */
#define BLOCKS_OF_INODE 1u      /* EXT3_JNL_BACKUP_BLOCKS */
#define COMMIT_BLOCK 2u

#define EXTENT_MAGIC 0xF30Au
#define ENTRY 12u
#define WRITTEN 32768u          /* EXT_INIT_MAX_LEN */
#define IN_INODE 4u             /* extents in it */
#define SLOT 128u               /* inodes are as long, or twice, four times ... */
#define REGULAR 0x8000u

#define FILES (1u << 16)        /* kept of a transaction */
#define PARTS 512u              /* extents of a block, with blocks of 4096 bytes at most 340 */

static const uint8_t JOURNAL_MAGIC[4] = {0xC0, 0x3B, 0x39, 0x98};

struct file {
    uint64_t number, size;
    uint64_t first; /* its extents in `extent` */
    uint32_t extents;
    enum logged_extents which;
};

struct ext4_log {
    logged_found *found;
    void *arg;
    uint64_t file_bytes, block;
    struct logged_extent journal[IN_INODE];
    uint32_t pieces;
    bool started; /* all of the transaction was seen */
    bool full;    /* and not all of it kept */
    struct file *file;
    uint64_t files;
    struct logged_extent *extent;
    uint64_t extents;
};

static uint16_t u16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

static uint32_t u32(const uint8_t *at) { return (uint32_t)u16(at) | (uint32_t)u16(at + 2) << 16; }

/* ---- extents ---- */

static bool begins_extents(const uint8_t *header, uint64_t room)
{
    return u16(header) == EXTENT_MAGIC && u16(header + 2) <= u16(header + 4) && u16(header + 4) <= room && u16(header + 6) <= 5;
}

/* The written ones behind a header, at most `room`. */
static uint32_t take_extents(uint64_t block, const uint8_t *header, uint64_t file_bytes, struct logged_extent *out)
{
    uint32_t found = 0;
    for (uint32_t i = 1; i <= u16(header + 2); i++) {
        const uint8_t *e = header + (uint64_t)i * ENTRY;
        uint64_t length = u16(e + 4), file = u32(e) * block;
        if (length <= WRITTEN && file < file_bytes)
            out[found++] = (struct logged_extent){
                .file = file, .length = length * block, .place = ((uint64_t)u16(e + 6) << 32 | u32(e + 8)) * block,
            };
    }
    return found;
}

static void keep(struct ext4_log *x, struct file file, const struct logged_extent *extent)
{
    if (x->files == FILES || x->extents + file.extents > FILES) {
        x->full = true;
        return;
    }
    file.first = x->extents;
    if (file.extents)
        memcpy(x->extent + x->extents, extent, file.extents * sizeof *extent);
    x->extents += file.extents;
    x->file[x->files++] = file;
}

/* An inode, if there is one. It is known by its generation, drawn by lot, and where it lies in its block. */
static void take_inode(struct ext4_log *x, const uint8_t *inode, uint64_t at)
{
    struct logged_extent extent[IN_INODE];
    if ((u16(inode) & 0xF000) != REGULAR || !begins_extents(inode + 40, IN_INODE))
        return;
    struct file file = {.number = (uint64_t)u32(inode + 100) << 16 | at / SLOT, .which = LOGGED_APART};
    file.size = (uint64_t)u32(inode + 108) << 32 | u32(inode + 4);
    if (!u16(inode + 40 + 6)) {
        file.which = LOGGED_ALL;
        file.extents = take_extents(x->block, inode + 40, x->file_bytes, extent);
    }
    keep(x, file, extent);
}

static void take_copy(struct ext4_log *x, const uint8_t *block)
{
    struct logged_extent extent[PARTS];
    uint64_t room = min_u64((x->block - ENTRY) / ENTRY, PARTS);
    if (begins_extents(block, room)) {
        struct file part = {.which = LOGGED_PART};
        if (!u16(block + 6) && (part.extents = take_extents(x->block, block, x->file_bytes, extent)))
            keep(x, part, extent);
        return;
    }
    for (uint64_t at = 0; at + SLOT <= x->block; at += SLOT)
        take_inode(x, block + at, at);
}

/* ---- transactions ---- */

static bool commit(struct ext4_log *x)
{
    bool all = x->started && !x->full;
    for (uint64_t i = 0; i < x->files; i++) {
        const struct file *f = &x->file[i];
        struct logged_file file = {
            .number = f->number, .size = f->size, .which = f->which, .extents = f->extents, .extent = x->extent + f->first,
        };
        x->found(x->arg, &file);
    }
    x->started = true;
    x->full = false;
    x->files = x->extents = 0;
    return all;
}

static bool in_journal(const struct ext4_log *x, uint64_t offset)
{
    for (uint32_t i = 0; i < x->pieces; i++)
        if (offset - x->journal[i].place < x->journal[i].length)
            return true;
    return false;
}

enum logged_said ext4_log_take(struct ext4_log *x, uint64_t offset, const uint8_t *data, uint64_t length)
{
    enum logged_said said = LOGGED_NOTHING;
    for (uint64_t at = 0; at + x->block <= length; at += x->block) {
        const uint8_t *block = data + at;
        if (!in_journal(x, offset + at))
            continue;
        said = said == LOGGED_UNSURE ? said : LOGGED_READ;
        if (memcmp(block, JOURNAL_MAGIC, sizeof JOURNAL_MAGIC) != 0)
            take_copy(x, block);
        else if (block[7] == COMMIT_BLOCK && !commit(x))
            said = LOGGED_UNSURE;
    }
    return said;
}

/* ---- life ---- */

/* struct ext4_super_block, 1024 bytes behind the volume's beginning. */
static bool read_superblock(struct ext4_log *x, const uint8_t *volume)
{
    const uint8_t *sb = volume + 1024, *inode = sb + 0x10C;
    uint32_t block_log = u32(sb + 0x18), compat = u32(sb + 0x5C);
    if (u16(sb + 0x38) != EXT4_MAGIC || block_log > 6 || !(compat & HAS_JOURNAL) || (compat & FAST_COMMIT) ||
        sb[0xFD] != BLOCKS_OF_INODE || !begins_extents(inode, IN_INODE) || u16(inode + 6))
        return false;
    x->block = UINT64_C(1024) << block_log;
    x->pieces = take_extents(x->block, inode, UINT64_MAX, x->journal);
    return x->pieces;
}

struct ext4_log *ext4_log_open(const uint8_t *superblock, uint64_t file_bytes, logged_found *found, void *arg)
{
    struct ext4_log *x = calloc(1, sizeof *x);
    if (!x)
        return NULL;
    *x = (struct ext4_log){.found = found, .arg = arg, .file_bytes = file_bytes};
    if (read_superblock(x, superblock)) {
        x->file = malloc(FILES * sizeof *x->file);
        x->extent = malloc(FILES * sizeof *x->extent);
        if (x->file && x->extent)
            return x;
    }
    ext4_log_close(x);
    return NULL;
}

void ext4_log_close(struct ext4_log *x)
{
    if (!x)
        return;
    free(x->file);
    free(x->extent);
    free(x);
}
