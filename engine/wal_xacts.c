/* See wal_xacts.h. Changes are gathered for each xid, subtransactions apart: only the end of the top transaction says
 * which of them belong to it. What a subtransaction did that was rolled back goes with its own abort record. */
#include "wal_xacts.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "cursor.h"

#define BUCKETS 65536u

#define OPERATION 0x70 /* XLOG_XACT_OPMASK, XLOG_HEAP_OPMASK */

enum { OP_COMMIT = 0x00, OP_PREPARE = 0x10, OP_ABORT = 0x20, OP_COMMIT_PREPARED = 0x30, OP_ABORT_PREPARED = 0x40 };
#define XACT_HAS_INFO 0x80
enum {
    HAS_DATABASE = 1,
    HAS_SUBXIDS = 2,
    HAS_FILES = 4,
    HAS_INVALIDATIONS = 8,
    HAS_TWO_PHASE = 16,
    HAS_DROPPED_STATS = 256,
};
#define INVALIDATION_BYTES 16u
#define MAGIC_15 0xD110
#define MAGIC_18 0xD118

enum { HEAP_INSERT = 0x00, HEAP_DELETE = 0x10, HEAP_UPDATE = 0x20, HEAP_HOT_UPDATE = 0x40 };
#define HEAP2_MULTI_INSERT 0x50
#define INSERT_SPECULATIVE 0x04 /* XLH_INSERT_IS_SPECULATIVE: counts when HEAP_CONFIRM follows */
#define DELETE_SUPER 0x08       /* XLH_DELETE_IS_SUPER: takes a speculative insert back */
#define HEAP_CONFIRM 0x50
enum { SMGR_CREATE = 0x10, SMGR_TRUNCATE = 0x20 };

struct xact {
    struct xact *next;
    uint32_t xid;
    uint64_t first_lsn;
    uint32_t changes, room;
    struct xact_change *change;
};

struct xacts {
    xacts_ended *ended;
    void *arg;
    struct xact *bucket[BUCKETS];
    struct xact_change *merged;
    uint32_t merged_count, merged_room;
    uint32_t *subxid; /* of the transaction that ends now, aligned */
    uint32_t subxid_room;
};

/* ---- changes ---- */

static struct xact *find(struct xacts *x, uint32_t xid)
{
    struct xact *t = x->bucket[xid % BUCKETS];
    while (t && t->xid != xid)
        t = t->next;
    return t;
}

static struct xact *find_or_make(struct xacts *x, uint32_t xid, uint64_t lsn)
{
    struct xact *t = find(x, xid);
    if (t || !(t = calloc(1, sizeof *t)))
        return t;
    *t = (struct xact){.next = x->bucket[xid % BUCKETS], .xid = xid, .first_lsn = lsn};
    x->bucket[xid % BUCKETS] = t;
    return t;
}

static void forget(struct xacts *x, uint32_t xid)
{
    struct xact **link = &x->bucket[xid % BUCKETS];
    while (*link && (*link)->xid != xid)
        link = &(*link)->next;
    struct xact *t = *link;
    if (!t)
        return;
    *link = t->next;
    free(t->change);
    free(t);
}

static bool same(const struct wal_relation *a, const struct wal_relation *b)
{
    return a->file == b->file && a->database == b->database && a->tablespace == b->tablespace;
}

/* The change of a relation in a growing list, made if it is missing; NULL: no memory. */
static struct xact_change *change_in(struct xact_change **list, uint32_t *count, uint32_t *room,
                                     const struct wal_relation *relation)
{
    for (uint32_t i = *count; i-- > 0;)
        if (same(&(*list)[i].relation, relation))
            return &(*list)[i];
    if (*count == *room) {
        uint32_t wanted = *room ? *room * 2 : 4;
        struct xact_change *grown = realloc(*list, wanted * sizeof **list);
        if (!grown)
            return NULL;
        *list = grown;
        *room = wanted;
    }
    struct xact_change *made = &(*list)[(*count)++];
    *made = (struct xact_change){.relation = *relation};
    return made;
}

static struct xact_change *change_of(struct xacts *x, const struct wal_record *r, const struct wal_relation *relation)
{
    struct xact *t = find_or_make(x, r->xid, r->lsn);
    return t ? change_in(&t->change, &t->changes, &t->room, relation) : NULL;
}

static int take_heap(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    if (!p->blocks || !p->main_length || !r->xid)
        return 0;
    uint64_t inserted = 0, updated = 0, deleted = 0;
    uint8_t operation = r->info & OPERATION;
    if (r->rmid == RM_HEAP2) {
        uint16_t rows;
        if (operation != HEAP2_MULTI_INSERT || p->main_length < 4)
            return 0;
        memcpy(&rows, p->main + 2, sizeof rows); /* xl_heap_multi_insert.ntuples */
        inserted = rows;
    } else if (operation == HEAP_INSERT)
        inserted = p->main_length < 3 || !(p->main[2] & INSERT_SPECULATIVE);
    else if (operation == HEAP_CONFIRM)
        inserted = 1;
    else if (operation == HEAP_DELETE)
        deleted = p->main_length < 8 || !(p->main[7] & DELETE_SUPER);
    else if (operation == HEAP_UPDATE || operation == HEAP_HOT_UPDATE)
        updated = 1;
    if (!inserted && !updated && !deleted)
        return 0;
    struct xact_change *c = change_of(x, r, &p->block[0].relation);
    if (!c)
        return -ENOMEM;
    c->inserted += inserted;
    c->updated += updated;
    c->deleted += deleted;
    return 0;
}

static int take_smgr(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    uint8_t operation = r->info & 0xf0;
    uint32_t at = operation == SMGR_CREATE ? 0 : 4; /* xl_smgr_create, xl_smgr_truncate */
    struct wal_relation relation;
    if ((operation != SMGR_CREATE && operation != SMGR_TRUNCATE) || p->main_length < at + sizeof relation + 4 || !r->xid)
        return 0;
    memcpy(&relation, p->main + at, sizeof relation);
    if (operation == SMGR_CREATE) {
        uint32_t fork;
        memcpy(&fork, p->main + sizeof relation, sizeof fork);
        if (fork)
            return 0;
    }
    struct xact_change *c = change_of(x, r, &relation);
    if (!c)
        return -ENOMEM;
    c->flags |= operation == SMGR_CREATE ? CHANGE_CREATED : CHANGE_SHRUNK;
    return 0;
}

/* ---- ends ---- */

/* A list of `count` entries of `size` bytes; NULL, and nothing in it, when it does not fit. */
static const uint8_t *take_list(struct cursor *c, uint32_t *count, uint32_t size)
{
    *count = cursor_u32(c);
    const uint8_t *list = cursor_take(c, (uint64_t)*count * size);
    if (c->short_of)
        *count = 0;
    return list;
}

struct ending {
    struct xact_end end;
    const uint8_t *subxids, *files;
    uint32_t file_count;
};

/* xl_xact_commit and xl_xact_abort with what follows them. */
static bool parse_ending(const struct wal_record *r, const struct wal_parts *p, bool commit, struct ending *out)
{
    struct cursor c = {.at = p->main, .end = p->main + p->main_length};
    memcpy(&out->end.time_us, cursor_take(&c, 8), 8);
    uint32_t info = r->info & XACT_HAS_INFO ? cursor_u32(&c) : 0;
    if (info & HAS_DATABASE) {
        out->end.database = cursor_u32(&c);
        cursor_take(&c, 4); /* its tablespace */
    }
    if (info & HAS_SUBXIDS)
        out->subxids = take_list(&c, &out->end.subxids, 4);
    if (info & HAS_FILES)
        out->files = take_list(&c, &out->file_count, sizeof(struct wal_relation));
    uint32_t count;
    if (info & HAS_DROPPED_STATS)
        take_list(&c, &count, r->magic >= MAGIC_18 ? 16 : 12);
    if (commit && (info & HAS_INVALIDATIONS))
        take_list(&c, &count, INVALIDATION_BYTES);
    if (info & HAS_TWO_PHASE)
        out->end.xid = cursor_u32(&c);
    return !c.short_of;
}

/* xl_xact_prepare (TwoPhaseFileHeader), then the name, padded to 8 bytes, then the subxids. */
static bool parse_prepare(const struct wal_record *r, const struct wal_parts *p, struct ending *out)
{
    struct cursor c = {.at = p->main, .end = p->main + p->main_length};
    uint16_t name;
    cursor_take(&c, 12); /* magic, length, xid */
    out->end.database = cursor_u32(&c);
    memcpy(&out->end.time_us, cursor_take(&c, 8), 8);
    cursor_take(&c, 4); /* owner */
    out->end.subxids = cursor_u32(&c);
    cursor_take(&c, r->magic >= MAGIC_15 ? 22 : 14); /* counts of files, from 15 on of statistics, of invalidations; a flag */
    memcpy(&name, cursor_take(&c, 2), 2);
    cursor_take(&c, 16); /* origin */
    cursor_take(&c, (name + 7u) & ~7u);
    out->subxids = cursor_take(&c, (uint64_t)out->end.subxids * 4);
    return !c.short_of;
}

static int merge(struct xacts *x, const struct xact *t)
{
    for (uint32_t i = 0; t && i < t->changes; i++) {
        struct xact_change *c = change_in(&x->merged, &x->merged_count, &x->merged_room, &t->change[i].relation);
        if (!c)
            return -ENOMEM;
        c->flags |= t->change[i].flags;
        c->inserted += t->change[i].inserted;
        c->updated += t->change[i].updated;
        c->deleted += t->change[i].deleted;
    }
    return 0;
}

/* A record's subxids lie anywhere in it. */
static int keep_subxids(struct xacts *x, struct ending *g)
{
    if (g->end.subxids > x->subxid_room) {
        uint32_t *grown = realloc(x->subxid, (size_t)g->end.subxids * sizeof *grown);
        if (!grown)
            return -ENOMEM;
        x->subxid = grown;
        x->subxid_room = g->end.subxids;
    }
    if (g->end.subxids)
        memcpy(x->subxid, g->subxids, (size_t)g->end.subxids * sizeof *x->subxid);
    g->end.subxid = x->subxid;
    return 0;
}

static int report(struct xacts *x, struct ending *g)
{
    struct xact_end *end = &g->end;
    x->merged_count = 0;
    if (keep_subxids(x, g))
        return -ENOMEM;
    struct xact *top = find(x, end->xid);
    if (merge(x, top))
        return -ENOMEM;
    end->first_lsn = top ? top->first_lsn : 0;
    for (uint32_t i = 0; i < end->subxids; i++) {
        struct xact *sub = find(x, end->subxid[i]);
        if (merge(x, sub))
            return -ENOMEM;
        if (sub && (!end->first_lsn || sub->first_lsn < end->first_lsn))
            end->first_lsn = sub->first_lsn;
    }
    for (uint32_t i = 0; i < g->file_count; i++) {
        struct wal_relation relation;
        memcpy(&relation, g->files + i * sizeof relation, sizeof relation);
        struct xact_change *c = change_in(&x->merged, &x->merged_count, &x->merged_room, &relation);
        if (!c)
            return -ENOMEM;
        c->flags |= CHANGE_DROPPED;
    }
    end->changes = x->merged_count;
    end->change = x->merged;
    return x->ended(x->arg, end);
}

/* 0: no end of a transaction. */
static enum xact_status status_of(uint8_t info)
{
    switch (info & OPERATION) {
    case OP_COMMIT: return XACT_COMMITTED;
    case OP_ABORT: return XACT_ABORTED;
    case OP_PREPARE: return XACT_PREPARED;
    case OP_COMMIT_PREPARED: return XACT_COMMITTED_PREPARED;
    case OP_ABORT_PREPARED: return XACT_ABORTED_PREPARED;
    default: return 0;
    }
}

static int take_xact(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    struct ending g = {.end = {.record = r, .xid = r->xid, .status = status_of(r->info)}};
    if (!g.end.status)
        return 0;
    bool commit = g.end.status == XACT_COMMITTED || g.end.status == XACT_COMMITTED_PREPARED;
    bool whole = g.end.status == XACT_PREPARED ? parse_prepare(r, p, &g) : parse_ending(r, p, commit, &g);
    if (!whole)
        return 0;
    int rc = report(x, &g);
    if (g.end.status == XACT_PREPARED)
        return rc;
    forget(x, g.end.xid);
    for (uint32_t i = 0; i < g.end.subxids; i++)
        forget(x, g.end.subxid[i]);
    return rc;
}

int xacts_take(struct xacts *x, const struct wal_record *r)
{
    struct wal_parts p;
    if (r->rmid != RM_XACT && r->rmid != RM_HEAP && r->rmid != RM_HEAP2 && r->rmid != RM_SMGR)
        return 0;
    if (!wal_parse(r, &p))
        return 0;
    if (r->rmid == RM_XACT)
        return take_xact(x, r, &p);
    return r->rmid == RM_SMGR ? take_smgr(x, r, &p) : take_heap(x, r, &p);
}

int xacts_open(struct xacts **out, xacts_ended *ended, void *arg)
{
    struct xacts *x = calloc(1, sizeof *x);
    if (!x)
        return -ENOMEM;
    x->ended = ended;
    x->arg = arg;
    *out = x;
    return 0;
}

void xacts_close(struct xacts *x)
{
    if (!x)
        return;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct xact *t = x->bucket[b], *next; t; t = next) {
            next = t->next;
            free(t->change);
            free(t);
        }
    free(x->merged);
    free(x->subxid);
    free(x);
}
