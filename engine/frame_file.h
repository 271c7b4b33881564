/* A finished frames file (FORMAT.md 2) by its directory: any frame, checked when it is read.
 *
 * What is here does not change after frame_file_open: any thread.
 */
#ifndef PGCDP_FRAME_FILE_H
#define PGCDP_FRAME_FILE_H

#include <stdbool.h>
#include <stdint.h>
#include <zstd.h>

#include "err.h"
#include "format.h"
#include "seal.h"

struct frame_file;

struct frame_identity { /* what the file's header must say */
    const char *content;
    const uint8_t *set_id;
    uint64_t interval;
};

/* What a thread needs to unpack frames. Zeroed before the first use. */
struct frame_scratch {
    ZSTD_DCtx *zstd;
    struct seal *seal;
    uint8_t *stored;
    size_t room;
};

void frame_scratch_free(struct frame_scratch *s);

/* Checks header, trailer and directory. ERR_DAMAGE with file and offset, or -errno. */
int frame_file_open(struct frame_file **out, const char *path, const struct frame_identity *wanted, struct err *e);
void frame_file_close(struct frame_file *f);

const char *frame_file_path(const struct frame_file *f);

/* Another one for each file that was ever opened here: unlike its address, never used again. */
uint64_t frame_file_serial(const struct frame_file *f);

/* Bytes of the stream. */
uint64_t frame_file_length(const struct frame_file *f);

/* Number of the frame that holds the byte at `position`, which must be inside of the stream. */
size_t frame_file_find(const struct frame_file *f, uint64_t position);

const struct fmt_frame_entry *frame_file_entry(const struct frame_file *f, size_t number);

/* Reads, checks and unpacks one frame into `raw`, which has room for its raw length. ERR_DAMAGE or -errno. */
int frame_file_load(const struct frame_file *f, size_t number, struct frame_scratch *s, uint8_t *raw, struct err *e);

/* A frame's stored bytes, which are spoilt: whether its checksum is right, they are what was sealed (with the key that `seal`
 * uses; NULL: the file is plain), and unpack to its raw length. */
bool frame_unpack(const struct fmt_frame *h, uint8_t *stored, struct seal *seal, ZSTD_DCtx *zstd, uint8_t *raw);

/* Whether the frames behind a header are sealed, and their key then, SEAL_KEY bytes. ERR_DAMAGE for a plain file where this
 * engine was given the key of an encrypted store, ERR_PRECONDITION for a sealed one where it was not, or -errno. */
int frame_key(const char *path, const struct fmt_frames_file *h, bool *sealed, uint8_t *key, struct err *e);

#endif
