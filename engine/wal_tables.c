/* See wal_tables.h. */
#include "wal_tables.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "format.h"

enum { ENDS, CHANGES, SUBXIDS, WRITES, NOTES, RUNNING, FILES };

static const char *const NAMES[FILES] = {"ends", "changes", "subxids", "wal", "notes", "running"};

struct tables {
    FILE *file[FILES];
};

int tables_open(struct tables **out, const char *directory, struct err *e)
{
    struct tables *t = calloc(1, sizeof *t);
    if (!t)
        return err_set(e, -ENOMEM, "no memory for the tables");
    for (int i = 0; i < FILES; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", directory, NAMES[i]);
        if (!(t->file[i] = fopen(path, "wxe"))) {
            int rc = err_sys(e, -errno, "cannot make %s", path);
            tables_close(t, NULL);
            return rc;
        }
    }
    *out = t;
    return 0;
}

static int put(struct tables *t, int which, const void *data, size_t size, size_t count)
{
    return fwrite(data, size, count, t->file[which]) == count ? 0 : -EIO;
}

int tables_end(struct tables *t, const struct xact_end *x)
{
    const struct wal_record *r = x->record;
    struct fmt_end end = {
        .lsn = r->lsn, .end_lsn = r->end_lsn, .write = r->write, .time_us = x->time_us, .first_lsn = x->first_lsn,
        .xid = x->xid, .database = x->database, .timeline = r->timeline, .changes = x->changes, .subxids = x->subxids,
        .begin_at = r->begin_at, .end_at = r->end_at, .status = x->status,
    };
    int rc = put(t, ENDS, &end, sizeof end, 1);
    if (!rc && x->changes)
        rc = put(t, CHANGES, x->change, sizeof *x->change, x->changes);
    if (!rc && x->subxids)
        rc = put(t, SUBXIDS, x->subxid, sizeof *x->subxid, x->subxids);
    return rc;
}

static int put_note(struct tables *t, const struct fmt_note *note, const void *body)
{
    static const uint8_t zeros[8];
    int rc = put(t, NOTES, note, sizeof *note, 1);
    if (!rc)
        rc = put(t, NOTES, body, 1, note->body_length);
    return rc ? rc : put(t, NOTES, zeros, 1, -note->body_length & 7u);
}

int tables_note(struct tables *t, const struct wal_record *r)
{
    struct fmt_note note = {
        .lsn = r->lsn, .end_lsn = r->end_lsn, .write = r->write, .timeline = r->timeline, .xid = r->xid,
        .begin_at = r->begin_at, .end_at = r->end_at, .body_length = r->length - 24, .magic = r->magic, .rmid = r->rmid, .info = r->info,
    };
    return put_note(t, &note, r->body);
}

int tables_mark(struct tables *t, uint64_t write, const void *name, uint32_t length)
{
    struct fmt_note note = {.write = write, .begin_at = UINT32_MAX, .end_at = UINT32_MAX, .body_length = length,
                            .rmid = FMT_NOTE_MARK};
    return put_note(t, &note, name);
}

int tables_lost(struct tables *t, uint64_t from, uint64_t to, uint64_t write)
{
    struct fmt_note note = {.lsn = from, .end_lsn = to, .write = write, .begin_at = UINT32_MAX, .end_at = UINT32_MAX, .rmid = FMT_NOTE_LOST};
    return put_note(t, &note, "");
}

int tables_running(struct tables *t, uint32_t xid) { return put(t, RUNNING, &xid, sizeof xid, 1); }

int tables_write(struct tables *t, const struct fmt_wal_write *row) { return put(t, WRITES, row, sizeof *row, 1); }

int tables_close(struct tables *t, struct err *e)
{
    int rc = 0;
    for (int i = 0; t && i < FILES; i++)
        if (t->file[i] && (ferror(t->file[i]) | fclose(t->file[i])) && !rc && e)
            rc = err_sys(e, -(errno ? errno : EIO), "cannot write the table %s", NAMES[i]);
    free(t);
    return rc;
}
