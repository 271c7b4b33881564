#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io.h"
#include "util.h"

int volume_open(struct volume *v, const char *name, const char *path, uint64_t size, struct err *e)
{
    struct stat st;
    *v = (struct volume){.fd = -1};
    if (strlen(name) >= sizeof v->name || strlen(path) >= sizeof v->path || strchr(name, '/') || !*name)
        return err_set(e, ERR_USAGE, "volume name or path is not usable: %s=%s", name, path);
    if (stat(path, &st) < 0)
        return err_sys(e, -errno, "cannot open the backing %s of volume %s", path, name);
    int exclusive = S_ISBLK(st.st_mode) ? O_EXCL : 0; /* the kernel refuses what is mounted or held */
    int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC | exclusive);
    if (fd < 0 && errno == EBUSY)
        return err_set(e, ERR_PRECONDITION, "the backing %s of volume %s is in use", path, name);
    if (fd < 0)
        return err_sys(e, -errno, "cannot open the backing %s of volume %s", path, name);
    int rc = 0;
    if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        rc = err_set(e, ERR_PRECONDITION, "the backing %s of volume %s is locked by another process", path, name);
        err_hint(e, "another capture process serves it; stop it with: pgcdp down");
    } else if ((rc = io_size(fd, &v->size)) != 0) {
        err_sys(e, rc, "cannot tell the size of %s", path);
    } else if (v->size == 0 || (!size && v->size % BLOCK)) { /* what is behind `size` may be of any length */
        rc = err_set(e, ERR_USAGE, "the backing %s has %lu bytes, not a multiple of 4096", path, v->size);
    } else if (size > v->size) {
        rc = err_set(e, ERR_PRECONDITION, "the backing %s of volume %s has %lu bytes instead of %lu", path, name, v->size,
                     size);
        err_hint(e, "bring the backing back to its size; nothing is captured on a part of it");
    }
    if (rc) {
        close(fd);
        return rc;
    }
    v->fd = fd;
    if (size)
        v->size = size;
    snprintf(v->name, sizeof v->name, "%s", name);
    snprintf(v->path, sizeof v->path, "%s", path);
    return 0;
}

int volume_grow(struct volume *v, uint64_t size, struct err *e)
{
    uint64_t backing = 0;
    int rc = io_size(v->fd, &backing);
    if (rc)
        return err_sys(e, rc, "cannot tell the size of %s", v->path);
    if (size % BLOCK || size < volume_size(v) || size > backing) {
        err_set(e, ERR_PRECONDITION, "volume %s has %lu bytes and its backing %s has %lu: it cannot have %lu", v->name,
                volume_size(v), v->path, backing, size);
        err_hint(e, "a volume never becomes smaller, and its backing grows before it does");
        return ERR_PRECONDITION;
    }
    __atomic_store_n(&v->size, size, __ATOMIC_RELEASE);
    return 0;
}
