/* See wal.h. A page is known by its number, its address / 8192. The newest content of the pages from the next record on
 * is kept in a ring, page p in slot p % slots.
 *
 * Writes come in blocks of 4096 bytes, so a page has two halves. The first says which page it is; the second is the block
 * behind it on the volume. (A filesystem can tear a page apart at the end of an extent; WAL segments are made whole, 16 MiB
 * or more, so that extents end between pages.) */
#include "wal.h"

#include <isa-l/crc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "util.h"

#define PAGE 8192u
#define SHORT_HEADER 24u /* SizeOfXLogShortPHD */
#define LONG_HEADER 40u  /* SizeOfXLogLongPHD */
#define RECORD_HEADER 24u
#define RECORD_CRC 20u            /* offset of xl_crc in the header */
#define RECORD_LIMIT (1020u << 20) /* XLogRecordMaxSize */

#define FIRST_IS_CONTRECORD 0x0001u
#define LONG_PAGE 0x0002u
#define FIRST_IS_OVERWRITE 0x0008u
#define PAGE_FLAGS 0x000fu

#define RM_XLOG 0
#define XLOG_SWITCH 0x40

#define STASHED 256u
#define NO_PAGE UINT64_MAX

enum { FIRST_HALF = 1, SECOND_HALF = 2, WHOLE = 3 };

struct slot {
    uint64_t page;  /* NO_PAGE: nothing in it */
    uint64_t place; /* offset of its first half on the volume */
    uint32_t timeline;
    uint16_t volume;
    uint8_t halves;
};

struct second { /* where a second half lies, by hash of its place */
    uint64_t place;
    uint64_t page;
    uint16_t volume;
};

struct stashed { /* a block that may be the second half of a page whose first half comes later */
    uint64_t place;
    uint16_t volume;
    bool used;
    uint8_t data[BLOCK];
};

struct wal {
    struct wal_options o;
    uint64_t slots, seconds;
    uint8_t *content;
    struct slot *slot;
    struct second *second;
    struct stashed *stash;
    uint64_t next;     /* where the next record begins; 0: not known yet */
    uint64_t previous; /* LSN of the record before it; 0: not known */
    uint32_t timeline;
    uint8_t *record;
    size_t record_room;
};

static uint16_t u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static uint32_t u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t aligned(uint64_t n) { return (n + 7) & ~(uint64_t)7; } /* MAXALIGN */

static bool known_magic(uint16_t magic)
{
    switch (magic) {
    case 0xD106: /* 13 */
    case 0xD10D: /* 14 */
    case 0xD110: /* 15 */
    case 0xD113: /* 16 */
    case 0xD116: /* 17 */
    case 0xD118: /* 18 */
        return true;
    default:
        return false;
    }
}

/* ---- pages ---- */

/* Whether a block is the first half of a page of ours. */
static bool is_page(const struct wal *w, const uint8_t *block)
{
    if (!known_magic(u16(block)))
        return false;
    uint16_t info = u16(block + 2);
    uint64_t address = u64(block + 8);
    bool first_of_segment = address % w->o.segment_bytes == 0;
    if ((info & ~PAGE_FLAGS) || address % PAGE || !address || !u32(block + 4) || first_of_segment != !!(info & LONG_PAGE))
        return false;
    return !first_of_segment || (u64(block + 24) == w->o.system_identifier && u32(block + 32) == w->o.segment_bytes &&
                                 u32(block + 36) == PAGE);
}

static struct slot *slot_of(const struct wal *w, uint64_t page) { return &w->slot[page % w->slots]; }

static uint8_t *content_of(const struct wal *w, uint64_t page) { return w->content + page % w->slots * PAGE; }

static uint64_t place_hash(uint16_t volume, uint64_t place)
{
    return ((place / BLOCK) ^ ((uint64_t)volume << 40)) * UINT64_C(0x9E3779B97F4A7C15) >> 20;
}

static struct second *second_at(const struct wal *w, uint16_t volume, uint64_t place)
{
    return &w->second[place_hash(volume, place) % w->seconds];
}

static struct stashed *stash_at(const struct wal *w, uint16_t volume, uint64_t place)
{
    return &w->stash[place_hash(volume, place) % STASHED];
}

static uint32_t header_of(const struct wal *w, uint64_t page)
{
    return page * PAGE % w->o.segment_bytes ? SHORT_HEADER : LONG_HEADER;
}

/* The page if its first half is known and it is of this timeline or a later one. */
static const uint8_t *page_if_known(const struct wal *w, uint64_t page)
{
    const struct slot *s = slot_of(w, page);
    return s->page == page && (s->halves & FIRST_HALF) && s->timeline >= w->timeline ? content_of(w, page) : NULL;
}

/* A page from a later timeline that lies before the next record: history was rewritten from there on. */
static void switch_timeline(struct wal *w, uint64_t page)
{
    for (uint64_t i = 0; i < w->slots; i++)
        w->slot[i].page = NO_PAGE;
    w->next = page * PAGE;
    w->previous = 0;
}

/* First record that begins in a page; 0 when none does. */
static uint64_t first_record(const struct wal *w, uint64_t page, const uint8_t *content)
{
    uint64_t header = header_of(w, page);
    uint64_t rest = u16(content + 2) & FIRST_IS_CONTRECORD ? aligned(u32(content + 16)) : 0;
    return header + rest < PAGE ? page * PAGE + header + rest : 0;
}

static bool take_first_half(struct wal *w, uint16_t volume, uint64_t place, const uint8_t *block)
{
    uint64_t page = u64(block + 8) / PAGE;
    uint32_t timeline = u32(block + 4);
    if (!w->next) {
        uint64_t begin = first_record(w, page, block);
        if (!begin || (page + 1) * PAGE <= w->o.start_lsn)
            return false;
        w->next = begin;
        w->timeline = timeline;
    }
    if (timeline < w->timeline)
        return false;
    if (page < w->next / PAGE) {
        if (timeline == w->timeline)
            return false;
        switch_timeline(w, page);
    }
    if (page >= w->next / PAGE + w->slots)
        return false;
    struct slot *s = slot_of(w, page);
    if (s->page == page && s->timeline > timeline)
        return false;
    if (s->page != page || s->volume != volume || s->place != place || s->timeline != timeline) {
        *s = (struct slot){.page = page, .place = place, .timeline = timeline, .volume = volume};
        *second_at(w, volume, place + BLOCK) = (struct second){.place = place + BLOCK, .page = page, .volume = volume};
    }
    memcpy(content_of(w, page), block, BLOCK);
    s->halves |= FIRST_HALF;
    return true;
}

static void take_second_half(struct wal *w, uint64_t page, const uint8_t *block)
{
    memcpy(content_of(w, page) + BLOCK, block, BLOCK);
    slot_of(w, page)->halves |= SECOND_HALF;
}

/* A block that says nothing of itself: the second half of a page that is known, or of one that comes later. */
static bool take_lone_block(struct wal *w, uint16_t volume, uint64_t place, const uint8_t *block)
{
    const struct second *known = second_at(w, volume, place);
    if (known->place == place && known->volume == volume && place) {
        const struct slot *s = slot_of(w, known->page);
        if (s->page == known->page && s->volume == volume && s->place + BLOCK == place) {
            take_second_half(w, known->page, block);
            return true;
        }
    }
    struct stashed *kept = stash_at(w, volume, place);
    *kept = (struct stashed){.place = place, .volume = volume, .used = true};
    memcpy(kept->data, block, BLOCK);
    return false;
}

static bool take_blocks(struct wal *w, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    bool changed = false;
    for (uint64_t at = 0; at < length; at += BLOCK) {
        if (!is_page(w, data + at)) {
            if (at == 0)
                changed |= take_lone_block(w, volume, offset, data);
            continue;
        }
        if (!take_first_half(w, volume, offset + at, data + at))
            continue;
        changed = true;
        uint64_t page = u64(data + at + 8) / PAGE;
        if (at + BLOCK < length) {
            at += BLOCK;
            take_second_half(w, page, data + at);
        } else {
            struct stashed *kept = stash_at(w, volume, offset + at + BLOCK);
            if (kept->used && kept->place == offset + at + BLOCK && kept->volume == volume && slot_of(w, page)->halves == FIRST_HALF)
                take_second_half(w, page, kept->data);
        }
    }
    return changed;
}

/* ---- records ---- */

enum outcome { DONE, WAIT, OVERWRITTEN };

/* Gathers the `length` bytes of the record at `lsn` into `out`. */
static enum outcome gather(struct wal *w, uint64_t lsn, uint32_t length, uint8_t *out, uint64_t *end)
{
    uint32_t missing = length;
    uint64_t at = lsn;
    for (;;) {
        uint64_t page = at / PAGE;
        const uint8_t *content = page_if_known(w, page);
        if (!content)
            return WAIT;
        uint32_t begin = (uint32_t)(at % PAGE);
        if (begin == 0) {
            if (u16(content + 2) & FIRST_IS_OVERWRITE) { /* a crash cut the record off, and WAL goes on behind it */
                w->next = at;
                return OVERWRITTEN;
            }
            if (!(u16(content + 2) & FIRST_IS_CONTRECORD) || u32(content + 16) != missing)
                return WAIT;
            begin = header_of(w, page);
        }
        uint32_t here = PAGE - begin < missing ? PAGE - begin : missing;
        if (begin + here > BLOCK && !(slot_of(w, page)->halves & SECOND_HALF))
            return WAIT;
        memcpy(out + (length - missing), content + begin, here);
        missing -= here;
        if (!missing) {
            *end = page * PAGE + aligned(begin + here);
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
        uint64_t begin = at % PAGE ? at % PAGE : header_of(w, at / PAGE);
        if (begin + length <= PAGE)
            return at / PAGE * PAGE + aligned(begin + length);
        length -= PAGE - begin;
        at = (at / PAGE + 1) * PAGE;
    }
}

/* A record longer than the ring is passed over unread, once the ring is full of it. */
static enum outcome pass_over(struct wal *w, uint64_t lsn, uint32_t length, struct wal_record *r)
{
    uint64_t last = lsn / PAGE + w->slots - 1;
    for (uint64_t page = lsn / PAGE + 1; page <= last; page++) {
        const uint8_t *content = page_if_known(w, page);
        if (!content || !(u16(content + 2) & FIRST_IS_CONTRECORD) ||
            end_of(w, page * PAGE, u32(content + 16)) != end_of(w, lsn, length))
            return WAIT;
    }
    r->end_lsn = end_of(w, lsn, length);
    r->body = NULL;
    return DONE;
}

/* The record at w->next. */
static enum outcome next_record(struct wal *w, struct wal_record *r)
{
    uint64_t lsn = w->next;
    const uint8_t *page = page_if_known(w, lsn / PAGE);
    if (!page)
        return WAIT;
    if (lsn % PAGE == 0) {
        if (u16(page + 2) & FIRST_IS_CONTRECORD)
            return WAIT;
        lsn += header_of(w, lsn / PAGE);
    }
    uint8_t head[RECORD_HEADER];
    uint64_t end = 0;
    if (lsn % PAGE + 4 > BLOCK && !(slot_of(w, lsn / PAGE)->halves & SECOND_HALF))
        return WAIT;
    uint32_t length = u32(page + lsn % PAGE);
    if (length < RECORD_HEADER || length > RECORD_LIMIT)
        return WAIT;
    if (length / PAGE + 3 > w->slots) {
        *r = (struct wal_record){.lsn = lsn, .length = length};
        return pass_over(w, lsn, length, r);
    }
    const uint8_t *record;
    uint32_t begin = (uint32_t)(lsn % PAGE);
    if (begin + length <= PAGE && (begin + length <= BLOCK || (slot_of(w, lsn / PAGE)->halves & SECOND_HALF))) {
        record = page + begin;
        end = lsn / PAGE * PAGE + aligned(begin + length);
    } else {
        if (!make_room(w, length))
            return WAIT;
        enum outcome got = gather(w, lsn, length, w->record, &end);
        if (got != DONE)
            return got;
        record = w->record;
    }
    if (w->previous && u64(record + 8) != w->previous)
        return WAIT;
    memcpy(head, record, RECORD_HEADER);
    uint32_t crc = crc32_iscsi((uint8_t *)record + RECORD_HEADER, (int)(length - RECORD_HEADER), UINT32_MAX);
    crc = ~crc32_iscsi(head, RECORD_CRC, crc);
    if (crc != u32(head + RECORD_CRC))
        return WAIT;
    *r = (struct wal_record){
        .lsn = lsn, .end_lsn = end, .prev_lsn = u64(head + 8), .xid = u32(head + 4), .length = length,
        .magic = u16(page), .rmid = head[17], .info = head[16], .body = record + RECORD_HEADER,
        .timeline = u32(page + 4),
    };
    return DONE;
}

static int advance(struct wal *w, uint64_t write)
{
    for (;;) {
        struct wal_record r;
        enum outcome got = next_record(w, &r);
        if (got == WAIT)
            return 0;
        if (got == OVERWRITTEN)
            continue;
        r.write = write;
        w->previous = r.lsn;
        w->next = r.end_lsn;
        if (r.rmid == RM_XLOG && (r.info & 0xf0) == XLOG_SWITCH && r.body && w->next % w->o.segment_bytes)
            w->next += w->o.segment_bytes - w->next % w->o.segment_bytes;
        if (r.timeline > w->timeline)
            w->timeline = r.timeline;
        if (r.lsn >= w->o.start_lsn) {
            int rc = w->o.found(w->o.arg, &r);
            if (rc)
                return rc;
        }
    }
}

int wal_take(struct wal *w, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    return take_blocks(w, volume, offset, data, length) ? advance(w, write) : 0;
}

uint64_t wal_next_lsn(const struct wal *w) { return w->next; }

/* ---- life ---- */

int wal_open(struct wal **out, const struct wal_options *o, struct err *e)
{
    if (o->segment_bytes < (1u << 20) || o->segment_bytes > (1u << 30) || (o->segment_bytes & (o->segment_bytes - 1)))
        return err_set(e, ERR_USAGE, "%u bytes are no size of a WAL segment", o->segment_bytes);
    struct wal *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(e, -ENOMEM, "no memory to read WAL");
    w->o = *o;
    w->slots = 2 * (uint64_t)o->segment_bytes / PAGE;
    w->seconds = 2 * w->slots;
    w->slot = calloc(w->slots, sizeof *w->slot);
    w->second = calloc(w->seconds, sizeof *w->second);
    w->stash = calloc(STASHED, sizeof *w->stash);
    w->content = mmap(NULL, w->slots * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->content == MAP_FAILED)
        w->content = NULL;
    if (!w->slot || !w->second || !w->stash || !w->content) {
        uint64_t bytes = w->slots * PAGE;
        wal_close(w);
        return err_set(e, -ENOMEM, "no memory for %llu bytes of WAL pages", (unsigned long long)bytes);
    }
    for (uint64_t i = 0; i < w->slots; i++)
        w->slot[i].page = NO_PAGE;
    *out = w;
    return 0;
}

void wal_close(struct wal *w)
{
    if (!w)
        return;
    if (w->content)
        munmap(w->content, w->slots * PAGE);
    free(w->slot);
    free(w->second);
    free(w->stash);
    free(w->record);
    free(w);
}
