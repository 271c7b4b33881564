/* See xfs_trans.h. */
#include "xfs_trans.h"

#include <stdlib.h>
#include <string.h>

#include "cursor.h"

#define OPERATION 12u
enum { START = 1, COMMIT = 2, CONTINUE = 4, WAS_CONT = 8, UNMOUNT = 32 };

#define HEADER_MAGIC 0x5452414Eu /* XFS_TRANS_HEADER_MAGIC */
#define LI_INODE 0x123Bu
#define INODE_FORMAT 56u /* sizeof(struct xfs_inode_log_format) */
#define INODE_CORE 96u   /* of the core, what both versions have */
#define INODE_MAGIC 0x494Eu
#define FORMAT_TREE 3    /* XFS_DINODE_FMT_BTREE */
#define FIELD_EXTENTS 4u /* XFS_ILOG_DEXT */

#define UNDER_WAY 8u         /* transactions; the kernel has at most four checkpoints under way */
#define REGION 2048u         /* bytes kept of one: an inode is never longer */
#define ITEMS (1u << 20)     /* inodes of a transaction */

struct item {
    uint64_t number, size;
    uint64_t extent; /* where its extents begin in `extent` of the transaction */
    uint32_t extents;
    bool tree, has_extents;
};

struct trans {
    bool used, broken, has_header, is_inode;
    uint32_t id, fields;
    uint32_t left, index;     /* regions of the item that are to come, and the number of the last one */
    uint32_t region_length;   /* of the region being gathered; behind REGION bytes it is counted only */
    uint8_t region[REGION];
    struct item now;
    struct item *item;
    uint64_t items, item_room;
    uint8_t *extent;
    uint64_t extent_bytes, extent_room;
};

struct xfs_trans {
    xfs_logged *logged;
    void *arg;
    uint32_t turn; /* which one to give up when all are used */
    struct trans trans[UNDER_WAY];
};

static uint16_t host_u16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

static uint32_t host_u32(const uint8_t *at) { return (uint32_t)host_u16(at) | (uint32_t)host_u16(at + 2) << 16; }

static uint64_t host_u64(const uint8_t *at) { return host_u32(at) | (uint64_t)host_u32(at + 4) << 32; }

/* ---- life ---- */

static void drop(struct trans *t)
{
    free(t->item);
    free(t->extent);
    *t = (struct trans){0};
}

void xfs_trans_forget(struct xfs_trans *t)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        drop(&t->trans[i]);
}

struct xfs_trans *xfs_trans_open(xfs_logged *logged, void *arg)
{
    struct xfs_trans *t = calloc(1, sizeof *t);
    if (t) {
        t->logged = logged;
        t->arg = arg;
    }
    return t;
}

void xfs_trans_close(struct xfs_trans *t)
{
    if (t)
        xfs_trans_forget(t);
    free(t);
}

/* ---- items ---- */

/* Makes room for `more` bytes behind `used`; at most ITEMS times 64. */
static bool make_room(void **memory, uint64_t *room, uint64_t used, uint64_t more)
{
    if (used + more <= *room)
        return true;
    uint64_t grown = (used + more) * 2;
    void *moved = grown <= (uint64_t)ITEMS * 128 ? realloc(*memory, grown) : NULL;
    if (!moved)
        return false;
    *memory = moved;
    *room = grown;
    return true;
}

static bool keep_item(struct trans *t)
{
    void *memory = t->item;
    bool kept = make_room(&memory, &t->item_room, t->items * sizeof *t->item, sizeof *t->item);
    t->item = memory;
    if (kept)
        t->item[t->items++] = t->now;
    return kept;
}

static bool keep_extents(struct trans *t)
{
    if (t->region_length > REGION || t->region_length % XFS_EXTENT_BYTES)
        return false;
    void *memory = t->extent;
    bool kept = make_room(&memory, &t->extent_room, t->extent_bytes, t->region_length);
    t->extent = memory;
    if (!kept)
        return false;
    if (t->region_length)
        memcpy(t->extent + t->extent_bytes, t->region, t->region_length);
    t->now.extent = t->extent_bytes;
    t->now.extents = t->region_length / XFS_EXTENT_BYTES;
    t->now.has_extents = true;
    t->extent_bytes += t->region_length;
    return true;
}

static bool begin_item(struct trans *t)
{
    if (t->region_length < 4 || !host_u16(t->region + 2))
        return false;
    t->left = host_u16(t->region + 2) - 1u;
    t->index = 0;
    t->is_inode = host_u16(t->region) == LI_INODE;
    if (!t->is_inode)
        return true;
    t->fields = host_u32(t->region + 4);
    t->now = (struct item){.number = host_u64(t->region + 16)};
    return t->region_length == INODE_FORMAT && t->left;
}

static bool take_core(struct trans *t)
{
    if (t->region_length < INODE_CORE || host_u16(t->region) != INODE_MAGIC)
        return false;
    t->now.size = host_u64(t->region + 56);
    t->now.tree = t->region[5] == FORMAT_TREE;
    return true;
}

/* The region that was gathered is whole. */
static bool end_region(struct trans *t)
{
    if (!t->has_header) {
        t->has_header = true;
        return t->region_length >= 4 && host_u32(t->region) == HEADER_MAGIC;
    }
    if (!t->left)
        return begin_item(t);
    t->left--;
    t->index++;
    if (!t->is_inode)
        return true;
    if (t->index == 1 && !take_core(t))
        return false;
    if (t->index == 2 && (t->fields & FIELD_EXTENTS) && !keep_extents(t))
        return false;
    return t->left || keep_item(t);
}

/* ---- operations ---- */

static struct trans *find(struct xfs_trans *x, uint32_t id)
{
    for (uint32_t i = 0; i < UNDER_WAY; i++)
        if (x->trans[i].used && x->trans[i].id == id)
            return &x->trans[i];
    return NULL;
}

static void begin(struct xfs_trans *x, uint32_t id)
{
    struct trans *t = find(x, id);
    for (uint32_t i = 0; !t && i < UNDER_WAY; i++)
        if (!x->trans[i].used)
            t = &x->trans[i];
    if (!t)
        t = &x->trans[x->turn++ % UNDER_WAY];
    drop(t);
    t->used = true;
    t->id = id;
}

static bool commit(struct xfs_trans *x, struct trans *t)
{
    if (!t || t->broken || t->left)
        return false;
    for (uint64_t i = 0; i < t->items; i++) {
        const struct item *item = &t->item[i];
        struct xfs_inode inode = {
            .number = item->number, .size = item->size, .tree = item->tree, .has_extents = item->has_extents,
            .extents = item->extents, .extent = item->extents ? t->extent + item->extent : NULL,
        };
        x->logged(x->arg, &inode);
    }
    return true;
}

static void take_region(struct trans *t, uint8_t flags, const uint8_t *data, uint32_t length)
{
    if (!(flags & WAS_CONT))
        t->region_length = 0;
    if (t->region_length < REGION) {
        uint32_t room = REGION - t->region_length;
        memcpy(t->region + t->region_length, data, length < room ? length : room);
    }
    t->region_length = length > UINT32_MAX - t->region_length ? UINT32_MAX : t->region_length + length;
    if (!(flags & CONTINUE) && !end_region(t))
        t->broken = true;
}

bool xfs_trans_take(struct xfs_trans *x, const uint8_t *body, uint64_t length, uint32_t operations)
{
    bool understood = true;
    struct cursor in = {.at = body, .end = body + length};
    for (; operations; operations--) {
        uint8_t head[OPERATION];
        if (!cursor_copy(&in, head, sizeof head))
            return false;
        uint32_t id = xfs_u32(head), bytes = xfs_u32(head + 4);
        uint8_t flags = head[9];
        const uint8_t *data = cursor_take(&in, bytes);
        if (in.short_of)
            return false;
        if (flags & UNMOUNT) {
            xfs_trans_forget(x);
            continue;
        }
        if (flags & START)
            begin(x, id);
        struct trans *t = find(x, id);
        if (flags & COMMIT) {
            understood &= commit(x, t);
            if (t)
                drop(t);
        } else if (t && !(flags & START)) {
            take_region(t, flags, data, bytes);
        }
    }
    return understood;
}
