/* See wal_pages.h. */
#include "wal_pages.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "util.h"

#define LONG_PAGE 0x0002u
#define PAGE_FLAGS 0x000fu

#define NO_PAGE UINT64_MAX

/* GUESSED: the second half came alone. It lies behind the first, or the records that end in it are right with it so far. */
enum { FIRST_HALF = 1, SECOND_HALF = 2, WHOLE = 3, GUESSED = 4 };

struct pages_second { /* where a second half lies, by hash of its place */
    uint64_t place;
    uint64_t page;
    uint16_t volume;
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
    s->write = p->write;
    memcpy(content_of(p, page), block, BLOCK);
    note_half(p, s, FIRST_HALF);
    return true;
}

static void take_second_half(struct pages *p, uint64_t page, const uint8_t *block, bool guessed)
{
    struct pages_slot *s = slot_of(p, page);
    memcpy(content_of(p, page) + BLOCK, block, BLOCK);
    note_half(p, s, SECOND_HALF);
    s->halves = guessed ? WHOLE | GUESSED : WHOLE;
}

/* Which of the blocks that came lately are not to be forgotten: those about the first half of a page that is torn. */
static struct stash_span kept_blocks(const struct pages *p)
{
    uint64_t page = p->next ? pages_torn(p, p->next / PAGE) : 0;
    if (!page)
        return (struct stash_span){0};
    uint64_t write = slot_of(p, page)->write;
    if (!write) /* an earlier run read it, and handed on what it kept */
        return (struct stash_span){.from = 0, .to = p->restored + STASH_WRITES};
    return (struct stash_span){.from = write > STASH_WRITES ? write - STASH_WRITES : 0, .to = write + STASH_WRITES};
}

/* A block that says nothing of itself: the second half of a page that is known, or of one that comes later. What lies behind
 * a first half may be another file's, and the place of a page that was read already may be one by now. Whether a page has
 * changed; p->fresh is the block otherwise. */
static bool take_lone_block(struct pages *p, uint16_t volume, uint64_t place, const uint8_t *block)
{
    const struct pages_second *known = second_at(p, volume, place);
    struct pages_slot *s = slot_of(p, known->page);
    bool is_known = place && known->place == place && known->volume == volume && known->page >= p->next / PAGE &&
                    s->page == known->page && s->volume == volume && s->second == place;
    bool guessed = is_known && (s->halves & (SECOND_HALF | GUESSED)) != SECOND_HALF;
    if (is_known)
        take_second_half(p, known->page, block, guessed);
    if (!is_known || guessed)
        p->fresh = stash_put(&p->stash, volume, place, p->write, block, kept_blocks(p));
    return is_known;
}

uint64_t pages_torn(const struct pages *p, uint64_t from)
{
    for (uint64_t page = p->next / PAGE; page < p->next / PAGE + p->slots; page++) {
        const struct pages_slot *s = slot_of(p, page);
        if (s->page != page || !(s->halves & FIRST_HALF))
            return 0;
        if (s->halves != WHOLE && page >= from)
            return page;
        if (s->halves == FIRST_HALF) /* what is behind it cannot be read before */
            return 0;
    }
    return 0;
}

bool pages_try(struct pages *p, uint64_t page, uint32_t candidate)
{
    struct pages_slot *s = slot_of(p, page);
    const struct stash *stash = &p->stash;
    if ((p->fresh != STASHED && candidate != p->fresh) || s->page != page || s->halves == WHOLE || !stash->write[candidate] ||
        stash->volume[candidate] != s->volume)
        return false;
    p->before = *s;
    p->before_again = p->again;
    memcpy(p->before_content, content_of(p, page) + BLOCK, BLOCK);
    s->halves = FIRST_HALF;
    s->second = stash->place[candidate];
    take_second_half(p, page, stash->data[candidate], true);
    *second_at(p, s->volume, s->second) = (struct pages_second){.place = s->second, .page = page, .volume = s->volume};
    return true;
}

void pages_reject(struct pages *p, uint64_t page)
{
    *slot_of(p, page) = p->before;
    p->again = p->before_again;
    memcpy(content_of(p, page) + BLOCK, p->before_content, BLOCK);
}

void pages_prove(struct pages *p, uint64_t lsn, uint64_t end_lsn)
{
    for (uint64_t page = lsn / PAGE; page <= (end_lsn - 1) / PAGE; page++) {
        struct pages_slot *s = slot_of(p, page);
        if (s->page == page && s->halves == (WHOLE | GUESSED) && end_lsn >= (page + 1) * PAGE)
            s->halves = WHOLE;
    }
    p->fresh = STASHED; /* what comes next was not looked for */
}

/* Takes the block behind the first half of a page in the same write, unless that page's second half lies elsewhere. */
static bool take_next_block(struct pages *p, uint64_t page, uint64_t place, const uint8_t *block)
{
    if ((slot_of(p, page)->halves & SECOND_HALF) && slot_of(p, page)->second != place)
        return false;
    slot_of(p, page)->second = place;
    take_second_half(p, page, block, false);
    return true;
}

bool pages_take(struct pages *p, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length)
{
    bool changed = false, lone = true; /* whether a block may be a second half of its own: the first, and those behind WAL */
    p->write = write;
    p->write_volume = volume;
    p->write_offset = offset;
    p->write_length = length;
    p->again = false;
    p->fresh = STASHED;
    for (uint64_t at = 0; at < length; at += BLOCK) {
        if (!is_page(p, data + at)) {
            if (lone)
                changed |= take_lone_block(p, volume, offset + at, data + at);
            lone = lone && at;
            continue;
        }
        lone = take_first_half(p, volume, offset + at, data + at);
        if (!lone)
            continue;
        changed = true;
        uint64_t page = page_u64(data + at + 8) / PAGE;
        uint64_t place = offset + at + BLOCK;
        if (at + BLOCK < length) {
            if (take_next_block(p, page, place, data + at + BLOCK))
                at += BLOCK;
        } else if (slot_of(p, page)->halves == FIRST_HALF) {
            uint32_t kept = stash_find(&p->stash, volume, place);
            if (kept != STASHED)
                take_second_half(p, page, p->stash.data[kept], true);
        }
    }
    if (changed)
        p->fresh = STASHED;
    return changed || (p->fresh != STASHED && p->next && pages_torn(p, p->next / PAGE));
}

/* ---- between runs ---- */

struct saved_page { /* FORMAT.md 4.2 */
    uint64_t page, place, second;
    uint32_t timeline;
    uint16_t volume;
    uint8_t halves, reserved;
};

struct saved_head {
    uint64_t next, write;
    uint32_t timeline, jumped, pages, halves;
};

void pages_save(const struct pages *p, FILE *out)
{
    struct saved_head head = {.next = p->next, .write = p->write, .timeline = p->timeline, .jumped = p->jumped};
    uint64_t first = p->next / PAGE;
    for (uint64_t page = first; page < first + p->slots; page++)
        head.pages += slot_of(p, page)->page == page;
    struct stash_span kept = kept_blocks(p);
    head.halves = stash_save_count(&p->stash, p->write, kept);
    fwrite(&head, sizeof head, 1, out);
    for (uint64_t page = first; page < first + p->slots; page++) {
        const struct pages_slot *s = slot_of(p, page);
        if (s->page != page)
            continue;
        struct saved_page saved = {s->page, s->place, s->second, s->timeline, s->volume, s->halves, 0};
        fwrite(&saved, sizeof saved, 1, out);
        fwrite(content_of(p, page), PAGE, 1, out);
    }
    stash_save(&p->stash, p->write, kept, out);
}

bool pages_restore(struct pages *p, struct cursor *in)
{
    struct saved_head head;
    if (!cursor_copy(in, &head, sizeof head))
        return false;
    p->next = head.next;
    p->write = p->restored = head.write;
    p->timeline = head.timeline;
    p->jumped = head.jumped;
    for (uint32_t i = 0; i < head.pages; i++) {
        struct saved_page s;
        if (!cursor_copy(in, &s, sizeof s) || s.page < p->next / PAGE || s.page >= p->next / PAGE + p->slots ||
            !cursor_copy(in, content_of(p, s.page), PAGE))
            return false;
        *slot_of(p, s.page) = (struct pages_slot){
            .page = s.page, .place = s.place, .second = s.second, .timeline = s.timeline, .volume = s.volume,
            .halves = (s.halves & WHOLE) == WHOLE ? s.halves & (WHOLE | GUESSED) : s.halves & WHOLE,
        };
        *second_at(p, s.volume, s.second) =
            (struct pages_second){.place = s.second, .page = s.page, .volume = s.volume};
    }
    return stash_restore(&p->stash, head.halves, in);
}

/* ---- life ---- */

int pages_open(struct pages *p, struct err *e)
{
    p->slots = 2 * (uint64_t)p->segment_bytes / PAGE;
    p->seconds = 2 * p->slots;
    p->slot = calloc(p->slots, sizeof *p->slot);
    p->second = calloc(p->seconds, sizeof *p->second);
    p->content = mmap(NULL, p->slots * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p->content == MAP_FAILED)
        p->content = NULL;
    if (!p->slot || !p->second || !stash_open(&p->stash) || !p->content)
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
    stash_close(&p->stash);
}
