/* See fault_points.h. */
#include "fault_points.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define UNIT ((uint64_t)4096)
#define MOST_KEPT ((uint64_t)64 << 20) /* of one change; a longer one is not taken back */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- what was there before a change that is not synced yet ---- */

struct before {
    struct before *older;
    dev_t dev;
    ino_t ino;
    uint64_t offset;
    size_t length;
    uint8_t *bytes;
};

static struct before *newest;

static void keep(int fd, uint64_t offset, uint64_t length)
{
    struct stat st;
    struct before *b = calloc(1, sizeof *b);
    void *bytes = NULL;
    if (!b || length > MOST_KEPT || fstat(fd, &st) < 0 || posix_memalign(&bytes, UNIT, length) != 0) {
        free(b);
        return;
    }
    ssize_t got = pread(fd, bytes, length, (off_t)offset);
    *b = (struct before){newest, st.st_dev, st.st_ino, offset, got > 0 ? (size_t)got : 0, bytes};
    newest = b;
}

/* Synced (or, with `back`, lost): what was kept of this file goes. */
static void let_go(int fd, int back)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return;
    for (struct before **at = &newest; *at;) {
        struct before *b = *at;
        if (b->dev != st.st_dev || b->ino != st.st_ino) {
            at = &b->older;
            continue;
        }
        if (back && b->length && pwrite(fd, b->bytes, b->length, (off_t)b->offset) < 0)
            perror("fault points: cannot take a write back");
        *at = b->older;
        free(b->bytes);
        free(b);
    }
}

/* ---- what shall fail ---- */

enum kind { NONE, NO_SPACE, ERROR, SHORT, LOST };

static int find(const char *directory, const char *name, char path[512], char spec[128])
{
    if (snprintf(path, 512, "%s/%s", directory, name) >= 512)
        return 0;
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    int found = fgets(spec, 128, f) != NULL;
    fclose(f);
    return found;
}

static void say(const char *path, const char *point, const char *kind)
{
    char fired[600];
    snprintf(fired, sizeof fired, "%s.fired", path);
    FILE *f = fopen(fired, "ae");
    if (!f)
        return;
    fprintf(f, "%s %s\n", point, kind);
    fclose(f);
}

/* Counts down SKIP and TIMES in the file itself, so that a successor of this process goes on counting. */
static void put_back(const char *path, const char *word, long skip, long times, long ms)
{
    char fresh[600];
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *f = fopen(fresh, "we");
    if (!f)
        return;
    fprintf(f, "%s %ld %ld %ld\n", word, skip, times, ms);
    fclose(f);
    /* In place of what is there, at once: the test may just be taking it away, and that must not come back. */
    renameat2(AT_FDCWD, fresh, AT_FDCWD, path, RENAME_EXCHANGE);
    unlink(fresh);
}

static enum kind ask(const char *point, int is_write, int is_sync)
{
    const char *directory = getenv("PGCDP_TEST_FAULTS");
    char path[512], spec[128], disk[64], word[16];
    long skip = 0, times = 1, ms = 0;
    if (!directory)
        return NONE;
    snprintf(disk, sizeof disk, "%.*s", (int)strcspn(point, "."), point);
    pthread_mutex_lock(&lock);
    enum kind kind = NONE;
    int slow = 0;
    if ((find(directory, point, path, spec) || find(directory, disk, path, spec)) &&
        sscanf(spec, "%15s %ld %ld %ld", word, &skip, &times, &ms) >= 1) {
        slow = strcmp(word, "slow") == 0;
        int is_short = strcmp(word, "short") == 0;
        if (skip > 0) {
            put_back(path, word, skip - 1, times, ms);
            slow = 0;
        } else if (!is_short || is_write) {
            say(path, point, word);
            if (times == 1)
                unlink(path);
            else if (times > 1)
                put_back(path, word, 0, times - 1, ms);
            kind = slow                          ? NONE
                   : is_short                    ? SHORT
                   : strcmp(word, "enospc") == 0 ? NO_SPACE
                   : strcmp(word, "lost") == 0   ? (is_sync ? LOST : ERROR)
                                                 : ERROR;
        }
    }
    pthread_mutex_unlock(&lock);
    if (slow) {
        struct timespec t = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&t, NULL);
    }
    return kind;
}

/* ---- what io.c calls ---- */

ssize_t write_some(const char *point, int fd, const struct iovec *iov, int count, uint64_t offset)
{
    enum kind kind = ask(point, 1, 0);
    uint64_t length = 0;
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    if (getenv("PGCDP_TEST_FAULTS")) {
        pthread_mutex_lock(&lock);
        keep(fd, offset, length);
        pthread_mutex_unlock(&lock);
    }
    if (kind == NONE)
        return pwritev(fd, iov, count, (off_t)offset);
    uint64_t half = length / 2 / UNIT * UNIT, done = 0;
    for (int i = 0; i < count && done < half; i++) {
        uint64_t n = iov[i].iov_len < half - done ? iov[i].iov_len : half - done;
        ssize_t rc = pwrite(fd, iov[i].iov_base, n, (off_t)(offset + done));
        if (rc < 0)
            return -1;
        done += (uint64_t)rc;
    }
    if (kind == SHORT)
        return done ? (ssize_t)done : pwritev(fd, iov, count, (off_t)offset); /* one block is never half there */
    errno = kind == NO_SPACE ? ENOSPC : EIO;
    return -1;
}

int sync_with(const char *point, int fd, int (*sync)(int))
{
    enum kind kind = ask(point, 0, 1);
    if (!getenv("PGCDP_TEST_FAULTS"))
        return sync(fd);
    pthread_mutex_lock(&lock);
    let_go(fd, kind == LOST);
    pthread_mutex_unlock(&lock);
    if (kind == NONE)
        return sync(fd);
    errno = kind == NO_SPACE ? ENOSPC : EIO;
    return -1;
}

int before(const char *point, int fd, uint64_t offset, uint64_t length)
{
    enum kind kind = ask(point, 0, 0);
    if (kind == NO_SPACE)
        return -ENOSPC;
    if (kind != NONE)
        return -EIO;
    if (fd >= 0 && getenv("PGCDP_TEST_FAULTS")) {
        pthread_mutex_lock(&lock);
        keep(fd, offset, length);
        pthread_mutex_unlock(&lock);
    }
    return 0;
}
