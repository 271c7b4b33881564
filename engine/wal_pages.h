/* WAL pages as they are now, gathered from captured writes: those from the next record on, in a ring.
 *
 * A page is known by its number, its address / 8192; page p lies in slot p % slots. Writes come in blocks of 4096 bytes, so
 * a page has two halves. The first says which page it is; the second is the block behind it on the volume, unless the
 * filesystem tore the page apart at the end of an extent (with wal_init_zero = off the last page of every segment is). Then
 * it is the block with which the next record's CRC is right: `pages_try` offers those that came lately, one by one. So a
 * block that came in another write than the first half before it is only a guess, and so is one with whose first bytes a
 * record's CRC is right (they may be zeros), until a record reaches its end. */
#ifndef PGCDP_WAL_PAGES_H
#define PGCDP_WAL_PAGES_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "cursor.h"
#include "err.h"
#include "wal_stash.h"

#define PAGE 8192u
#define SHORT_HEADER 24u /* SizeOfXLogShortPHD */
#define LONG_HEADER 40u  /* SizeOfXLogLongPHD */

#define FIRST_IS_CONTRECORD 0x0001u
#define FIRST_IS_OVERWRITE 0x0008u

#define NOT_IN_WRITE UINT32_MAX

struct pages_slot {
    uint64_t page;  /* NO_PAGE: nothing in it */
    uint64_t place;  /* offset of its first half on the volume */
    uint64_t second; /* ... of its second half, as far as is known */
    uint32_t timeline;
    uint16_t volume;
    uint8_t halves;
    uint64_t write; /* with its first half; 0: in an earlier run */
    uint64_t unmapped[2]; /* the write that filled a half first, until the filesystem is known to find it there; else 0 */
};

struct pages_second;

/* Whether the filesystem finds the bytes of a WAL segment from `at` on at `place` of a volume, durably. */
typedef bool pages_mapped(void *arg, uint16_t volume, uint64_t at, uint64_t place);

struct pages {
    uint64_t system_identifier;
    uint32_t segment_bytes;
    uint64_t start_lsn;
    uint64_t slots, seconds;
    uint8_t *content;
    struct pages_slot *slot;
    struct pages_second *second;
    struct stash stash;
    uint32_t fresh;    /* the only block in it that was not tried yet; STASHED: all are to be tried */
    uint64_t restored; /* the last write of an earlier run */
    struct pages_slot before; /* what was tried last took the place of this */
    uint8_t before_content[4096];
    bool before_again;
    uint64_t next; /* where the next record begins; 0: not known yet */
    uint32_t timeline;
    bool jumped;   /* `next` was set anew by a page: what was before it does not link to it */
    uint64_t write, write_offset, write_length; /* the one taken last */
    uint16_t write_volume;
    bool again; /* whether it held halves of pages that had been written before */
    uint64_t mapped_upto; /* what was written up to this write is found by the filesystem, whatever `unmapped` says */
    uint64_t unmapped_to; /* no page from here on has an `unmapped` half */
    pages_mapped *mapped; /* may be NULL */
    void *mapped_arg;
};

int pages_open(struct pages *p, struct err *e);
void pages_close(struct pages *p);

/* A captured write; whether a page from the next record on has changed. */
bool pages_take(struct pages *p, uint64_t write, uint16_t volume, uint64_t offset, const uint8_t *data, uint64_t length);

/* Length of a page's header. */
uint32_t pages_header(const struct pages *p, uint64_t page);

/* The page if its first half is known and it is of this timeline or a later one, else NULL. */
const uint8_t *pages_get(const struct pages *p, uint64_t page);

/* Whether the bytes of a known page up to `end` are there. */
bool pages_reach(const struct pages *p, uint64_t page, uint32_t end);

/* Whether any of the bytes from `lsn` to `end_lsn` lie in a half that the filesystem may not find yet. */
bool pages_unmapped(const struct pages *p, uint64_t lsn, uint64_t end_lsn);

/* Asks `mapped` again for all such halves from `lsn` on. */
void pages_map(struct pages *p, uint64_t lsn, pages_mapped *mapped, void *arg);

/* The first page from page `from` on that lacks its second half, or whose second half is a guess, if what is before it from
 * the next record on is there; 0: none. */
uint64_t pages_torn(const struct pages *p, uint64_t from);

/* Takes the block number `candidate` (below STASHED) of those that came lately for the second half of such a page; false:
 * there is no such block, or it was tried. `pages_reject` puts back what was there. */
bool pages_try(struct pages *p, uint64_t page, uint32_t candidate);
void pages_reject(struct pages *p, uint64_t page);

/* A record's CRC is right: a page that it reaches the end of is no guess. */
void pages_prove(struct pages *p, uint64_t lsn, uint64_t end_lsn);

/* Where `lsn` lies in the write taken last, in bytes from its beginning, or NOT_IN_WRITE. `end`: lsn is the first byte
 * behind something, which may be the end of a page. */
uint32_t pages_place(const struct pages *p, uint64_t lsn, bool end);

/* Pages from the next record on, and blocks that may still become second halves. */
void pages_save(const struct pages *p, FILE *out);
bool pages_restore(struct pages *p, struct cursor *in);

static inline uint16_t page_u16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

static inline uint32_t page_u32(const uint8_t *at)
{
    uint32_t v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline uint64_t page_u64(const uint8_t *at)
{
    uint64_t v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline uint64_t maxalign(uint64_t n) { return (n + 7) & ~(uint64_t)7; }

#endif
