/* See wal_settle.h. */
#include "wal_settle.h"

#include <string.h>

#include "util.h"

/* fs/jbd2: JBD2_MAGIC_NUMBER and JBD2_COMMIT_BLOCK, both big-endian; fs/xfs: XLOG_HEADER_MAGIC_NUM. */
static const uint8_t EXT4_COMMIT[8] = {0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 2};
static const uint8_t XFS_LOG[4] = {0xFE, 0xED, 0xBA, 0xBE};

static int release(struct settle *s, struct tables *t)
{
    int rc = 0;
    for (uint32_t i = 0; !rc && i < s->count; i++) {
        s->waiting[i].durable = s->commit ? s->commit : s->waiting[i].write;
        rc = tables_write(t, &s->waiting[i]);
    }
    s->count = 0;
    s->commit = 0;
    return rc;
}

int settle_wal(struct settle *s, struct tables *t, struct fmt_wal_write row, uint64_t fresh_from, bool again)
{
    int rc = again || s->commit || s->count == SETTLE_WAITING ? release(s, t) : 0;
    struct fmt_wal_write rest = row;
    row.durable = row.write;
    if (!s->holes || !fresh_from)
        return rc ? rc : tables_write(t, &row);
    if (!rc && fresh_from > row.from_lsn) { /* what lies in blocks that were there is durable at once */
        row.to_lsn = rest.from_lsn = fresh_from;
        rc = tables_write(t, &row);
    }
    s->waiting[s->count++] = rest;
    return rc;
}

int settle_other(struct settle *s, struct tables *t, uint64_t write, const uint8_t *data, uint64_t length)
{
    if (!s->count)
        return 0;
    if (write > s->waiting[s->count - 1].write + SETTLE_WITHIN)
        return release(s, t);
    for (uint64_t at = 0; at < length; at += BLOCK)
        if (!memcmp(data + at, EXT4_COMMIT, sizeof EXT4_COMMIT) || !memcmp(data + at, XFS_LOG, sizeof XFS_LOG))
            s->commit = write;
    return 0;
}

int settle_end(struct settle *s, struct tables *t) { return release(s, t); }
