/* Which records are passed on as they are: checkpoints, restore points, messages of pgcdp, what makes and drops databases and
 * tablespaces, and everything that changes the catalogs that names come from. */
#ifndef PGCDP_WAL_NOTES_H
#define PGCDP_WAL_NOTES_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "cursor.h"
#include "wal.h"
#include "wal_record.h"

#define NOTES_FILES 256u

struct notes { /* the files of moved catalogs, as relation map records told; zeroed at first */
    uint32_t count;
    struct {
        uint32_t database, file;
    } moved[NOTES_FILES];
};

/* Whether a record is to be passed on. */
bool notes_wants(struct notes *n, const struct wal_record *r, const struct wal_parts *p);

/* What one run leaves for the next (FORMAT.md 4.2). False: that is not it. */
void notes_save(const struct notes *n, FILE *out);
bool notes_restore(struct notes *n, struct cursor *in);

#endif
