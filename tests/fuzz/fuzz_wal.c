/* libFuzzer target: captured writes of any content never crash the WAL reader, and never make it contradict itself.
 *
 * The input is a sequence of writes: one byte of flags for all, then for each write u8 volume, u8 place in pages, u8 length
 * in blocks (both small, so that pages meet), and its blocks; what is missing at the end is zeros. Flag 1: CRCs are not
 * looked at, so that what lies behind them is reached. Flag 2: halfway, the state is saved and read again.
 * Flag 4: at the end, a state with some bytes changed is read. With FUZZ_WAL_TELL in the environment it tells how many
 * transactions ended. */
#include <sanitizer/allocator_interface.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../engine/cursor.h"
#include "../../engine/wal.h"
#include "../../engine/wal_notes.h"
#include "../../engine/wal_record.h"
#include "../../engine/wal_xacts.h"

#define BLOCK 4096u
#define MAX_BLOCKS 8u
#define SYSTEM_IDENTIFIER UINT64_C(0x1122334455667788)
#define MAX_IN_USE (256u << 20) /* with libFuzzer's own corpus, some 30 MB */

extern bool wal_fuzz_ignore_crc;

struct seen {
    struct xacts *xacts;
    struct notes notes;
    uint64_t lsn, end_lsn, write;
    uint32_t timeline, ends;
};

static void check(bool holds)
{
    if (!holds)
        abort();
}

static int ended(void *arg, const struct xact_end *end)
{
    struct seen *s = arg;
    s->ends++;
    check(end->record->lsn == s->lsn);
    uint64_t sum = 0; /* every byte that is handed over may be read */
    for (uint32_t i = 0; i < end->subxids; i++)
        sum += end->subxid[i];
    for (uint32_t i = 0; i < end->changes; i++)
        sum += end->change[i].inserted + end->change[i].relation.file;
    return sum == UINT64_MAX ? -1 : 0;
}

static int found(void *arg, const struct wal_record *r)
{
    struct seen *s = arg;
    check(r->end_lsn > r->lsn && r->length >= 24);
    check(r->timeline > s->timeline || r->lsn >= s->end_lsn);
    check(r->write >= s->write);
    s->lsn = r->lsn;
    s->end_lsn = r->end_lsn;
    s->write = r->write;
    s->timeline = r->timeline;
    struct wal_parts parts;
    if (!wal_parse(r, &parts))
        return 0;
    check(parts.blocks <= WAL_MAX_BLOCKS && parts.main >= r->body);
    check(parts.main + parts.main_length <= r->body + (r->length - 24));
    notes_wants(&s->notes, r, &parts);
    return xacts_take(s->xacts, r, &parts);
}

static int lost(void *arg, uint64_t from, uint64_t to, uint64_t write)
{
    struct seen *s = arg;
    (void)from;
    s->end_lsn = to; /* reading begins anew there, also before, on a later timeline */
    s->write = write;
    return 0;
}

static struct wal *new_reader(struct seen *s)
{
    struct wal_options options = {
        .system_identifier = SYSTEM_IDENTIFIER, .segment_bytes = 1u << 20, .found = found, .lost = lost, .arg = s,
    };
    struct wal *wal;
    struct err e;
    check(wal_open(&wal, &options, &e) == 0);
    check(xacts_open(&s->xacts, ended, s) == 0);
    return wal;
}

/* What is saved can be read, and says the same when it is saved again. */
static struct wal *take_over(struct wal *old, struct seen *s)
{
    char *first = NULL, *second = NULL;
    size_t length = 0, again = 0;
    FILE *out = open_memstream(&first, &length);
    wal_save(old, out);
    xacts_save(s->xacts, out);
    notes_save(&s->notes, out);
    fclose(out);
    wal_close(old);
    xacts_close(s->xacts);
    struct wal *wal = new_reader(s);
    struct cursor in = {.at = (uint8_t *)first, .end = (uint8_t *)first + length};
    check(wal_restore(wal, &in) && xacts_restore(s->xacts, &in) && notes_restore(&s->notes, &in) && in.at == in.end);
    out = open_memstream(&second, &again);
    wal_save(wal, out);
    fclose(out);
    check(again <= length && memcmp(first, second, again) == 0);
    free(first);
    free(second);
    return wal;
}

/* A damaged state is refused or taken, never followed out of its bounds. */
static void try_damaged_state(struct wal *wal, struct seen *s, const uint8_t *where, size_t flips)
{
    char *state = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&state, &length);
    wal_save(wal, out);
    xacts_save(s->xacts, out);
    notes_save(&s->notes, out);
    fclose(out);
    for (; flips--; where += 3)
        state[(where[0] | where[1] << 8) % (where[1] & 1 ? length : length < 200 ? length : 200)] ^= (char)where[2];
    struct seen other = {0};
    struct wal *again = new_reader(&other);
    struct cursor in = {.at = (uint8_t *)state, .end = (uint8_t *)state + length};
    if (wal_restore(again, &in) && xacts_restore(other.xacts, &in) && notes_restore(&other.notes, &in)) {
        uint8_t block[BLOCK] = {0};
        other.end_lsn = 0;
        check(wal_take(again, 1, 0, 0, block, BLOCK) == 0);
    }
    wal_close(again);
    xacts_close(other.xacts);
    free(state);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 4)
        return 0;
    wal_fuzz_ignore_crc = data[0] & 1;
    struct seen s = {0};
    struct wal *wal = new_reader(&s);
    uint64_t number = 1;
    size_t half = size / 2;
    bool saved = !(data[0] & 2);
    for (size_t at = 1; at + 3 < size; number++) {
        static uint8_t write[MAX_BLOCKS * BLOCK];
        uint32_t blocks = data[at + 2] % MAX_BLOCKS + 1;
        uint64_t offset = (uint64_t)data[at + 1] * 2 * BLOCK;
        uint16_t volume = data[at] & 1;
        at += 3;
        size_t here = size - at < blocks * BLOCK ? size - at : blocks * BLOCK;
        memset(write, 0, blocks * BLOCK);
        memcpy(write, data + at, here);
        at += here;
        check(wal_take(wal, number, volume, offset, write, blocks * BLOCK) == 0);
        if (!saved && at > half) {
            wal = take_over(wal, &s);
            saved = true;
        }
    }
    check(__sanitizer_get_current_allocated_bytes() <= MAX_IN_USE);
    if (getenv("FUZZ_WAL_TELL"))
        fprintf(stderr, "ends of transactions: %u\n", s.ends);
    if (data[0] & 4 && size > 40)
        try_damaged_state(wal, &s, data + size - 12, 4);
    wal_close(wal);
    xacts_close(s.xacts);
    return 0;
}
