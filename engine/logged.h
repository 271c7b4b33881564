/* What a filesystem's log tells of files: the form that readers of logs (xfs_log, ext4_log) hand on. No code. */
#ifndef PGCDP_LOGGED_H
#define PGCDP_LOGGED_H

#include <stdint.h>

#define LOGGED_SUPERBLOCK 2048u /* bytes of a volume's beginning that tell which filesystem it is and where its log lies */

struct logged_extent { /* bytes that were written, of a file and where they lie on the volume */
    uint64_t file, place, length;
};

enum logged_extents {
    LOGGED_ALL,   /* of the file */
    LOGGED_PART,  /* some of a file that is not named: `number` and `size` are 0 */
    LOGGED_OLD,   /* none here: they are as they were */
    LOGGED_APART, /* none here: they are in a tree of blocks */
};

struct logged_file { /* as recovery of the filesystem finds it */
    uint64_t number, size; /* a number is not used again on its volume while the file is there */
    enum logged_extents which;
    uint32_t extents;
    const struct logged_extent *extent;
};

typedef void logged_found(void *arg, const struct logged_file *file);

enum logged_said {
    LOGGED_NOTHING, /* the write has nothing of the log */
    LOGGED_READ,    /* all that recovery finds by it was told */
    LOGGED_UNSURE,  /* it may find more */
};

#endif
