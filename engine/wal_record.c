/* See wal_record.h. The header of a record is followed by headers of its blocks and of its main data, then by the blocks'
 * images and data, then by the main data, which always ends the record. */
#include "wal_record.h"

#include <string.h>

#include "cursor.h"

#define BLOCK_DATA_SHORT 255 /* XLR_BLOCK_ID_DATA_SHORT and so on */
#define BLOCK_DATA_LONG 254
#define BLOCK_ORIGIN 253
#define BLOCK_TOPLEVEL_XID 252

#define FORK_MASK 0x0f
#define HAS_IMAGE 0x10
#define SAME_RELATION 0x80

#define IMAGE_HAS_HOLE 0x01
#define IMAGE_COMPRESSED_14 0x02 /* PostgreSQL 13 and 14: BKPIMAGE_IS_COMPRESSED */
#define IMAGE_COMPRESSED_15 0x1c /* from 15 on: pglz, lz4, zstd */
#define MAGIC_15 0xD110

/* Length of a block's image. */
static uint32_t take_image_header(struct cursor *c, uint16_t magic)
{
    uint16_t length = cursor_u16(c);
    cursor_take(c, 2); /* offset of the hole */
    uint8_t info = cursor_u8(c);
    uint8_t compressed = magic >= MAGIC_15 ? IMAGE_COMPRESSED_15 : IMAGE_COMPRESSED_14;
    if ((info & IMAGE_HAS_HOLE) && (info & compressed))
        cursor_take(c, 2); /* length of the hole */
    return length;
}

/* One block's header; returns the bytes that its image and data take. */
static uint32_t take_block(struct cursor *c, uint16_t magic, const struct fmt_relation *last, struct wal_block *out)
{
    uint8_t flags = cursor_u8(c);
    uint32_t length = cursor_u16(c);
    if (flags & HAS_IMAGE)
        length += take_image_header(c, magic);
    out->fork = flags & FORK_MASK;
    if (flags & SAME_RELATION)
        out->relation = *last;
    else {
        out->relation.tablespace = cursor_u32(c);
        out->relation.database = cursor_u32(c);
        out->relation.file = cursor_u32(c);
    }
    out->block = cursor_u32(c);
    return length;
}

bool wal_parse(const struct wal_record *r, struct wal_parts *out)
{
    out->toplevel_xid = out->blocks = out->main_length = 0;
    out->main = NULL;
    if (!r->body)
        return false;
    struct cursor c = {.at = r->body, .end = r->body + (r->length - 24)};
    struct fmt_relation last = {0};
    uint64_t behind = 0; /* bytes of images and data so far: what follows the headers */
    while (!c.short_of && (uint64_t)(c.end - c.at) > behind) {
        uint8_t id = cursor_u8(&c);
        if (id < WAL_MAX_BLOCKS && out->blocks < WAL_MAX_BLOCKS) {
            struct wal_block *block = &out->block[out->blocks++];
            behind += take_block(&c, r->magic, &last, block);
            last = block->relation;
        } else if (id == BLOCK_DATA_SHORT || id == BLOCK_DATA_LONG) {
            out->main_length = id == BLOCK_DATA_SHORT ? cursor_u8(&c) : cursor_u32(&c);
            behind += out->main_length;
            break;
        } else if (id == BLOCK_ORIGIN)
            cursor_take(&c, 2);
        else if (id == BLOCK_TOPLEVEL_XID)
            out->toplevel_xid = cursor_u32(&c);
        else
            return false;
    }
    if (c.short_of || (uint64_t)(c.end - c.at) != behind)
        return false;
    out->main = c.end - out->main_length;
    return true;
}
