/* What the parts of one capture process share: its arguments, its state, its control socket. */
#ifndef PGCDP_CAPTURE_PROCESS_H
#define PGCDP_CAPTURE_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

#include "control.h"
#include "front_fuse.h"
#include "held.h"
#include "journal_write.h"
#include "volume.h"

struct tracked;

struct capture {
    const char *journal, *fuse_dir, *socket, *holder;
    uint8_t set_id[16];
    bool has_set_id, create, put_back;
    bool track; /* on_full */
    uint64_t segment_bytes, limit;

    struct volume volumes[MAX_VOLUMES];
    unsigned volume_count;
    int lock_fd;
    struct tracked *tracked; /* until the volume set has it */
    struct jw *jw;
    struct volume_set *set;
    struct held *held; /* NULL: without a holder */
    struct front *front;
    struct control *control;
};

/* Takes the options; `*first` is the first argument that names a volume. */
int capture_arguments(struct capture *c, int argc, char **argv, int *first, struct err *e);

/* Answers a request at the control socket (control_handler). */
json_t *capture_handle(void *self, const json_t *request, struct err *e, const char **kind);

/* Begins the end of the process, unless a volume is open. */
json_t *capture_stop(struct capture *c, struct err *e, const char **kind);

#endif
