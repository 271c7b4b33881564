/* See xfs_log.h. */
#include "xfs_log.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"
#include "xfs_trans.h"

#define SECTOR 512u
#define RECORD_MAGIC 0xFEEDBABEu
#define FORMAT_LITTLE 1u            /* XLOG_FMT_LINUX_LE: items are in this machine's order */
#define RECORD_LIMIT (256u << 10)   /* XLOG_MAX_RECORD_BSIZE */
#define PER_HEADER (32u << 10)      /* bytes of the body that one sector of header serves */
#define CYCLES 64u                  /* ... which are so many sectors */
#define EXTENTS 128u                /* an inode of 2048 bytes has at most as many */
#define UNDER_WAY 16u               /* records; the kernel has at most eight */

struct record {
    bool used;
    uint64_t at;          /* where it begins in the ring */
    uint64_t length;      /* header and body */
    uint64_t have;        /* bytes from the beginning on that are there */
    uint64_t lsn;         /* round and sector */
    uint32_t before;      /* sector where the record before it begins */
    uint32_t header;      /* bytes */
    uint32_t operations;
    uint8_t *data;
    uint64_t room;
};

struct xfs_log {
    logged_found *found;
    void *arg;
    uint64_t begin, bytes;  /* the ring on the volume */
    uint64_t block, group_blocks;
    uint32_t group_log;
    bool started;           /* `last` is known */
    uint64_t last;          /* LSN of the record taken last */
    struct xfs_trans *trans;
    struct record record[UNDER_WAY];
};

/* ---- geometry ---- */

static uint64_t place_of(const struct xfs_log *x, uint64_t block)
{
    uint64_t group = block >> x->group_log;
    return (group * x->group_blocks + (block & ((UINT64_C(1) << x->group_log) - 1))) * x->block;
}

/* An extent as it is in the log; false: not written yet, it reads as zeros. */
static bool decode(const struct xfs_log *x, const uint8_t *logged, struct logged_extent *out)
{
    uint64_t high = xfs_u64(logged), low = xfs_u64(logged + 8);
    *out = (struct logged_extent){
        .file = (high >> 9 & ((UINT64_C(1) << 54) - 1)) * x->block,
        .place = place_of(x, (high & 511) << 43 | low >> 21),
        .length = (low & ((1u << 21) - 1)) * x->block,
    };
    return !(high >> 63);
}

/* xfs_dsb, as it is on disk. */
static bool read_superblock(struct xfs_log *x, const uint8_t *sb)
{
    uint64_t log_begin = xfs_u64(sb + 48), log_blocks = xfs_u32(sb + 96);
    x->block = xfs_u32(sb + 4);
    x->group_blocks = xfs_u32(sb + 84);
    x->group_log = sb[124];
    if (memcmp(sb, "XFSB", 4) || x->block < SECTOR || x->block > 65536 || (x->block & (x->block - 1)) || x->group_log > 32 ||
        !x->group_blocks || x->group_blocks > UINT64_C(1) << x->group_log || !log_begin || !log_blocks)
        return false;
    x->begin = place_of(x, log_begin);
    x->bytes = log_blocks * x->block;
    return x->bytes > 2 * RECORD_LIMIT;
}

static void inode_logged(void *arg, const struct xfs_inode *inode)
{
    struct xfs_log *x = arg;
    struct logged_extent extent[EXTENTS];
    struct logged_file file = {
        .number = inode->number, .size = inode->size, .which = LOGGED_OLD, .extent = extent,
    };
    if (inode->tree)
        file.which = LOGGED_APART;
    else if (inode->has_extents)
        file.which = LOGGED_ALL;
    for (uint32_t i = 0; i < inode->extents && file.extents < EXTENTS; i++)
        file.extents += decode(x, inode->extent + (uint64_t)i * XFS_EXTENT_BYTES, &extent[file.extents]);
    x->found(x->arg, &file);
}

/* ---- life ---- */

struct xfs_log *xfs_log_open(const uint8_t *superblock, logged_found *found, void *arg)
{
    struct xfs_log *x = calloc(1, sizeof *x);
    if (!x)
        return NULL;
    x->found = found;
    x->arg = arg;
    if (read_superblock(x, superblock))
        x->trans = xfs_trans_open(inode_logged, x);
    if (x->trans)
        return x;
    free(x);
    return NULL;
}

void xfs_log_close(struct xfs_log *x)
{
    if (!x)
        return;
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        free(x->record[i].data);
    xfs_trans_close(x->trans);
    free(x);
}

static void forget(struct xfs_log *x)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        x->record[i].used = false;
    x->started = false;
    xfs_trans_forget(x->trans);
}

/* ---- records ---- */

/* The header of the record that begins at `at` in the ring. */
static bool read_header(struct record *r, uint64_t at, const uint8_t *h)
{
    uint32_t length = xfs_u32(h + 12), size = xfs_u32(h + 320);
    if (xfs_u32(h) != RECORD_MAGIC || xfs_u32(h + 8) != 2 || xfs_u32(h + 300) != FORMAT_LITTLE || !length || length % SECTOR ||
        length > size || size > RECORD_LIMIT || xfs_u32(h + 16) != xfs_u32(h + 4) || xfs_u32(h + 20) != at / SECTOR)
        return false;
    r->at = at;
    r->lsn = xfs_u64(h + 16);
    r->before = xfs_u32(h + 36);
    r->operations = xfs_u32(h + 40);
    r->header = (size + PER_HEADER - 1) / PER_HEADER * SECTOR;
    r->length = r->header + length;
    r->have = 0;
    return true;
}

/* A place for a record; NULL: no memory, or none is free, since one that the others wait for has not come. */
static struct record *free_record(struct xfs_log *x, uint64_t length)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++) {
        struct record *r = &x->record[i];
        if (r->used)
            continue;
        uint8_t *data = r->room < length ? realloc(r->data, length) : r->data;
        if (!data)
            return NULL;
        r->data = data;
        r->room = max_u64(r->room, length);
        return r;
    }
    return NULL;
}

/* The record that the bytes at `at` in the ring belong to, or NULL. */
static struct record *record_at(struct xfs_log *x, uint64_t at, const uint8_t *data)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++) {
        struct record *r = &x->record[i];
        if (r->used && r->have < r->length && (r->at + r->have) % x->bytes == at)
            return r;
    }
    struct record fresh = {0};
    if (!read_header(&fresh, at, data))
        return NULL;
    struct record *r = free_record(x, fresh.length);
    if (!r) {
        forget(x);
        return NULL;
    }
    fresh.data = r->data;
    fresh.room = r->room;
    fresh.used = true;
    *r = fresh;
    return r;
}

/* Puts back what the rounds' numbers took the place of; false: a sector is of another round. */
static bool unpack(struct record *r, uint32_t round)
{
    for (uint64_t sector = 0; r->header + sector * SECTOR < r->length; sector++) {
        uint8_t *at = r->data + r->header + sector * SECTOR;
        uint64_t header = sector / CYCLES, within = sector % CYCLES;
        if (xfs_u32(at) - round > 2) /* the next one behind the ring's end; the one that is RECORD_MAGIC is left out */
            return false;
        memcpy(at, r->data + (header ? header * SECTOR + 4 : 44) + 4 * within, 4);
    }
    return true;
}

static struct record *next_record(struct xfs_log *x)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++) {
        struct record *r = &x->record[i];
        if (r->used && x->started && r->lsn <= x->last)
            r->used = false; /* from before reading began */
        if (r->used && r->have == r->length && (!x->started || r->before == (uint32_t)x->last))
            return r;
    }
    return NULL;
}

/* Takes all records that are whole and have all before them. */
static bool take_records(struct xfs_log *x)
{
    bool understood = true;
    for (struct record *r; (r = next_record(x));) {
        x->started = true;
        x->last = r->lsn;
        r->used = false;
        if (unpack(r, (uint32_t)(r->lsn >> 32)) &&
            xfs_trans_take(x->trans, r->data + r->header, r->length - r->header, r->operations))
            continue;
        understood = false;
    }
    return understood;
}

static bool any_whole(const struct xfs_log *x)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        if (x->record[i].used && x->record[i].have == x->record[i].length)
            return true;
    return false;
}

enum logged_said xfs_log_take(struct xfs_log *x, uint64_t offset, const uint8_t *data, uint64_t length)
{
    uint64_t begin = max_u64(offset, x->begin), end = min_u64(offset + length, x->begin + x->bytes);
    if (begin >= end)
        return LOGGED_NOTHING;
    bool understood = true;
    data += begin - offset;
    for (uint64_t here; begin + SECTOR <= end; begin += here, data += here) {
        uint64_t at = begin - x->begin;
        struct record *r = record_at(x, at, data);
        here = SECTOR;
        if (!r) {
            understood = false;
            continue;
        }
        here = min_u64(end - begin, r->length - r->have);
        memcpy(r->data + r->have, data, here);
        r->have += here;
    }
    understood &= take_records(x);
    return understood && !any_whole(x) ? LOGGED_READ : LOGGED_UNSURE;
}
