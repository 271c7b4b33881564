/* The on-disk structs of FORMAT.md, sections 1 (journal), 2 (frames), 5 (map of a view) and 6 (what a holder keeps). Little-endian machines only; sizes are asserted. */
#ifndef PGCDP_FORMAT_H
#define PGCDP_FORMAT_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the formats are little-endian"
#endif

#define FORMAT_VERSION 1u
#define FMT_HEADER_BYTES 4096u
#define FMT_SET_ID_SIZE 16u
#define FMT_NO_VOLUME 65535u

static const char FMT_SEGMENT_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'S', 'E', 'G'};
static const char FMT_BATCH_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'B', 'A', 'T'};
static const char FMT_APPLIED_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'A', 'P', 'L'};

struct fmt_segment { /* FORMAT.md 1.1; the first 4096 bytes of a segment begin with it */
    char magic[8];
    uint32_t version;
    uint32_t header_length;
    uint8_t set_id[16];
    uint64_t sequence;
    uint64_t salt;
    uint64_t size;
    uint64_t created_ns;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_segment) == 72, "FORMAT.md 1.1");
static_assert(offsetof(struct fmt_segment, checksum) == 64, "FORMAT.md 1.1");

struct fmt_batch { /* FORMAT.md 1.2 */
    char magic[8];
    uint64_t salt;
    uint64_t number;
    uint64_t first_write;
    uint32_t records;
    uint32_t header_length;
    uint64_t length;
    uint64_t prev_segment;
    uint64_t prev_end;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_batch) == 72, "FORMAT.md 1.2");
static_assert(offsetof(struct fmt_batch, checksum) == 64, "FORMAT.md 1.2");

enum fmt_kind { FMT_WRITE = 1, FMT_ZERO = 2, FMT_DISCARD = 3, FMT_FLUSH = 4, FMT_MARK = 5 };
enum fmt_mark_flags { FMT_REWIND_BEGIN = 1, FMT_REWIND_END = 2, FMT_GAP_BEGIN = 3, FMT_GAP_END = 4 };
#define FMT_UNTRACKED "untracked " /* so begins the name of a gap's records, where the journal could not take writes */

struct fmt_record { /* FORMAT.md 1.3 */
    uint8_t kind;
    uint8_t flags;
    uint16_t volume;
    uint32_t data_length;
    uint64_t number;
    uint64_t wall_ns;
    uint64_t boot_ns;
    uint64_t offset;
    uint64_t length;
};
static_assert(sizeof(struct fmt_record) == 48, "FORMAT.md 1.3");

enum fmt_tracked_state { FMT_TRACKED_IDLE = 0, FMT_TRACKED_TRACKING = 1, FMT_TRACKED_HEALING = 2 };

struct fmt_tracking { /* FORMAT.md 1.4: what the head of `tracked` says, should that file be lost */
    uint32_t state;
    uint32_t reserved;
    uint64_t since_ns;
    uint64_t behind;
    uint64_t begin_ns;
};

struct fmt_applied { /* FORMAT.md 1.4; each of the two slots begins with it */
    char magic[8];
    uint32_t version;
    uint32_t flags;
    uint8_t set_id[16];
    uint64_t sequence;
    uint64_t applied_write;
    uint64_t released_write;
    uint64_t durable_write;
    uint64_t durable_batch;
    uint64_t durable_segment;
    uint64_t durable_offset;
    uint64_t checksum;
    struct fmt_tracking tracking;
};
static_assert(sizeof(struct fmt_applied) == 128, "FORMAT.md 1.4");
static_assert(offsetof(struct fmt_applied, checksum) == 88, "FORMAT.md 1.4");

#define FMT_APPLIED_CLEAN 1u
#define FMT_APPLIED_INSIDE 2u /* between begin and end of a rewind in place, or of a gap other than FMT_UNTRACKED */

static const char FMT_TRACKED_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'T', 'R', 'K'};
#define FMT_TRACKED_VOLUMES 256u
#define FMT_TRACKED_BITS 4000u /* blocks of a sector */

struct fmt_tracked { /* FORMAT.md 1.8; each of the two slots begins with it */
    char magic[8];
    uint32_t version;
    uint32_t state;
    uint8_t set_id[16];
    uint64_t sequence;
    uint64_t since_ns;
    uint64_t behind;
    uint64_t begin_ns;
    uint32_t volumes;
    uint32_t reserved;
    uint64_t checksum;
    uint64_t blocks[FMT_TRACKED_VOLUMES];
};
static_assert(sizeof(struct fmt_tracked) == 2128, "FORMAT.md 1.8");
static_assert(offsetof(struct fmt_tracked, checksum) == 72, "FORMAT.md 1.8");

struct fmt_tracked_sector { /* FORMAT.md 1.8 */
    uint64_t checksum;
    uint32_t number;
    uint8_t bits[FMT_TRACKED_BITS / 8];
};
#define FMT_TRACKED_SECTOR 512u
static_assert(offsetof(struct fmt_tracked_sector, bits) + FMT_TRACKED_BITS / 8 == FMT_TRACKED_SECTOR, "FORMAT.md 1.8");

static const char FMT_FRAMES_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'F', 'R', 'M'};
static const char FMT_FRAME_MAGIC[4] = {'F', 'R', 'A', 'M'};

struct fmt_frames_file { /* FORMAT.md 2: how a frames file begins */
    char magic[8];
    uint32_t version;
    char content[4];
    uint8_t set_id[16];
    uint64_t interval;
    uint8_t salt[16]; /* zeros in a plain one */
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_frames_file) == 64, "FORMAT.md 2");

#define FMT_FRAMES_SEALED 2u /* version of a file whose frames are sealed (FORMAT.md 7.3) */

enum fmt_codec { FMT_CODEC_PLAIN = 0, FMT_CODEC_ZSTD = 1, FMT_CODEC_DIRECTORY = 255, FMT_CODEC_SEALED = 256 /* added */ };

struct fmt_frame { /* FORMAT.md 2: before the stored bytes of each frame */
    char magic[4];
    uint32_t codec;
    uint64_t position;
    uint32_t raw_length;
    uint32_t stored_length;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_frame) == 32, "FORMAT.md 2");

#define FMT_FRAME_LIMIT ((size_t)64 << 20)

struct fmt_sealed_block { /* FORMAT.md 7.4: of each block of the image of an encrypted store */
    uint8_t nonce[12];
    uint8_t tag[16];
    uint32_t in_use; /* 1; all is zeros of a block of zeros */
};
static_assert(sizeof(struct fmt_sealed_block) == 32, "FORMAT.md 7.4");

#define FMT_PIECE_BLOCKS 16384u /* blocks of a volume's image that have one key */

struct fmt_piece { /* FORMAT.md 7.4: names that key */
    uint16_t volume;
    uint16_t number[2]; /* lower half, upper half */
};
static_assert(sizeof(struct fmt_piece) == 6, "FORMAT.md 7.4");

struct fmt_frame_entry { /* FORMAT.md 2: of each frame in the directory */
    uint64_t position;
    uint64_t offset;
    uint32_t raw_length;
    uint32_t stored_length;
};
static_assert(sizeof(struct fmt_frame_entry) == 24, "FORMAT.md 2");

static const char FMT_TRAILER_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'E', 'N', 'D'};

struct fmt_frames_trailer { /* FORMAT.md 2: how a finished frames file ends */
    char magic[8];
    uint64_t directory;
    uint64_t frames;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_frames_trailer) == 32, "FORMAT.md 2");

struct fmt_index { /* FORMAT.md 3.1 */
    struct fmt_record record;
    uint64_t position;
    uint64_t reserved;
};
static_assert(sizeof(struct fmt_index) == 64, "FORMAT.md 3.1");

struct fmt_relation { /* FORMAT.md 4.1: PostgreSQL's RelFileNode, RelFileLocator */
    uint32_t tablespace, database, file;
};

enum fmt_end_status {
    FMT_END_COMMITTED = 1,
    FMT_END_ABORTED,
    FMT_END_PREPARED,
    FMT_END_COMMITTED_PREPARED,
    FMT_END_ABORTED_PREPARED,
};

struct fmt_end { /* FORMAT.md 4.1: the end of a transaction */
    uint64_t lsn, end_lsn, write;
    int64_t time_us;
    uint64_t first_lsn;
    uint32_t xid, database, timeline;
    uint32_t changes, subxids;
    uint32_t begin_at, end_at;
    uint32_t status;
};
static_assert(sizeof(struct fmt_end) == 72, "FORMAT.md 4.1");

enum fmt_change_flags {
    FMT_CHANGE_CREATED = 1, /* the file was made by the transaction */
    FMT_CHANGE_DROPPED = 2, /* its end removes the file: DROP, TRUNCATE, or a rewrite */
    FMT_CHANGE_SHRUNK = 4,  /* cut to fewer blocks: TRUNCATE of what the same transaction made */
};

struct fmt_change { /* FORMAT.md 4.1: what a transaction did to a file */
    struct fmt_relation relation;
    uint32_t flags;
    uint64_t inserted, updated, deleted; /* rows */
    uint64_t moved;                      /* rows among the deleted ones that an UPDATE put into another partition */
};
static_assert(sizeof(struct fmt_change) == 48, "FORMAT.md 4.1");

struct fmt_wal_write { /* FORMAT.md 4.1: the WAL that a write completed */
    uint64_t write, from_lsn, to_lsn;
    uint64_t durable; /* the write with which recovery reaches it */
};
static_assert(sizeof(struct fmt_wal_write) == 32, "FORMAT.md 4.1");

#define FMT_NOTE_LOST 255u /* in place of a resource manager: WAL from lsn to end_lsn was not seen */
#define FMT_NOTE_MARK 254u /* ... a mark of the journal; the body is its name */

struct fmt_note { /* FORMAT.md 4.1: a record as it is, followed by its body, padded to 8 bytes */
    uint64_t lsn, end_lsn, write;
    uint32_t timeline, xid;
    uint32_t begin_at, body_length;
    uint16_t magic;
    uint8_t rmid, info;
    uint32_t end_at;
};
static_assert(sizeof(struct fmt_note) == 48, "FORMAT.md 4.1");

#define FMT_WAL_STATE_VERSION 2u
static const char FMT_WAL_STATE_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'W', 'S', 'T'};

struct fmt_wal_state { /* FORMAT.md 4.2: what it begins with */
    char magic[8];
    uint32_t version;
    uint32_t segment_bytes;
    uint64_t system_identifier;
    uint64_t length;
    uint64_t write;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_wal_state) == 48, "FORMAT.md 4.2");

static const char FMT_MAP_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'M', 'A', 'P'};
#define FMT_MAP_VOLUMES 256u

struct fmt_map { /* FORMAT.md 5: how the map of a view begins */
    char magic[8];
    uint32_t version;
    uint32_t volumes;
    uint8_t set_id[16];
    uint64_t length;
    uint64_t extents;
    uint32_t sources;
    uint32_t reserved;
    uint64_t checksum;
};
static_assert(sizeof(struct fmt_map) == 64, "FORMAT.md 5");
static_assert(offsetof(struct fmt_map, checksum) == 56, "FORMAT.md 5");

struct fmt_map_volume {
    char name[64];
    uint64_t bytes;
    uint32_t source;
    uint32_t reserved;
};
static_assert(sizeof(struct fmt_map_volume) == 80, "FORMAT.md 5");

enum fmt_map_source_kind { FMT_MAP_IMAGE = 0, FMT_MAP_FRAMES = 1 };

struct fmt_map_source {
    uint32_t kind;
    char content[4];
    uint64_t interval;
    uint64_t path;
    uint32_t path_length;
    uint32_t reserved;
};
static_assert(sizeof(struct fmt_map_source) == 32, "FORMAT.md 5");

enum fmt_extent_kind { FMT_EXTENT_DATA = 0, FMT_EXTENT_ZEROS = 1 };

struct fmt_map_extent {
    uint64_t block;
    uint32_t count;
    uint16_t volume;
    uint16_t kind;
    uint64_t position;
    uint32_t source;
    uint32_t reserved;
};
static_assert(sizeof(struct fmt_map_extent) == 32, "FORMAT.md 5");

/* FORMAT.md 6 */
static const char FMT_HELD_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'H', 'L', 'D'};
static const char FMT_HELD_NOTE_MAGIC[8] = {'P', 'G', 'C', 'D', 'P', 'N', 'T', 'E'};
#define FMT_HELD_NOTE_BYTES 4096u
#define FMT_HELD_NOTE_INIT 256u
#define FMT_HELD_NOTE_AGREED 544u

struct fmt_held { /* what comes with the descriptors */
    char magic[8];
    uint32_t version;
    uint32_t reserved;
};
static_assert(sizeof(struct fmt_held) == 16, "FORMAT.md 6");

struct fmt_held_note {
    char magic[8];
    uint32_t version;
    uint32_t init_length;
    uint32_t answer_length;
    uint32_t reserved;
    uint64_t checksum; /* of the first FMT_HELD_NOTE_AGREED bytes */
    uint8_t init[FMT_HELD_NOTE_INIT];
    uint8_t answer[FMT_HELD_NOTE_INIT];
    uint64_t captures;
    uint64_t resent;
    uint8_t reserved2[464];
    uint32_t open[256];
    uint8_t reserved3[2048];
};
static_assert(sizeof(struct fmt_held_note) == FMT_HELD_NOTE_BYTES, "FORMAT.md 6");
static_assert(offsetof(struct fmt_held_note, captures) == FMT_HELD_NOTE_AGREED, "FORMAT.md 6");
static_assert(offsetof(struct fmt_held_note, open) == 1024, "FORMAT.md 6");

/* Header length of a batch with so many records. */
static inline uint64_t fmt_batch_header(uint64_t records)
{
    return (sizeof(struct fmt_batch) + records * sizeof(struct fmt_record) + 4095u) & ~(uint64_t)4095u;
}

/* Whether the journal behind this record lies between begin and end of a rewind in place, or of a gap that is taken in while Postgres is
 * stopped; `before`: whether it did before it. `name`: the data of a mark. */
static inline bool fmt_inside(bool before, const struct fmt_record *r, const void *name)
{
    size_t length = sizeof FMT_UNTRACKED - 1;
    bool gap = r->flags == FMT_GAP_BEGIN || r->flags == FMT_GAP_END;
    if (r->kind != FMT_MARK || r->flags == 0 || (gap && r->data_length >= length && memcmp(name, FMT_UNTRACKED, length) == 0))
        return before;
    return r->flags == FMT_REWIND_BEGIN || r->flags == FMT_GAP_BEGIN;
}

#endif
