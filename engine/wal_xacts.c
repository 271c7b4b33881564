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
#define DELETE_MOVED 0x10       /* XLH_DELETE_IS_PARTITION_MOVE: the row was inserted into another partition */
#define HEAP_CONFIRM 0x50
#define STANDBY_RUNNING_XACTS 0x10
#define OLDEST_RUNNING_AT 16u /* xl_running_xacts.oldestRunningXid */
enum { SMGR_CREATE = 0x10, SMGR_TRUNCATE = 0x20 };

#define FEW 16u /* a power of two: up to so many changes are looked through one by one */

struct changes {
    uint32_t count, room;
    struct fmt_change *change;
    uint32_t slots, *slot; /* a hash of them: their number + 1, 0 for none; no slots while they are few */
};

struct xact {
    struct xact *next;
    uint32_t xid;
    uint64_t first_lsn;
    struct changes changes;
};

struct xacts {
    xacts_ended *ended;
    void *arg;
    struct xact *bucket[BUCKETS];
    uint32_t count;
    struct changes merged;
    uint32_t *subxid; /* of the transaction that ends now, aligned */
    uint32_t subxid_room;
};

/* ---- changes ---- */

static bool same(const struct fmt_relation *a, const struct fmt_relation *b)
{
    return a->file == b->file && a->database == b->database && a->tablespace == b->tablespace;
}

static uint32_t hash_of(const struct fmt_relation *r)
{
    uint64_t key = ((uint64_t)r->database << 32 | r->file) ^ (uint64_t)r->tablespace << 16;
    return (uint32_t)(key * UINT64_C(0x9E3779B97F4A7C15) >> 32);
}

/* The slot that a relation is in, or would be put into. */
static uint32_t *slot_of(const struct changes *c, const struct fmt_relation *relation)
{
    uint32_t at = hash_of(relation) & (c->slots - 1);
    while (c->slot[at] && !same(&c->change[c->slot[at] - 1].relation, relation))
        at = (at + 1) & (c->slots - 1);
    return &c->slot[at];
}

/* Room for one more, and from the first that are too many to look through on, a hash of them all, at most half full. */
static bool grow(struct changes *c)
{
    uint32_t wanted = c->room ? c->room * 2 : 4;
    struct fmt_change *grown = realloc(c->change, wanted * sizeof *grown);
    if (!grown)
        return false;
    c->change = grown;
    c->room = wanted;
    if (wanted <= FEW)
        return true;
    uint32_t *slot = calloc(2 * (size_t)wanted, sizeof *slot);
    if (!slot)
        return false;
    free(c->slot);
    c->slot = slot;
    c->slots = 2 * wanted;
    for (uint32_t i = 0; i < c->count; i++)
        *slot_of(c, &c->change[i].relation) = i + 1;
    return true;
}

/* The change of a relation, made if it is missing; NULL: no memory. */
static struct fmt_change *change_in(struct changes *c, const struct fmt_relation *relation)
{
    if (c->slots) {
        uint32_t number = *slot_of(c, relation);
        if (number)
            return &c->change[number - 1];
    } else
        for (uint32_t i = c->count; i-- > 0;)
            if (same(&c->change[i].relation, relation))
                return &c->change[i];
    if (c->count == c->room && !grow(c))
        return NULL;
    struct fmt_change *made = &c->change[c->count++];
    *made = (struct fmt_change){.relation = *relation};
    if (c->slots)
        *slot_of(c, relation) = c->count;
    return made;
}

static void changes_free(struct changes *c)
{
    free(c->change);
    free(c->slot);
    *c = (struct changes){0};
}

/* Few leave their room to those that come next. */
static void changes_empty(struct changes *c)
{
    if (c->slots)
        changes_free(c);
    c->count = 0;
}

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
    x->count++;
    return t;
}

static void drop(struct xacts *x, struct xact **link)
{
    struct xact *t = *link;
    *link = t->next;
    x->count--;
    changes_free(&t->changes);
    free(t);
}

static void forget(struct xacts *x, uint32_t xid)
{
    struct xact **link = &x->bucket[xid % BUCKETS];
    while (*link && (*link)->xid != xid)
        link = &(*link)->next;
    if (*link)
        drop(x, link);
}

/* Transactions older than the oldest running one, prepared ones among those, ended without a record: in a crash. */
static void forget_before(struct xacts *x, uint32_t oldest)
{
    for (uint32_t b = 0; x->count && b < BUCKETS; b++)
        for (struct xact **link = &x->bucket[b]; *link;) {
            if ((int32_t)((*link)->xid - oldest) < 0)
                drop(x, link);
            else
                link = &(*link)->next;
        }
}

static struct fmt_change *change_of(struct xacts *x, const struct wal_record *r, const struct fmt_relation *relation)
{
    struct xact *t = find_or_make(x, r->xid, r->lsn);
    return t ? change_in(&t->changes, relation) : NULL;
}

static int take_heap(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    if (!p->blocks || !p->main_length || !r->xid)
        return 0;
    uint64_t inserted = 0, updated = 0, deleted = 0, moved = 0;
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
    else if (operation == HEAP_DELETE) {
        deleted = p->main_length < 8 || !(p->main[7] & DELETE_SUPER);
        moved = deleted && p->main_length >= 8 && (p->main[7] & DELETE_MOVED);
    } else if (operation == HEAP_UPDATE || operation == HEAP_HOT_UPDATE)
        updated = 1;
    if (!inserted && !updated && !deleted)
        return 0;
    struct fmt_change *c = change_of(x, r, &p->block[0].relation);
    if (!c)
        return -ENOMEM;
    c->inserted += inserted;
    c->updated += updated;
    c->deleted += deleted;
    c->moved += moved;
    return 0;
}

static int take_smgr(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    uint8_t operation = r->info & 0xf0;
    uint32_t at = operation == SMGR_CREATE ? 0 : 4; /* xl_smgr_create, xl_smgr_truncate */
    struct fmt_relation relation;
    if ((operation != SMGR_CREATE && operation != SMGR_TRUNCATE) || p->main_length < at + sizeof relation + 4 || !r->xid)
        return 0;
    memcpy(&relation, p->main + at, sizeof relation);
    if (operation == SMGR_CREATE) {
        uint32_t fork;
        memcpy(&fork, p->main + sizeof relation, sizeof fork);
        if (fork != MAIN_FORK && fork != INIT_FORK) /* of an unlogged table, WAL has the init fork alone */
            return 0;
    }
    struct fmt_change *c = change_of(x, r, &relation);
    if (!c)
        return -ENOMEM;
    c->flags |= operation == SMGR_CREATE ? FMT_CHANGE_CREATED : FMT_CHANGE_SHRUNK;
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
        out->files = take_list(&c, &out->file_count, sizeof(struct fmt_relation));
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
    for (uint32_t i = 0; t && i < t->changes.count; i++) {
        const struct fmt_change *from = &t->changes.change[i];
        struct fmt_change *c = change_in(&x->merged, &from->relation);
        if (!c)
            return -ENOMEM;
        c->flags |= from->flags;
        c->inserted += from->inserted;
        c->updated += from->updated;
        c->deleted += from->deleted;
        c->moved += from->moved;
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
    changes_empty(&x->merged);
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
        struct fmt_relation relation;
        memcpy(&relation, g->files + i * sizeof relation, sizeof relation);
        struct fmt_change *c = change_in(&x->merged, &relation);
        if (!c)
            return -ENOMEM;
        c->flags |= FMT_CHANGE_DROPPED;
    }
    end->changes = x->merged.count;
    end->change = x->merged.change;
    return x->ended(x->arg, end);
}

/* 0: no end of a transaction. */
static enum fmt_end_status status_of(uint8_t info)
{
    switch (info & OPERATION) {
    case OP_COMMIT: return FMT_END_COMMITTED;
    case OP_ABORT: return FMT_END_ABORTED;
    case OP_PREPARE: return FMT_END_PREPARED;
    case OP_COMMIT_PREPARED: return FMT_END_COMMITTED_PREPARED;
    case OP_ABORT_PREPARED: return FMT_END_ABORTED_PREPARED;
    default: return 0;
    }
}

static int take_xact(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    struct ending g = {.end = {.record = r, .xid = r->xid, .status = status_of(r->info)}};
    if (!g.end.status)
        return 0;
    bool commit = g.end.status == FMT_END_COMMITTED || g.end.status == FMT_END_COMMITTED_PREPARED;
    bool whole = g.end.status == FMT_END_PREPARED ? parse_prepare(r, p, &g) : parse_ending(r, p, commit, &g);
    if (!whole)
        return 0;
    int rc = report(x, &g);
    if (g.end.status == FMT_END_PREPARED)
        return rc;
    forget(x, g.end.xid);
    for (uint32_t i = 0; i < g.end.subxids; i++)
        forget(x, g.end.subxid[i]);
    return rc;
}

static void take_standby(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    uint32_t oldest;
    if ((r->info & 0xf0) != STANDBY_RUNNING_XACTS || p->main_length < OLDEST_RUNNING_AT + sizeof oldest)
        return;
    memcpy(&oldest, p->main + OLDEST_RUNNING_AT, sizeof oldest);
    forget_before(x, oldest);
}

int xacts_take(struct xacts *x, const struct wal_record *r, const struct wal_parts *p)
{
    switch (r->rmid) {
    case RM_XACT: return take_xact(x, r, p);
    case RM_HEAP:
    case RM_HEAP2: return take_heap(x, r, p);
    case RM_SMGR: return take_smgr(x, r, p);
    case RM_STANDBY: take_standby(x, r, p); return 0;
    default: return 0;
    }
}

int xacts_running(const struct xacts *x, xacts_runs *runs, void *arg)
{
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (const struct xact *t = x->bucket[b]; t; t = t->next) {
            int rc = runs(arg, t->xid);
            if (rc)
                return rc;
        }
    return 0;
}

/* ---- between runs ---- */

struct saved_xact { /* FORMAT.md 4.2 */
    uint64_t first_lsn;
    uint32_t xid, changes;
};

void xacts_save(const struct xacts *x, FILE *out)
{
    fwrite(&x->count, sizeof x->count, 1, out);
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (const struct xact *t = x->bucket[b]; t; t = t->next) {
            struct saved_xact saved = {t->first_lsn, t->xid, t->changes.count};
            fwrite(&saved, sizeof saved, 1, out);
            for (uint32_t i = 0; i < t->changes.count; i++)
                fwrite(&t->changes.change[i], sizeof t->changes.change[i], 1, out);
        }
}

bool xacts_restore(struct xacts *x, struct cursor *in)
{
    uint32_t count = cursor_u32(in);
    for (uint32_t i = 0; i < count; i++) {
        struct saved_xact s;
        struct fmt_change c;
        struct xact *t;
        if (!cursor_copy(in, &s, sizeof s) || !(t = find_or_make(x, s.xid, s.first_lsn)))
            return false;
        for (uint32_t k = 0; k < s.changes; k++) {
            struct fmt_change *into;
            if (!cursor_copy(in, &c, sizeof c) || !(into = change_in(&t->changes, &c.relation)))
                return false;
            *into = c;
        }
    }
    return true;
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
            changes_free(&t->changes);
            free(t);
        }
    changes_free(&x->merged);
    free(x->subxid);
    free(x);
}
