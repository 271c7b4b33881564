/* The power-cut device, a tool of the tests: files in a FUSE directory that behave as disks with a volatile write cache
 * (cache.h), to be put under loop devices in write-back mode. All disks of one process lose their power at the same moment.
 *
 *     power-disk --fuse DIR [--cache BYTES] [--tear BYTES] NAME=BACKING ...
 *
 * Standard input takes a command a line, standard output answers with a line of JSON; at the end of the input it unmounts and
 * ends, so that it never outlives the test that started it.
 *
 *     status                  what each disk has taken and holds unsynced
 *     cut SEED                cut the power now
 *     cut SEED NAME N         ... in place of the N-th sync of that disk from now on; answered when that has come
 *
 * From the cut on every request fails with EIO, and the backings hold what the disks would: everything synced and some of
 * the rest. "Power came back" is a new process over the same backings.
 *
 * One thread takes requests, one commands; one lock, held for each request: a cut falls between two of them.
 */
#define FUSE_USE_VERSION 34
#include "cache.h"

#include <errno.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MOST_DISKS 8u
#define FIRST_INO 2u
#define MAX_REQUEST (1u << 20)
#define ATTR_SECONDS 3600.0

struct power {
    struct disk disks[MOST_DISKS];
    const char *names[MOST_DISKS];
    unsigned count;
    uint64_t tear;
    struct fuse_session *session;

    pthread_mutex_t lock;
    bool dead;
    uint64_t seed;
    int armed;           /* disk whose sync cuts the power, -1: none */
    uint64_t syncs_left; /* that one gets through before */
    uint8_t *buffer;     /* for reads, MAX_REQUEST bytes */
};

/* Called with the lock; answers the command. */
static void cut_power(struct power *p)
{
    uint64_t random = p->seed;
    p->dead = true;
    for (unsigned i = 0; i < p->count; i++) {
        struct cut c;
        int rc = disk_cut(&p->disks[i], &random, p->tear, &c);
        if (rc) {
            printf("%s\"error\":\"%s\"", i ? "," : "{", strerror(-rc));
            break;
        }
        printf("%s\"%s\":{\"unsynced\":%" PRIu64 ",\"kept\":%" PRIu64 ",\"torn\":%" PRIu64 ",\"lost\":%" PRIu64 "}",
               i ? "," : "{", p->names[i], c.unsynced, c.kept, c.torn, c.lost);
    }
    printf("}\n");
    fflush(stdout);
}

/* ---- requests ---- */

/* The disk, when it has power and the range is one that a device with sectors of 4096 bytes is asked for; else answered. */
static struct disk *disk_at(struct power *p, fuse_req_t req, fuse_ino_t ino, uint64_t offset, uint64_t length)
{
    struct disk *d = ino >= FIRST_INO && ino - FIRST_INO < p->count ? &p->disks[ino - FIRST_INO] : NULL;
    int error = !d ? EISDIR : p->dead ? EIO : 0;
    if (!error && (offset % BLOCK || length % BLOCK || offset > d->size || length > d->size - offset))
        error = EINVAL;
    if (error)
        fuse_reply_err(req, error);
    return error ? NULL : d;
}

static void fill_attr(const struct power *p, fuse_ino_t ino, struct stat *st)
{
    *st = (struct stat){.st_ino = ino, .st_nlink = 1, .st_blksize = (blksize_t)BLOCK, .st_mode = S_IFDIR | 0700};
    if (ino >= FIRST_INO) {
        st->st_mode = S_IFREG | 0600;
        st->st_size = (off_t)p->disks[ino - FIRST_INO].size;
        st->st_blocks = st->st_size / 512;
    }
}

static void op_init(void *self, struct fuse_conn_info *conn)
{
    (void)self;
    conn->want |= conn->capable & FUSE_CAP_ASYNC_DIO;
    conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE | FUSE_CAP_WRITEBACK_CACHE);
    conn->max_write = MAX_REQUEST;
    conn->max_read = MAX_REQUEST; /* the same as the mount option, or libfuse refuses */
    conn->max_background = 256;
    conn->congestion_threshold = 192;
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct power *p = fuse_req_userdata(req);
    for (unsigned i = 0; parent == FUSE_ROOT_ID && i < p->count; i++) {
        if (strcmp(name, p->names[i]) != 0)
            continue;
        struct fuse_entry_param entry = {
            .ino = FIRST_INO + i, .attr_timeout = ATTR_SECONDS, .entry_timeout = ATTR_SECONDS};
        fill_attr(p, entry.ino, &entry.attr);
        fuse_reply_entry(req, &entry);
        return;
    }
    fuse_reply_err(req, ENOENT);
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    struct stat st;
    fill_attr(fuse_req_userdata(req), ino, &st);
    fuse_reply_attr(req, &st, ATTR_SECONDS);
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (ino < FIRST_INO) {
        fuse_reply_err(req, EISDIR);
        return;
    }
    fi->direct_io = 1; /* no cache but the disk's own */
    fuse_reply_open(req, fi);
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t length, off_t offset, struct fuse_file_info *fi)
{
    (void)fi;
    struct power *p = fuse_req_userdata(req);
    pthread_mutex_lock(&p->lock);
    struct disk *d = disk_at(p, req, ino, (uint64_t)offset, length);
    if (d) {
        int rc = disk_read(d, p->buffer, length, (uint64_t)offset);
        if (rc)
            fuse_reply_err(req, -rc);
        else
            fuse_reply_buf(req, (const char *)p->buffer, length);
    }
    pthread_mutex_unlock(&p->lock);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t length, off_t offset,
                     struct fuse_file_info *fi)
{
    (void)fi;
    struct power *p = fuse_req_userdata(req);
    pthread_mutex_lock(&p->lock);
    struct disk *d = disk_at(p, req, ino, (uint64_t)offset, length);
    if (d) {
        int rc = disk_write(d, (const uint8_t *)data, length, (uint64_t)offset);
        if (rc)
            fuse_reply_err(req, -rc);
        else
            fuse_reply_write(req, length);
    }
    pthread_mutex_unlock(&p->lock);
}

/* Discard and write-zeroes of the loop device: both read back as zeros, and both may be lost as any write. */
static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *fi)
{
    (void)fi;
    struct power *p = fuse_req_userdata(req);
    int kind = mode & ~FALLOC_FL_KEEP_SIZE;
    if (kind != FALLOC_FL_PUNCH_HOLE && kind != FALLOC_FL_ZERO_RANGE) {
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    pthread_mutex_lock(&p->lock);
    struct disk *d = disk_at(p, req, ino, (uint64_t)offset, (uint64_t)length);
    if (d)
        fuse_reply_err(req, -disk_write(d, NULL, (uint64_t)length, (uint64_t)offset));
    pthread_mutex_unlock(&p->lock);
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
    (void)datasync;
    (void)fi;
    struct power *p = fuse_req_userdata(req);
    pthread_mutex_lock(&p->lock);
    if (!p->dead && p->armed == (int)(ino - FIRST_INO) && p->syncs_left-- == 0)
        cut_power(p);
    struct disk *d = disk_at(p, req, ino, 0, 0);
    if (d)
        fuse_reply_err(req, -disk_sync(d));
    pthread_mutex_unlock(&p->lock);
}

static const struct fuse_lowlevel_ops OPS = {
    .init = op_init,
    .lookup = op_lookup,
    .getattr = op_getattr,
    .open = op_open,
    .read = op_read,
    .write = op_write,
    .fallocate = op_fallocate,
    .fsync = op_fsync,
};

/* ---- commands ---- */

static void tell_status(const struct power *p)
{
    for (unsigned i = 0; i < p->count; i++) {
        const struct disk *d = &p->disks[i];
        printf("%s\"%s\":{\"writes\":%" PRIu64 ",\"syncs\":%" PRIu64 ",\"unsynced\":%" PRIu64 ",\"unsynced_bytes\":%" PRIu64
               ",\"evicted\":%" PRIu64 "}",
               i ? "," : "{", p->names[i], d->writes, d->syncs, d->cached_writes, d->cached_bytes, d->evicted);
    }
    printf("}\n");
}

/* Called with the lock. */
static void obey(struct power *p, const char *line)
{
    char name[64];
    uint64_t seed, syncs;
    int words = sscanf(line, "cut %" SCNu64 " %63s %" SCNu64, &seed, name, &syncs);
    if (strcmp(line, "status\n") == 0) {
        tell_status(p);
    } else if (words == 1 && !p->dead) {
        p->seed = seed;
        cut_power(p);
    } else if (words == 3 && !p->dead && syncs > 0) {
        p->seed = seed;
        p->syncs_left = syncs - 1;
        for (unsigned i = 0; i < p->count; i++)
            if (strcmp(name, p->names[i]) == 0)
                p->armed = (int)i;
    } else {
        printf("{\"error\":\"not understood, or the power is gone\"}\n");
    }
}

static void *command_main(void *arg)
{
    struct power *p = arg;
    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        pthread_mutex_lock(&p->lock);
        obey(p, line);
        pthread_mutex_unlock(&p->lock);
        fflush(stdout);
    }
    fuse_session_exit(p->session);
    fuse_session_unmount(p->session); /* ends the other thread's wait for a request */
    return NULL;
}

/* ---- start ---- */

static int add_disk(struct power *p, char *argument, uint64_t limit)
{
    char *equals = strchr(argument, '=');
    if (!equals || p->count == MOST_DISKS)
        return -EINVAL;
    *equals = '\0';
    p->names[p->count] = argument;
    return disk_open(&p->disks[p->count++], equals + 1, limit);
}

static int mount_at(struct power *p, const char *directory)
{
    char program[] = "power-disk", flag[] = "-o", options[] = "fsname=power-disk,max_read=1048576";
    char *argv[] = {program, flag, options, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, argv);
    p->session = fuse_session_new(&args, &OPS, sizeof OPS, p);
    fuse_opt_free_args(&args);
    return p->session && fuse_session_mount(p->session, directory) == 0 ? 0 : -EIO;
}

int main(int argc, char **argv)
{
    static const struct option OPTIONS[] = {{"fuse", required_argument, NULL, 'f'},
                                            {"cache", required_argument, NULL, 'c'},
                                            {"tear", required_argument, NULL, 't'},
                                            {NULL, 0, NULL, 0}};
    static struct power p = {.tear = SECTOR, .armed = -1};
    const char *directory = NULL;
    uint64_t limit = (uint64_t)256 << 20;
    int option;
    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
        if (option == 'f')
            directory = optarg;
        else if (option == 'c')
            limit = strtoull(optarg, NULL, 10);
        else if (option == 't')
            p.tear = strtoull(optarg, NULL, 10);
        else
            return 2;
    }
    if (!directory || optind == argc || p.tear == 0 || p.tear % SECTOR || BLOCK % p.tear)
        return 2;
    for (int i = optind; i < argc; i++) {
        int rc = add_disk(&p, argv[i], limit);
        if (rc) {
            fprintf(stderr, "%s: %s\n", argv[i], strerror(-rc));
            return 1;
        }
    }
    p.buffer = malloc(MAX_REQUEST);
    pthread_mutex_init(&p.lock, NULL);
    pthread_t commands;
    if (!p.buffer || mount_at(&p, directory) != 0 || pthread_create(&commands, NULL, command_main, &p) != 0)
        return 1;
    struct fuse_buf buffer = {.mem = NULL};
    while (!fuse_session_exited(p.session)) {
        int rc = fuse_session_receive_buf(p.session, &buffer);
        if (rc == -EINTR)
            continue;
        if (rc <= 0)
            break;
        fuse_session_process_buf(p.session, &buffer);
    }
    pthread_join(commands, NULL); /* it unmounts; the process's end closes the rest */
    return 0;
}
