/* ext4's journal in captured writes: which blocks of files recovery of the filesystem finds, from which write on.
 *
 * The journal is a file (inode 8) whose extents the superblock has a copy of. A transaction is a row of blocks in it: descriptor
 * blocks, which say where the ones behind them belong, copies of blocks of metadata, and at last a commit block, which is written
 * when all others are durable (fs/jbd2; descriptor and commit begin with the magic, u32 type, u32 sequence, big-endian). There is
 * one transaction at a time. It takes effect with the write of its commit block.
 *
 * Extents of files (fs/ext4/ext4_extents.h) lie in an inode from its byte 40 on or in blocks of their own: a header of 12 bytes,
 * u16 magic, u16 entries, u16, u16 depth, u32; then 12 bytes each: u32 first block in the file, u16 number of blocks (over 32768:
 * not written yet), u16 and u32 first block. Which copy is an inode table and which a block of extents is not asked: what is
 * neither hardly looks so, and a wrong extent would still have to fit what is looked for.
 *
 * Not read: journals on other devices or with more than four extents, fast commits. */
#ifndef PGCDP_EXT4_LOG_H
#define PGCDP_EXT4_LOG_H

#include "logged.h"

struct ext4_log;

/* `superblock`: the first LOGGED_SUPERBLOCK bytes of the volume. Only extents within the first `file_bytes` of files are told.
 * NULL: not ext4, not understood, or no memory. */
struct ext4_log *ext4_log_open(const uint8_t *superblock, uint64_t file_bytes, logged_found *found, void *arg);
void ext4_log_close(struct ext4_log *x);

/* The next captured write to the volume; `length` is a multiple of 512. Calls `found` for what recovery finds now. */
enum logged_said ext4_log_take(struct ext4_log *x, uint64_t offset, const uint8_t *data, uint64_t length);

#endif
