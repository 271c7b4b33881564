/* What is asked at the control socket of a capture process. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "capture_process.h"
#include "log.h"
#include "util.h"

static json_t *status(struct capture *c)
{
    struct jw_status j;
    struct volume_status v;
    jw_get_status(c->jw, &j);
    vs_get_status(c->set, &v);
    json_t *volumes = json_array();
    for (unsigned i = 0; i < c->volume_count; i++)
        json_array_append_new(volumes, json_pack("{s:s, s:i, s:I, s:s, s:b}", "name", c->volumes[i].name, "number", (int)i,
                                                 "bytes", (json_int_t)volume_size(&c->volumes[i]), "backing", c->volumes[i].path,
                                                 "open", front_open_count(c->front, i) > 0));
    json_t *held = c->held ? json_pack("{s:I, s:I, s:i, s:i}", "captures", (json_int_t)held_captures(c->held), "resent",
                                       (json_int_t)front_resent(c->front), "fuse_fd", c->held->fuse, "note_fd", c->held->note_fd)
                           : json_null();
    json_t *errors = json_array();
    if (j.error[0])
        json_array_append_new(errors, json_sprintf("journal: %s", j.error));
    for (int i = 0; i < VS_TROUBLES; i++)
        if (v.errors[i][0])
            json_array_append_new(errors, json_string(v.errors[i]));
    json_t *tracked = v.tracking ? json_pack("{s:I, s:I, s:I, s:b}", "behind", (json_int_t)v.tracked_behind, "since_ns",
                                             (json_int_t)v.tracked_since_ns, "blocks", (json_int_t)v.tracked_blocks, "healing",
                                             v.healing)
                                 : json_null();
    return json_pack(
        "{s:s, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:{s:I, s:I}, s:{s:I, s:I, s:I, s:I}, s:o, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:o, s:I, s:s, s:o, s:s, s:o}",
        "state", v.stalled ? "stalled" : v.tracking ? "tracking" : "capturing", "pid", (int)getpid(), "last_write", (json_int_t)v.last_write,
        "durable_write", (json_int_t)j.durable_write, "applied_write", (json_int_t)v.applied_write, "synced_write",
        (json_int_t)j.synced_write, "released_write", (json_int_t)j.released_write, "batch", (json_int_t)j.durable_batch,
        "position", "segment", (json_int_t)j.durable_segment, "offset", (json_int_t)j.durable_offset, "journal", "bytes",
        (json_int_t)j.bytes, "limit", (json_int_t)j.limit, "segments", (json_int_t)j.segments, "segment_bytes",
        (json_int_t)j.segment_bytes, "volumes", volumes, "unapplied_bytes", (json_int_t)v.unapplied_bytes, "parked_bytes",
        (json_int_t)v.parked_bytes, "writes", (json_int_t)v.writes, "bytes_written", (json_int_t)v.bytes_written, "reads",
        (json_int_t)v.reads, "bytes_read", (json_int_t)v.bytes_read, "errors", errors, "rss_kib", (json_int_t)control_rss_kib(), "version",
        PGCDP_VERSION, "held", held, "on_full", v.tracks ? "track" : "stall",
        "tracked", tracked);
}

static json_t *stop_held(struct capture *c, struct err *e, const char **kind)
{
    int rc = front_unmount(c->front);
    if (rc == 0)
        return json_pack("{s:b}", "stopping", 1);
    if (rc == -EBUSY) {
        *kind = "busy";
        err_set(e, rc, "a volume in %s is open", c->fuse_dir);
        err_hint(e, "unmount its filesystem and detach its loop device first");
    } else {
        err_sys(e, rc, "cannot unmount %s", c->fuse_dir);
    }
    return NULL;
}

/* For a successor: what was answered is applied and the journal clean when this process has ended. */
static json_t *hand_over(struct capture *c, struct err *e, const char **kind)
{
    if (!c->held) {
        *kind = "precondition";
        err_set(e, ERR_PRECONDITION, "this capture process has no holder that would keep its connection");
        err_hint(e, "pgcdp down and pgcdp up do it, with Postgres stopped meanwhile");
        return NULL;
    }
    front_leave(c->front);
    return json_pack("{s:b}", "handing_over", 1);
}

json_t *capture_stop(struct capture *c, struct err *e, const char **kind)
{
    if (c->held)
        return stop_held(c, e, kind);
    for (unsigned i = 0; i < c->volume_count; i++)
        if (front_open_count(c->front, i)) {
            *kind = "busy";
            err_set(e, -EBUSY, "volume %s is open", c->volumes[i].name);
            err_hint(e, "unmount its filesystem and detach its loop device first");
            return NULL;
        }
    front_stop(c->front);
    return json_pack("{s:b}", "stopping", 1);
}

/* {"volume":NAME,"bytes":N}: so many of its backing are to be shown, which has become larger. */
static json_t *grow(struct capture *c, const json_t *request, struct err *e, const char **kind)
{
    const char *name = json_string_value(json_object_get(request, "volume"));
    json_int_t bytes = json_integer_value(json_object_get(request, "bytes"));
    for (unsigned i = 0; name && bytes > 0 && i < c->volume_count; i++) {
        if (strcmp(name, c->volumes[i].name) != 0)
            continue;
        if (vs_grow(c->set, i, (uint64_t)bytes, e) || volume_grow(&c->volumes[i], (uint64_t)bytes, e)) {
            *kind = "precondition";
            return NULL;
        }
        int rc = front_grown(c->front, i);
        if (rc) {
            err_sys(e, rc, "cannot tell the kernel the size of volume %s", name);
            return NULL;
        }
        return json_pack("{s:I}", "bytes", bytes);
    }
    *kind = "usage";
    err_set(e, ERR_USAGE, "grow needs the name of a volume and its bytes");
    return NULL;
}

static json_t *not_durable(struct capture *c, int rc, const char *command, struct err *e, const char **kind)
{
    if (rc == -EAGAIN) {
        struct jw_status j;
        struct volume_status v;
        jw_get_status(c->jw, &j);
        vs_get_status(c->set, &v);
        const char *why = v.errors[VS_APPLY][0] ? v.errors[VS_APPLY] : j.error[0] ? j.error : "the journal is full";
        *kind = "stalled";
        err_set(e, rc, "%s: %s, writes wait", command, why);
        err_hint(e, "see that the agent runs, and that its store and the disk of the journal have space");
    } else if (rc == VS_IN_GAP) {
        struct volume_status v;
        vs_get_status(c->set, &v);
        *kind = "tracking";
        err_set(e, rc, "%s: the journal could not grow: changes behind write %lu are tracked, and no point is there until the set has healed",
                command, v.tracked_behind);
        err_hint(e, "give the journal's disk room, and see that the agent runs; pgcdp status tells when it has healed");
    } else {
        err_sys(e, rc, "%s", command);
    }
    return NULL;
}

static json_t *heal(struct capture *c, struct err *e, const char **kind)
{
    int rc = vs_heal(c->set, e);
    if (rc == 0)
        return json_pack("{s:b}", "healing", 1);
    *kind = rc == -EAGAIN ? "tracking" : "precondition";
    return NULL;
}

/* Of a mark: 0, or that of the begin or end of a rewind or gap; -1: of none of them. */
static int mark_flags(const json_t *request)
{
    const json_t *rewind = json_object_get(request, "rewind"), *gap = json_object_get(request, "gap");
    if (!rewind && !gap)
        return 0;
    const char *what = json_string_value(rewind ? rewind : gap);
    if (!what || (rewind && gap))
        return -1;
    if (strcmp(what, "begin") == 0)
        return rewind ? FMT_REWIND_BEGIN : FMT_GAP_BEGIN;
    return strcmp(what, "end") ? -1 : rewind ? FMT_REWIND_END : FMT_GAP_END;
}

json_t *capture_handle(void *self, const json_t *request, struct err *e, const char **kind)
{
    struct capture *c = self;
    const char *cmd = json_string_value(json_object_get(request, "cmd"));
    uint64_t write = 0;
    if (!cmd)
        cmd = "";
    if (strcmp(cmd, "status") == 0)
        return status(c);
    if (strcmp(cmd, "stop") == 0)
        return capture_stop(c, e, kind);
    if (strcmp(cmd, "hand_over") == 0)
        return hand_over(c, e, kind);
    if (strcmp(cmd, "cut") == 0) {
        int rc = vs_cut(c->set, &write);
        return rc ? not_durable(c, rc, "cut", e, kind) : json_pack("{s:I}", "durable_write", (json_int_t)write);
    }
    if (strcmp(cmd, "sync") == 0)
        return vs_sync(c->set, &write, e) ? NULL : json_pack("{s:I}", "applied_write", (json_int_t)write);
    if (strcmp(cmd, "heal") == 0)
        return heal(c, e, kind);
    if (strcmp(cmd, "grow") == 0)
        return grow(c, request, e, kind);
    if (strcmp(cmd, "mark") == 0) {
        const char *name = json_string_value(json_object_get(request, "name"));
        int flags = mark_flags(request);
        if (!name || !*name || strlen(name) > 1024 || flags < 0) {
            *kind = "usage";
            err_set(e, ERR_USAGE, flags < 0 ? "\"rewind\" or \"gap\" of a mark is \"begin\" or \"end\""
                                            : "a mark needs a name of 1 to 1024 bytes");
            return NULL;
        }
        int rc = vs_mark(c->set, name, (uint8_t)flags, &write);
        return rc ? not_durable(c, rc, "mark", e, kind) : json_pack("{s:I}", "write", (json_int_t)write);
    }
    if (strcmp(cmd, "release") == 0) {
        const json_t *value = json_object_get(request, "write");
        if (!json_is_integer(value) || json_integer_value(value) < 0) {
            *kind = "usage";
            err_set(e, ERR_USAGE, "release needs a write number");
            return NULL;
        }
        jw_release(c->jw, (uint64_t)json_integer_value(value));
        vs_wake(c->set);
        struct jw_status j;
        jw_get_status(c->jw, &j);
        return json_pack("{s:I}", "released_write", (json_int_t)j.released_write);
    }
    *kind = "usage";
    err_set(e, ERR_USAGE, "unknown command \"%s\"", cmd);
    return NULL;
}
