/* See wal_pages.h. */
#include "wal_pages.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "util.h"

#define LONG_PAGE 0x0002u
#define PAGE_FLAGS 0x000fu

#define STASHED PAGES_CANDIDATES
#define STASH_WRITES 64u /* a second half comes within so many writes of its first */
#define NO_PAGE UINT64_MAX

enum { FIRST_HALF = 1, SECOND_HALF = 2, WHOLE = 3 };

struct pages_second { /* where a second half lies, by hash of its place */
    uint64_t place;
    uint64_t page;
    uint16_t volume;
};

struct pages_stashed { /* a block that may be the second half of a page whose first half comes later */
    uint64_t place;
    uint64_t write; /* 0: nothing in it */
    uint16_t volume;
    uint8_t data[BLOCK];
};

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

/* Whether a block is the first half of a page of ours. */
static bool is_page(const struct pages *p, const uint8_t *block)
{
    if (!known_magic(page_u16(block)))
        return false;
    uint16_t info = page_u16(block + 2);
    uint64_t address = page_u64(block + 8);
    bool first_of_segment = address % p->segment_bytes == 0;
    if ((info & ~PAGE_FLAGS) || address % PAGE || !address || !page_u32(block + 4) || first_of_segment != !!(info & LONG_PAGE))
        return false;
    return !first_of_segment || (page_u64(block + 24) == p->system_identifier && page_u32(block + 32) == p->segment_bytes &&
                                 page_u32(block + 36) == PAGE);
}

static struct pages_slot *slot_of(const struct pages *p, uint64_t page) { return &p->slot[page % p->slots]; }

static uint8_t *content_of(const struct pages *p, uint64_t page) { return p->content + page % p->slots * PAGE; }

static uint64_t place_hash(uint16_t volume, uint64_t place)
{
    return ((place / BLOCK) ^ ((uint64_t)volume << 40)) * UINT64_C(0x9E3779B97F4A7C15) >> 20;
}

static struct pages_second *second_at(const struct pages *p, uint16_t volume, uint64_t place)
{
    return &p->second[place_hash(volume, place) % p->seconds];
}

static struct pages_stashed *stash_at(const struct pages *p, uint16_t volume, uint64_t place)
{
    return &p->stash[place_hash(volume, place) % STASHED];
}

uint32_t pages_header(const struct pages *p, uint64_t page)
{
    return page * PAGE % p->segment_bytes ? SHORT_HEADER : LONG_HEADER;
}

const uint8_t *pages_get(const struct pages *p, uint64_t page)
{
    const struct pages_slot *s = slot_of(p, page);
    return s->page == page && (s->halves & FIRST_HALF) && s->timeline >= p->timeline ? content_of(p, page) : NULL;
}

bool pages_reach(const struct pages *p, uint64_t page, uint32_t end)
{
    return end <= BLOCK || (slot_of(p, page)->halves & SECOND_HALF);
}

uint32_t pages_place(const struct pages *p, uint64_t lsn, bool end)
{
    uint64_t page = (end ? lsn - 1 : lsn) / PAGE;
    const struct pages_slot *s = slot_of(p, page);
    if (s->page != page || s->volume != p->write_volume)
        return NOT_IN_WRITE;
    uint64_t at = lsn - page * PAGE;
    uint64_t place = at < BLOCK || (end && at == BLOCK) ? s->place + at : s->second + (at - BLOCK);
    if (place < p->write_offset || place > p->write_offset + p->write_length)
        return NOT_IN_WRITE;
    return (uint32_t)(place - p->write_offset);
}

/* ---- taking writes ---- */

static void forget_pages(struct pages *p)
{
    for (uint64_t i = 0; i < p->slots; i++)
        p->slot[i].page = NO_PAGE;
}

/* First record that begins in a page; 0 when none does. */
static uint64_t first_record(const struct pages *p, uint64_t page, const uint8_t *content)
{
    uint64_t header = pages_header(p, page);
    uint64_t rest = page_u16(content + 2) & FIRST_IS_CONTRECORD ? maxalign(page_u32(content + 16)) : 0;
    return header + rest < PAGE ? page * PAGE + header + rest : 0;
}

/* Where reading begins: at the first record of the first page, not far behind where it shall begin. */
static bool begin_with(struct pages *p, uint64_t page, uint32_t timeline, const uint8_t *block)
{
    uint64_t begin = first_record(p, page, block);
    if (!begin || (page + 1) * PAGE <= p->start_lsn || (p->start_lsn && page >= p->start_lsn / PAGE + p->slots))
        return false;
    p->next = begin;
    p->timeline = timeline;
    p->jumped = true;
    return true;
}

/* Whether a page has a place in the ring, which may move for it. A page of a later timeline before the next record says
 * that history was rewritten from there on. The first page of a segment behind the ring bears the system identifier: what
 * is missing up to there will not come any more. */
static bool within_ring(struct pages *p, uint64_t page, uint32_t timeline)
{
    if (timeline < p->timeline)
        return false;
    bool behind = page >= p->next / PAGE + p->slots;
    if (behind && page * PAGE % p->segment_bytes)
        return false;
    if (page < p->next / PAGE && timeline == p->timeline)
        return false;
    if (behind || page < p->next / PAGE) {
        forget_pages(p);
        p->next = page * PAGE;
        p->jumped = true;
    }
    return true;
}

static bool is_mapped(const struct pages *p, const struct pages_slot *s, uint32_t which, pages_mapped *mapped, void *arg)
{
    return mapped && mapped(arg, s->volume, s->page * PAGE % p->segment_bytes + which * BLOCK, which ? s->second : s->place);
}

static void note_half(struct pages *p, struct pages_slot *s, uint8_t half)
{
    uint32_t which = half == SECOND_HALF;
    if (s->halves & half) {
        p->again = true;
    } else if (!is_mapped(p, s, which, p->mapped, p->mapped_arg)) {
        s->unmapped[which] = p->write;
        p->unmapped_to = max_u64(p->unmapped_to, s->page + 1);
    }
    s->halves |= half;
}

bool pages_unmapped(const struct pages *p, uint64_t lsn, uint64_t end_lsn)
{
    uint64_t reach = p->slots * PAGE;
    uint64_t from = end_lsn > reach ? max_u64(lsn, end_lsn - reach) : lsn;
    for (uint64_t block = from / BLOCK; block <= (end_lsn - 1) / BLOCK; block++) {
        const struct pages_slot *s = slot_of(p, block * BLOCK / PAGE);
        if (s->page == block * BLOCK / PAGE && s->unmapped[block % 2] > p->mapped_upto)
            return true;
    }
    return false;
}

void pages_map(struct pages *p, uint64_t lsn, pages_mapped *mapped, void *arg)
{
    uint64_t end = min_u64(p->unmapped_to, lsn / PAGE + p->slots);
    for (uint64_t page = lsn / PAGE; page < end; page++) {
        struct pages_slot *s = slot_of(p, page);
        for (uint32_t which = 0; which < 2 && s->page == page; which++)
            if (s->unmapped[which] > p->mapped_upto && is_mapped(p, s, which, mapped, arg))
                s->unmapped[which] = 0;
    }
}

static bool take_first_half(struct pages *p, uint16_t volume, uint64_t place, const uint8_t *block)
{
    uint64_t page = page_u64(block + 8) / PAGE;
    uint32_t timeline = page_u32(block + 4);
    if (p->next ? !within_ring(p, page, timeline) : !begin_with(p, page, timeline, block))
        return false;
    struct pages_slot *s = slot_of(p, page);
    if (s->page == page && s->timeline > timeline)
        return false;
    if (s->page != page || s->volume != volume || s->place != place || s->timeline != timeline) {
        *s = (struct pages_slot){
            .page = page, .place = place, .second = place + BLOCK, .timeline = timeline, .volume = volume,
        };
        *second_at(p, volume, place + BLOCK) = (struct pages_second){.place = place + BLOCK, .page = page, .volume = volume};
    }
    memcpy(content_of(p, page), block, BLOCK);
    note_half(p, s, FIRST_HALF);
    return true;
}

static void take_second_half(struct pages *p, uint64_t page, const uint8_t *block)
{
    memcpy(content_of(p, page) + BLOCK, block, BLOCK);
    note_half(p, slot_of(p, page), SECOND_HALF);
}

/* A block that says nothing of itself: the second half of a page that is known, or of one that comes later. */
static bool take_lone_block(struct pages *p, uint16_t volume, uint64_t place, const uint8_t *block)
{
    const struct pages_second *known = second_at(p, volume, place);
    if (known->place == place && known->volume == volume && place) {
        const struct pages_slot *s = slot_of(p, known->page);
        if (s->page == known->page && s->volume == volume && s->second == place) {
            take_second_half(p, known->page, block);
            return true;
        }
    }
    struct pages_stashed *kept = stash_at(p, volume, place);
    *kept = (struct pages_stashed){.place = place, .volume = volume, .write = p->write};
    memcpy(kept->data, block, BLOCK);
    return p->next && pages_torn(p);
}

uint64_t pages_torn(const struct pages *p)
{
    for (uint64_t page = p->next / PAGE; page < p->next / PAGE + p->slots; page++) {
        const struct pages_slot *s = slot_of(p, page);
        if (s->page != page || !(s->halves & FIRST_HALF))
            return 0;
        if (s->halves == FIRST_HALF)
            return page;
    }
    return 0;
}

bool pages_try(struct pages *p, uint64_t page, uint32_t candidate)
{
    struct pages_slot *s = slot_of(p, page);
    const struct pages_stashed *kept = &p->stash[candidate];
    if (s->page != page || s->halves != FIRST_HALF || !kept->write || kept->volume != s->volume ||
        kept->write + STASH_WRITES < p->write)
        return false;
    s->second = kept->place;
    take_second_half(p, page, kept->data);
    *second_at(p, s->volume, s->second) = (struct pages_second){.place = s->second, .page = page, .volume = s->volume};
    return true;
}

void pages_reject(struct pages *p, uint64_t page)
{
    struct pages_slot *s = slot_of(p, page);
    s->halves = FIRST_HALF;
    s->unmapped[1] = 0;
    s->second = s->place + BLOCK;
}

bool pages_take(struct pages *p, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    bool changed = false;
    p->write = write;
    p->write_volume = volume;
    p->write_offset = offset;
    p->write_length = length;
    p->again = false;
    for (uint64_t at = 0; at < length; at += BLOCK) {
        if (!is_page(p, data + at)) {
            if (at == 0)
                changed |= take_lone_block(p, volume, offset, data);
            continue;
        }
        if (!take_first_half(p, volume, offset + at, data + at))
            continue;
        changed = true;
        uint64_t page = page_u64(data + at + 8) / PAGE;
        if (at + BLOCK < length) {
            at += BLOCK;
            take_second_half(p, page, data + at);
        } else {
            struct pages_stashed *kept = stash_at(p, volume, offset + at + BLOCK);
            if (kept->write && kept->place == offset + at + BLOCK && kept->volume == volume &&
                slot_of(p, page)->halves == FIRST_HALF)
                take_second_half(p, page, kept->data);
        }
    }
    return changed;
}

/* ---- between runs ---- */

struct saved_page { /* FORMAT.md 4.2 */
    uint64_t page, place, second;
    uint32_t timeline;
    uint16_t volume;
    uint8_t halves, reserved;
};

struct saved_half {
    uint64_t place, write;
    uint16_t volume, reserved[3];
};

struct saved_head {
    uint64_t next, write;
    uint32_t timeline, jumped, pages, halves;
};

static bool worth_keeping(const struct pages *p, const struct pages_stashed *s)
{
    return s->write && s->write + STASH_WRITES > p->write;
}

void pages_save(const struct pages *p, FILE *out)
{
    struct saved_head head = {.next = p->next, .write = p->write, .timeline = p->timeline, .jumped = p->jumped};
    uint64_t first = p->next / PAGE;
    for (uint64_t page = first; page < first + p->slots; page++)
        head.pages += slot_of(p, page)->page == page;
    for (uint32_t i = 0; i < STASHED; i++)
        head.halves += worth_keeping(p, &p->stash[i]);
    fwrite(&head, sizeof head, 1, out);
    for (uint64_t page = first; page < first + p->slots; page++) {
        const struct pages_slot *s = slot_of(p, page);
        if (s->page != page)
            continue;
        struct saved_page saved = {s->page, s->place, s->second, s->timeline, s->volume, s->halves, 0};
        fwrite(&saved, sizeof saved, 1, out);
        fwrite(content_of(p, page), PAGE, 1, out);
    }
    for (uint32_t i = 0; i < STASHED; i++) {
        const struct pages_stashed *s = &p->stash[i];
        if (!worth_keeping(p, s))
            continue;
        struct saved_half saved = {.place = s->place, .write = s->write, .volume = s->volume};
        fwrite(&saved, sizeof saved, 1, out);
        fwrite(s->data, BLOCK, 1, out);
    }
}

bool pages_restore(struct pages *p, struct cursor *in)
{
    struct saved_head head;
    if (!cursor_copy(in, &head, sizeof head))
        return false;
    p->next = head.next;
    p->write = head.write;
    p->timeline = head.timeline;
    p->jumped = head.jumped;
    for (uint32_t i = 0; i < head.pages; i++) {
        struct saved_page s;
        if (!cursor_copy(in, &s, sizeof s) || s.page < p->next / PAGE || s.page >= p->next / PAGE + p->slots ||
            !cursor_copy(in, content_of(p, s.page), PAGE))
            return false;
        *slot_of(p, s.page) = (struct pages_slot){
            .page = s.page, .place = s.place, .second = s.second, .timeline = s.timeline, .volume = s.volume,
            .halves = s.halves & WHOLE,
        };
        *second_at(p, s.volume, s.second) =
            (struct pages_second){.place = s.second, .page = s.page, .volume = s.volume};
    }
    for (uint32_t i = 0; i < head.halves; i++) {
        struct saved_half s;
        if (!cursor_copy(in, &s, sizeof s))
            return false;
        struct pages_stashed *kept = stash_at(p, s.volume, s.place);
        *kept = (struct pages_stashed){.place = s.place, .volume = s.volume, .write = s.write};
        if (!cursor_copy(in, kept->data, BLOCK))
            return false;
    }
    return true;
}

/* ---- life ---- */

int pages_open(struct pages *p, struct err *e)
{
    p->slots = 2 * (uint64_t)p->segment_bytes / PAGE;
    p->seconds = 2 * p->slots;
    p->slot = calloc(p->slots, sizeof *p->slot);
    p->second = calloc(p->seconds, sizeof *p->second);
    p->stash = calloc(STASHED, sizeof *p->stash);
    p->content = mmap(NULL, p->slots * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p->content == MAP_FAILED)
        p->content = NULL;
    if (!p->slot || !p->second || !p->stash || !p->content)
        return err_set(e, -ENOMEM, "no memory for %llu bytes of WAL pages", (unsigned long long)(p->slots * PAGE));
    forget_pages(p);
    return 0;
}

void pages_close(struct pages *p)
{
    if (p->content)
        munmap(p->content, p->slots * PAGE);
    free(p->slot);
    free(p->second);
    free(p->stash);
}
