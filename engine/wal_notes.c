/* See wal_notes.h. Records: src/include/catalog/pg_control.h, commands/dbcommands_xlog.h, utils/relmapper.h,
 * replication/message.h of PostgreSQL 13 to 18. */
#include "wal_notes.h"

#include <string.h>

#define PG_CLASS 1259u
#define PG_TABLESPACE 1213u
#define PG_DATABASE 1262u
#define PG_INHERITS 2611u
#define PG_NAMESPACE 2615u
#define FIRST_MOVED 16384u /* FirstNormalObjectId: catalogs have their OID as file until they are rewritten */

#define INFO 0xf0
enum { CHECKPOINT_SHUTDOWN = 0x00, CHECKPOINT_ONLINE = 0x10, RESTORE_POINT = 0x70, END_OF_RECOVERY = 0x90 };
enum { FPI_FOR_HINT = 0xA0, FPI = 0xB0 };

static const char PREFIX[] = "pgcdp"; /* of logical messages */

static bool watched(const struct notes *n, const struct fmt_relation *r)
{
    switch (r->file) {
    case PG_CLASS:
    case PG_TABLESPACE:
    case PG_DATABASE:
    case PG_INHERITS:
    case PG_NAMESPACE: return true;
    default: break;
    }
    for (uint32_t i = 0; r->file >= FIRST_MOVED && i < n->count; i++)
        if (n->moved[i].file == r->file && n->moved[i].database == r->database)
            return true;
    return false;
}

static bool touches(const struct notes *n, const struct wal_parts *p)
{
    for (uint32_t i = 0; i < p->blocks; i++)
        if (p->block[i].fork == MAIN_FORK && watched(n, &p->block[i].relation))
            return true;
    return false;
}

/* xl_relmap_update: database, tablespace, bytes; then RelMapFile: magic, count, pairs of OID and file. */
static void take_map(struct notes *n, const struct wal_parts *p)
{
    struct cursor c = {.at = p->main, .end = p->main + p->main_length};
    uint32_t database = cursor_u32(&c);
    cursor_take(&c, 12);
    uint32_t count = cursor_u32(&c);
    while (count-- && !c.short_of) {
        uint32_t oid = cursor_u32(&c), file = cursor_u32(&c);
        struct fmt_relation r = {.database = database, .file = file};
        bool wanted = oid == PG_CLASS || oid == PG_TABLESPACE || oid == PG_DATABASE;
        if (wanted && file != oid && !watched(n, &r) && n->count < NOTES_FILES) {
            n->moved[n->count].database = database;
            n->moved[n->count++].file = file;
        }
    }
}

/* xl_logical_message: database, transactional, length of the prefix with its NUL, of the message; then both. */
static bool is_ours(const struct wal_parts *p)
{
    uint64_t prefix;
    if (p->main_length < 24 + sizeof PREFIX)
        return false;
    memcpy(&prefix, p->main + 8, sizeof prefix);
    return prefix == sizeof PREFIX && memcmp(p->main + 24, PREFIX, sizeof PREFIX) == 0;
}

static bool wants_xlog(const struct notes *n, uint8_t info, const struct wal_parts *p)
{
    switch (info & INFO) {
    case CHECKPOINT_SHUTDOWN:
    case CHECKPOINT_ONLINE:
    case RESTORE_POINT:
    case END_OF_RECOVERY: return true;
    case FPI_FOR_HINT:
    case FPI: return touches(n, p);
    default: return false;
    }
}

bool notes_wants(struct notes *n, const struct wal_record *r, const struct wal_parts *p)
{
    switch (r->rmid) {
    case RM_XLOG: return wants_xlog(n, r->info, p);
    case RM_DBASE:
    case RM_TBLSPC: return true;
    case RM_RELMAP: take_map(n, p); return true;
    case RM_HEAP:
    case RM_HEAP2: return touches(n, p);
    case RM_LOGICALMSG: return is_ours(p);
    default: return false;
    }
}

void notes_save(const struct notes *n, FILE *out)
{
    fwrite(&n->count, sizeof n->count, 1, out);
    fwrite(n->moved, sizeof n->moved[0], n->count, out);
}

bool notes_restore(struct notes *n, struct cursor *in)
{
    n->count = cursor_u32(in);
    return n->count <= NOTES_FILES && (!n->count || cursor_copy(in, n->moved, n->count * sizeof n->moved[0])) && !in->short_of;
}
