/* The transactions in xfs's log: what operations of its records add up to (fs/xfs/libxfs/xfs_log_format.h).
 *
 * A record's body is a row of operations, each 12 bytes and what it carries: u32 transaction, u32 length, u8 client, u8 flags,
 * u16 0, big-endian. A transaction (a whole checkpoint of the log's in-memory items) begins with an operation START, has one
 * with its header, and takes effect with the one with COMMIT. What lies between are regions; one that does not fit into its
 * record has CONTINUE, and its rest, in the next, WAS_CONT. Several transactions may be under way.
 *
 * Regions add up to items: the first region of each begins with u16 type, u16 number of regions, in the machine's order. An
 * inode's are: xfs_inode_log_format (56 bytes), the inode's core, and if its fields say so the extents of its data fork, all
 * of them: 16 bytes each, big-endian: 1 bit not written yet, 54 bits first block in the file, 52 bits first block, 21 bits
 * number of blocks. Those of a fork that became a B-tree are in its blocks, which are not looked at. */
#ifndef PGCDP_XFS_TRANS_H
#define PGCDP_XFS_TRANS_H

#include <stdbool.h>
#include <stdint.h>

#define XFS_EXTENT_BYTES 16u

struct xfs_inode { /* as a committed transaction has it */
    uint64_t number, size;
    bool tree;            /* its extents are in a B-tree */
    bool has_extents;     /* they are here */
    uint32_t extents;
    const uint8_t *extent; /* XFS_EXTENT_BYTES each, as they are in the log */
};

typedef void xfs_logged(void *arg, const struct xfs_inode *inode);

struct xfs_trans;

/* NULL: no memory. `logged` is called for each inode of a transaction, when its COMMIT is taken. */
struct xfs_trans *xfs_trans_open(xfs_logged *logged, void *arg);
void xfs_trans_close(struct xfs_trans *t);

/* All that is under way is not known any more. */
void xfs_trans_forget(struct xfs_trans *t);

/* The body of the next record: `operations` of them. False: something in it was not understood, or a transaction took effect
 * that was not seen whole. */
bool xfs_trans_take(struct xfs_trans *t, const uint8_t *body, uint64_t length, uint32_t operations);

static inline uint32_t xfs_u32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline uint64_t xfs_u64(const uint8_t *at) { return (uint64_t)xfs_u32(at) << 32 | xfs_u32(at + 4); }

#endif
