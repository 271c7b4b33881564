/* See wal.h. The pages are in wal_pages. */
#include "wal.h"

#include <isa-l/crc.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"
#include "wal_pages.h"

#define RECORD_HEADER 24u
#define RECORD_CRC 20u            /* offset of xl_crc in the header */
#define RECORD_LIMIT (1020u << 20) /* XLogRecordMaxSize */
#define TORN_TRIED 4u              /* pages of a record */

#define RM_XLOG 0
#define XLOG_SWITCH 0x40

#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
bool wal_fuzz_ignore_crc;
#else
static const bool wal_fuzz_ignore_crc = false;
#endif

struct wal {
    struct wal_options o;
    struct pages pages;
    uint64_t previous;  /* LSN of the record before the next one; 0: not known */
    uint64_t next_read; /* where the next record begins, as far as was read; pages.next runs ahead when it jumps */
    uint64_t unmapped_from; /* of the write taken last */
    uint8_t *record;
    size_t record_room;
};

/* ---- records ---- */

enum outcome { DONE, WAIT, AGAIN }; /* AGAIN: nothing is to be had here, `next` has moved on */

/* Gathers the `length` bytes of the record at `lsn` into `out`. */
static enum outcome gather(struct wal *w, uint64_t lsn, uint32_t length, uint8_t *out, uint64_t *end)
{
    uint32_t missing = length;
    uint64_t at = lsn;
    for (;;) {
        uint64_t page = at / PAGE;
        const uint8_t *content = pages_get(&w->pages, page);
        if (!content)
            return WAIT;
        uint32_t begin = (uint32_t)(at % PAGE);
        if (begin == 0) {
            if (page_u16(content + 2) & FIRST_IS_OVERWRITE) { /* a crash cut the record off, and WAL goes on behind it */
                w->pages.next = at;
                return AGAIN;
            }
            if (!(page_u16(content + 2) & FIRST_IS_CONTRECORD) || page_u32(content + 16) != missing)
                return WAIT;
            begin = pages_header(&w->pages, page);
        }
        uint32_t here = PAGE - begin < missing ? PAGE - begin : missing;
        if (!pages_reach(&w->pages, page, begin + here))
            return WAIT;
        memcpy(out + (length - missing), content + begin, here);
        missing -= here;
        if (!missing) {
            *end = page * PAGE + maxalign(begin + here);
            return DONE;
        }
        at = (page + 1) * PAGE;
    }
}

static bool make_room(struct wal *w, size_t length)
{
    if (length <= w->record_room)
        return true;
    size_t room = length * 2;
    uint8_t *grown = realloc(w->record, room);
    if (!grown)
        return false;
    w->record = grown;
    w->record_room = room;
    return true;
}

/* Where the bytes behind `length` bytes from `lsn` on lie, page headers passed over. */
static uint64_t end_of(const struct wal *w, uint64_t lsn, uint64_t length)
{
    uint64_t at = lsn;
    for (;;) {
        uint64_t begin = at % PAGE ? at % PAGE : pages_header(&w->pages, at / PAGE);
        if (begin + length <= PAGE)
            return at / PAGE * PAGE + maxalign(begin + length);
        length -= PAGE - begin;
        at = (at / PAGE + 1) * PAGE;
    }
}

/* A record longer than the ring is passed over unread, once the ring is full of it. */
static enum outcome pass_over(struct wal *w, uint64_t lsn, uint32_t length, struct wal_record *r)
{
    uint64_t last = lsn / PAGE + w->pages.slots - 1;
    for (uint64_t page = lsn / PAGE + 1; page <= last; page++) {
        const uint8_t *content = pages_get(&w->pages, page);
        if (!content || !(page_u16(content + 2) & FIRST_IS_CONTRECORD) ||
            end_of(w, page * PAGE, page_u32(content + 16)) != end_of(w, lsn, length))
            return WAIT;
    }
    r->end_lsn = end_of(w, lsn, length);
    r->body = NULL;
    return DONE;
}

/* The record at w->pages.next. */
static enum outcome next_record(struct wal *w, struct wal_record *r)
{
    uint64_t lsn = w->pages.next;
    const uint8_t *page = pages_get(&w->pages, lsn / PAGE);
    if (!page)
        return WAIT;
    if (lsn % PAGE == 0) {
        if (page_u16(page + 2) & FIRST_IS_CONTRECORD) {
            if (w->previous)
                return WAIT;
            w->pages.next = end_of(w, lsn, page_u32(page + 16)); /* after a jump: the rest of a record that is lost */
            return AGAIN;
        }
        lsn += pages_header(&w->pages, lsn / PAGE);
    }
    uint8_t head[RECORD_HEADER];
    uint64_t end = 0;
    if (!pages_reach(&w->pages, lsn / PAGE, (uint32_t)(lsn % PAGE) + 4))
        return WAIT;
    uint32_t length = page_u32(page + lsn % PAGE);
    if (length < RECORD_HEADER || length > RECORD_LIMIT)
        return WAIT;
    if (length / PAGE + 3 > w->pages.slots) {
        *r = (struct wal_record){.lsn = lsn, .length = length};
        return pass_over(w, lsn, length, r);
    }
    const uint8_t *record;
    uint32_t begin = (uint32_t)(lsn % PAGE);
    if (begin + length <= PAGE && pages_reach(&w->pages, lsn / PAGE, begin + length)) {
        record = page + begin;
        end = lsn / PAGE * PAGE + maxalign(begin + length);
    } else {
        if (!make_room(w, length))
            return WAIT;
        enum outcome got = gather(w, lsn, length, w->record, &end);
        if (got != DONE)
            return got;
        record = w->record;
    }
    if (w->previous && page_u64(record + 8) != w->previous)
        return WAIT;
    memcpy(head, record, RECORD_HEADER);
    uint32_t crc = crc32_iscsi((uint8_t *)record + RECORD_HEADER, (int)(length - RECORD_HEADER), UINT32_MAX);
    crc = ~crc32_iscsi(head, RECORD_CRC, crc);
    if (crc != page_u32(head + RECORD_CRC) && !wal_fuzz_ignore_crc)
        return WAIT;
    *r = (struct wal_record){
        .lsn = lsn, .end_lsn = end, .prev_lsn = page_u64(head + 8), .xid = page_u32(head + 4), .length = length,
        .magic = page_u16(page), .rmid = head[17], .info = head[16], .body = record + RECORD_HEADER,
        .timeline = page_u32(page + 4),
    };
    return DONE;
}

/* The next record, when all that it lacks is the second half of one page that was torn apart. */
static enum outcome with_lone_half(struct wal *w, struct wal_record *r)
{
    uint64_t page = pages_torn(&w->pages, w->pages.next / PAGE);
    for (uint32_t pages = 0; page && pages < TORN_TRIED; pages++, page = pages_torn(&w->pages, page + 1)) {
        for (uint32_t candidate = 0; candidate < STASHED; candidate++) {
            if (!pages_try(&w->pages, page, candidate))
                continue;
            enum outcome got = next_record(w, r);
            if (got == DONE)
                return DONE;
            pages_reject(&w->pages, page);
        }
    }
    return WAIT;
}

/* A page said where to go on: what lies between is not known, and nothing links to it. At first, that is what lies behind
 * where reading shall begin. */
static int jump(struct wal *w)
{
    uint64_t from = w->next_read;
    if (!from && w->o.start_lsn < w->pages.next)
        from = w->o.start_lsn;
    w->pages.jumped = false;
    w->previous = 0;
    w->next_read = w->pages.next;
    return from && w->o.lost ? w->o.lost(w->o.arg, from, w->pages.next, w->pages.write) : 0;
}

static int advance(struct wal *w)
{
    int rc = w->pages.jumped ? jump(w) : 0;
    while (!rc) {
        struct wal_record r;
        enum outcome got = next_record(w, &r);
        if (got == WAIT)
            got = with_lone_half(w, &r);
        if (got == WAIT)
            return 0;
        w->next_read = w->pages.next;
        if (got == AGAIN)
            continue;
        if (r.body) /* else it was passed over unread */
            pages_prove(&w->pages, r.lsn, r.end_lsn);
        r.write = w->pages.write;
        r.begin_at = pages_place(&w->pages, r.lsn, false);
        r.end_at = pages_place(&w->pages, r.end_lsn, true);
        if (!w->unmapped_from && pages_unmapped(&w->pages, r.lsn, r.end_lsn))
            w->unmapped_from = r.lsn;
        w->previous = r.lsn;
        w->pages.next = r.end_lsn;
        uint32_t segment = w->o.segment_bytes;
        if (r.rmid == RM_XLOG && (r.info & 0xf0) == XLOG_SWITCH && r.body && r.end_lsn % segment)
            w->pages.next += segment - r.end_lsn % segment;
        w->next_read = w->pages.next;
        if (r.timeline > w->pages.timeline)
            w->pages.timeline = r.timeline;
        if (r.lsn >= w->o.start_lsn)
            rc = w->o.found(w->o.arg, &r);
    }
    return rc;
}

int wal_take(struct wal *w, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    w->unmapped_from = 0;
    return pages_take(&w->pages, write, volume, offset, data, length) ? advance(w) : 0;
}

uint64_t wal_next_lsn(const struct wal *w) { return w->next_read; }

uint64_t wal_unmapped_from(const struct wal *w) { return w->unmapped_from; }

bool wal_again(const struct wal *w) { return w->pages.again; }

bool wal_unmapped(const struct wal *w, uint64_t from, uint64_t to) { return pages_unmapped(&w->pages, from, to); }

void wal_map(struct wal *w, uint64_t from, wal_mapped *mapped, void *arg) { pages_map(&w->pages, from, mapped, arg); }

void wal_mapped_upto(struct wal *w, uint64_t write) { w->pages.mapped_upto = max_u64(w->pages.mapped_upto, write); }

/* ---- life ---- */

void wal_save(const struct wal *w, FILE *out)
{
    uint64_t kept[2] = {w->previous, w->next_read};
    fwrite(kept, sizeof kept, 1, out);
    pages_save(&w->pages, out);
}

bool wal_restore(struct wal *w, struct cursor *in)
{
    uint64_t kept[2];
    if (!cursor_copy(in, kept, sizeof kept) || !pages_restore(&w->pages, in))
        return false;
    w->previous = kept[0];
    w->next_read = kept[1];
    return true;
}

int wal_open(struct wal **out, const struct wal_options *o, struct err *e)
{
    if (o->segment_bytes < (1u << 20) || o->segment_bytes > (1u << 30) || (o->segment_bytes & (o->segment_bytes - 1)))
        return err_set(e, ERR_USAGE, "%u bytes are no size of a WAL segment", o->segment_bytes);
    struct wal *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(e, -ENOMEM, "no memory to read WAL");
    w->o = *o;
    w->pages.system_identifier = o->system_identifier;
    w->pages.segment_bytes = o->segment_bytes;
    w->pages.start_lsn = o->start_lsn;
    w->pages.mapped = o->mapped;
    w->pages.mapped_arg = o->mapped_arg;
    int rc = pages_open(&w->pages, e);
    if (rc) {
        wal_close(w);
        return rc;
    }
    *out = w;
    return 0;
}

void wal_close(struct wal *w)
{
    if (!w)
        return;
    pages_close(&w->pages);
    free(w->record);
    free(w);
}
