/* What the filesystem's log said lately of files as long as a WAL segment: which of their bytes were written, and where they lie.
 *
 * Only a few are kept; what is not known is not said to be there. */
#ifndef PGCDP_WAL_FILES_H
#define PGCDP_WAL_FILES_H

#include <stdbool.h>
#include <stdint.h>

#include "logged.h"

#define FILES_KEPT 64u
#define FILES_EXTENTS 128u /* an inode of 2048 bytes has at most as many */

struct wal_file {
    uint64_t number;
    uint64_t turn; /* 0: nothing in it */
    uint16_t volume;
    uint32_t extents;
    struct logged_extent extent[FILES_EXTENTS];
};

struct wal_files { /* zeroed at first */
    uint64_t turn;
    struct wal_file file[FILES_KEPT];
};

/* A file of which a log told. NULL: it is not one of `file_bytes`, or where it lies is not known (any more). */
struct wal_file *files_take(struct wal_files *f, uint16_t volume, const struct logged_file *file, uint64_t file_bytes);

/* Nothing is known of a volume any more. */
void files_forget(struct wal_files *f, uint16_t volume);

/* Whether the byte `at` of a file was written and lies at `place`, by some of its extents. */
bool files_extents_have(const struct logged_extent *extent, uint32_t extents, uint64_t at, uint64_t place);

/* ... by those of any file of a volume. */
bool files_any_has(const struct wal_files *f, uint16_t volume, uint64_t at, uint64_t place);

#endif
