/* What xfs's log said lately of files as long as a WAL segment: which of their bytes were written, and where they lie.
 *
 * A file is known by its inode. Only a few are kept; what is not known is not said to be there. */
#ifndef PGCDP_WAL_FILES_H
#define PGCDP_WAL_FILES_H

#include <stdbool.h>
#include <stdint.h>

#include "xfs_log.h"

#define FILES_KEPT 64u
#define FILES_EXTENTS 128u /* an inode of 2048 bytes has at most as many */

struct wal_file {
    uint64_t inode;
    uint64_t turn; /* 0: nothing in it */
    uint16_t volume;
    uint32_t extents;
    struct xfs_extent extent[FILES_EXTENTS];
};

struct wal_files { /* zeroed at first */
    uint64_t turn;
    struct wal_file file[FILES_KEPT];
};

/* An inode with its extents, decoded by `x`. NULL when it is not a file of `file_bytes`: it is forgotten. */
struct wal_file *files_take(struct wal_files *f, const struct xfs_log *x, uint16_t volume, const struct xfs_inode *inode,
                                  uint64_t file_bytes);

/* Nothing is known of a volume any more. */
void files_forget(struct wal_files *f, uint16_t volume);

/* Whether the byte `at` of the file was written, and lies at `place`. */
bool files_has(const struct wal_file *file, uint64_t at, uint64_t place);

/* ... of any file of a volume. */
bool files_any_has(const struct wal_files *f, uint16_t volume, uint64_t at, uint64_t place);

#endif
