/* libFuzzer target: captured writes of any content never crash the readers of filesystems' logs, nor what settles WAL by them.
 *
 * The input is one byte of flags, then writes. To the log: u8 0, u8 place in blocks, u8 length in sectors, and its sectors; what
 * is missing at the end is zeros. Of WAL, the next page of a segment, made here: u8 2, u16 place in blocks. Flag 1: the
 * filesystem is ext4, else xfs. Flag 2: a record of xfs gets the numbers that its place in the log asks for, so that what lies
 * behind them is reached. With FUZZ_LOGS_TELL in the environment it tells how often a file as long as a segment was in the log,
 * and how many writes of WAL waited for it. */
#include <sanitizer/allocator_interface.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../engine/ext4_log.h"
#include "../../engine/wal.h"
#include "../../engine/wal_settle.h"
#include "../../engine/xfs_log.h"

#define SECTOR 512u
#define WAL_PAGE 8192u
#define MAX_SECTORS 128u
#define SEGMENT (16u << 20)
#define MAX_IN_USE (256u << 20) /* with libFuzzer's own corpus, some 30 MB */
#define LOG_BEGIN (UINT64_C(1) << 20)

extern bool wal_fuzz_ignore_crc;

static uint64_t waited, files, last_durable;

int tables_write(struct tables *t, const struct fmt_wal_write *row)
{
    (void)t;
    if (row->durable < row->write || row->durable < last_durable)
        abort();
    last_durable = row->durable;
    waited += row->durable > row->write;
    return 0;
}

static int found(void *arg, const struct wal_record *record)
{
    (void)arg;
    (void)record;
    return 0;
}

static void told(void *arg, const struct logged_file *file)
{
    (void)arg;
    uint64_t sum = file->number + file->size; /* every byte that is handed over may be read */
    for (uint32_t i = 0; i < file->extents; i++)
        sum += file->extent[i].file + file->extent[i].place + file->extent[i].length;
    files += (file->which == LOGGED_ALL && file->size == SEGMENT) + (sum == UINT64_MAX);
}

static void put_u32(uint8_t *at, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(v >> (24 - 8 * i));
}

static void xfs_superblock(uint8_t *sb)
{
    memcpy(sb, "XFSB", 4);
    put_u32(sb + 4, 4096);
    put_u32(sb + 52, (uint32_t)(LOG_BEGIN / 4096)); /* sb_logstart */
    put_u32(sb + 84, 49152);
    put_u32(sb + 96, 256); /* a log of 1 MiB */
    sb[124] = 16;
}

static void ext4_superblock(uint8_t *volume)
{
    uint8_t *sb = volume + 1024;
    memcpy(sb + 0x38, "\x53\xEF", 2);
    sb[0x18] = 2;    /* blocks of 4096 bytes */
    sb[0x5C] = 4;    /* with a journal */
    sb[0xFD] = 1;    /* whose extents are here: one of 256 blocks */
    memcpy(sb + 0x10C, "\x0A\xF3\x01\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x01\0\0", 24);
}

/* Makes each header in a write one of its place, and all else of its round. */
static void mend(uint8_t *write, uint64_t bytes, uint64_t at, uint32_t *before)
{
    for (uint64_t i = 0; i < bytes; i += SECTOR) {
        if (memcmp(write + i, "\xFE\xED\xBA\xBE", 4) != 0) {
            put_u32(write + i, 1);
            continue;
        }
        put_u32(write + i + 4, 1);
        put_u32(write + i + 16, 1);
        put_u32(write + i + 20, (uint32_t)((at + i) / SECTOR));
        put_u32(write + i + 36, *before);
        *before = (uint32_t)((at + i) / SECTOR);
    }
}

/* The page number `number` of the first segment: one record fills it. */
static void take_page(struct wal *wal, struct settle *settle, uint64_t number, uint64_t write, uint64_t place)
{
    static uint8_t page[WAL_PAGE];
    uint64_t address = SEGMENT + number * WAL_PAGE, identifier = 1;
    uint32_t head = number ? 24 : 40, length = WAL_PAGE - head, timeline = 1, segment = SEGMENT, size = WAL_PAGE;
    uint64_t previous = number == 1 ? SEGMENT + 40 : address - WAL_PAGE + 24;
    memcpy(page, number ? "\x10\xD1\0\0" : "\x10\xD1\2\0", 4);
    memcpy(page + 4, &timeline, 4);
    memcpy(page + 8, &address, 8);
    memcpy(page + 24, &identifier, 8);
    memcpy(page + 32, &segment, 4);
    memcpy(page + 36, &size, 4);
    memcpy(page + head, &length, 4);
    memcpy(page + head + 8, &previous, 8);
    struct fmt_wal_write row = {.write = write, .from_lsn = wal_next_lsn(wal)};
    if (wal_take(wal, write, 0, place, page, WAL_PAGE))
        abort();
    row.to_lsn = wal_next_lsn(wal);
    if (row.to_lsn != row.from_lsn && settle_wal(settle, row, 0))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t sb[LOGGED_SUPERBLOCK] = {0};
    if (size < 4)
        return 0;
    bool ext4 = data[0] & 1;
    struct wal_options options = {.system_identifier = 1, .segment_bytes = SEGMENT, .found = found};
    struct settle *settle = settle_open(true, SEGMENT);
    struct wal *wal;
    struct err e;
    (ext4 ? ext4_superblock : xfs_superblock)(sb);
    options.mapped = settle_mapped;
    options.mapped_arg = settle;
    struct xfs_log *x = xfs_log_open(sb, told, NULL);
    struct ext4_log *y = ext4_log_open(sb, SEGMENT, told, NULL);
    if (!!x == ext4 || !!y != ext4 || !settle || wal_open(&wal, &options, &e))
        abort();
    settle_volume(settle, 0, sb);
    settle_between(settle, wal, NULL);
    last_durable = files = waited = 0;
    uint64_t number = 1, page = 0;
    uint32_t before = 0;
    wal_fuzz_ignore_crc = true;
    for (size_t at = 1; at + 3 <= size; number++) {
        static uint8_t write[MAX_SECTORS * SECTOR];
        uint64_t place = data[at + 1] * 8u * SECTOR, bytes = (data[at + 2] % MAX_SECTORS + 1) * SECTOR;
        uint8_t kind = data[at];
        at += 3;
        if (kind == 2) {
            take_page(wal, settle, page++ % (SEGMENT / WAL_PAGE), number, (data[at - 2] | data[at - 1] << 8) * UINT64_C(4096));
            continue;
        }
        size_t here = size - at < bytes ? size - at : bytes;
        memset(write, 0, bytes);
        memcpy(write, data + at, here);
        at += here;
        if (data[0] & 2)
            mend(write, bytes, place, &before);
        if (x)
            xfs_log_take(x, LOG_BEGIN + place, write, bytes);
        else
            ext4_log_take(y, LOG_BEGIN + place, write, bytes);
        if (settle_other(settle, number, 0, LOG_BEGIN + place, write, bytes))
            abort();
    }
    if (__sanitizer_get_current_allocated_bytes() > MAX_IN_USE)
        abort();
    settle_end(settle);
    if (getenv("FUZZ_LOGS_TELL"))
        fprintf(stderr, "files: %llu waited: %llu\n", (unsigned long long)files, (unsigned long long)waited);
    wal_close(wal);
    settle_close(settle);
    xfs_log_close(x);
    ext4_log_close(y);
    return 0;
}
