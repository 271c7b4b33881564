/* See held.h. */
#include "held.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "checksum.h"
#include "cleanup.h"

#define PATIENCE_MS 5000

static int address_of(struct sockaddr_un *out, const char *path, struct err *e)
{
    *out = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof out->sun_path) {
        err_set(e, ERR_USAGE, "the holder's socket %s is longer than %zu bytes", path, sizeof out->sun_path - 1);
        err_hint(e, "choose a shorter PGCDP_ROOT");
        return ERR_USAGE;
    }
    strcpy(out->sun_path, path);
    return 0;
}

/* Whether root is at the other end. */
static bool is_root(int socket)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == 0;
}

bool held_ended(int fuse)
{
    struct pollfd look = {.fd = fuse, .events = 0};
    return poll(&look, 1, 0) == 1 && (look.revents & (POLLERR | POLLHUP | POLLNVAL));
}

/* ---- the capture process ---- */

/* Both descriptors, or -errno. */
static int receive(int socket, int out[2])
{
    struct fmt_held hello;
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = &hello, .iov_len = sizeof hello};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    struct pollfd look = {.fd = socket, .events = POLLIN};
    if (poll(&look, 1, PATIENCE_MS) != 1)
        return -ETIMEDOUT;
    ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&message);
    if (n < 0)
        return -errno;
    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(2 * sizeof(int)))
        return -EPROTO;
    memcpy(out, CMSG_DATA(c), 2 * sizeof(int));
    bool known = n == (ssize_t)sizeof hello && memcmp(hello.magic, FMT_HELD_MAGIC, sizeof hello.magic) == 0 &&
                 hello.version == FORMAT_VERSION;
    return known ? 0 : -EPROTO;
}

static int ask(const char *path, int out[2], struct err *e)
{
    struct sockaddr_un address;
    int rc = address_of(&address, path, e);
    if (rc)
        return rc;
    CLEANUP_CLOSE int socket_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (socket_fd < 0)
        return err_sys(e, -errno, "cannot make a socket");
    rc = connect(socket_fd, (struct sockaddr *)&address, sizeof address) < 0 ? -errno : 0;
    if (rc == 0 && !is_root(socket_fd))
        rc = -EACCES;
    if (rc == 0)
        rc = receive(socket_fd, out);
    if (rc) {
        err_sys(e, rc, "no holder gives its descriptors at %s", path);
        err_hint(e, "pgcdp up starts one");
        return ERR_PRECONDITION;
    }
    return 0;
}

int held_get(struct held **out, const char *path, struct err *e)
{
    int fds[2] = {-1, -1};
    struct held *h = malloc(sizeof *h);
    if (!h)
        return err_sys(e, -ENOMEM, "holder");
    int rc = ask(path, fds, e);
    *h = (struct held){.fuse = fds[0], .note_fd = fds[1]};
    if (rc == 0 && held_ended(h->fuse)) {
        rc = err_set(e, ERR_PRECONDITION, "the connection that the holder at %s keeps has ended", path);
        err_hint(e, "pgcdp up clears away what is left and begins another one");
    }
    void *note = rc ? MAP_FAILED : mmap(NULL, FMT_HELD_NOTE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, h->note_fd, 0);
    if (rc == 0 && note == MAP_FAILED)
        rc = err_sys(e, -errno, "cannot map the holder's note");
    if (rc) {
        held_close(h);
        return rc;
    }
    h->note = note;
    *out = h;
    return 0;
}

static uint64_t note_checksum(const struct fmt_held_note *n)
{
    return checksum_zeroed(n, FMT_HELD_NOTE_AGREED, offsetof(struct fmt_held_note, checksum));
}

int held_agreed(const struct held *h, bool *agreed, struct err *e)
{
    static const char nothing[8];
    const struct fmt_held_note *n = h->note;
    *agreed = false;
    if (memcmp(n->magic, nothing, sizeof nothing) == 0)
        return 0;
    if (memcmp(n->magic, FMT_HELD_NOTE_MAGIC, sizeof n->magic) != 0 || n->version != FORMAT_VERSION ||
        n->init_length > FMT_HELD_NOTE_INIT || n->answer_length > FMT_HELD_NOTE_INIT || n->checksum != note_checksum(n)) {
        err_set(e, ERR_PRECONDITION, "the holder's note is of another version, or not whole: its connection cannot be taken over");
        err_hint(e, "pgcdp down and pgcdp up begin another one");
        return ERR_PRECONDITION;
    }
    *agreed = true;
    return 0;
}

int held_agree(struct held *h, const void *init, size_t init_length, const void *answer, size_t answer_length, struct err *e)
{
    struct fmt_held_note *n = h->note;
    if (init_length > FMT_HELD_NOTE_INIT || answer_length > FMT_HELD_NOTE_INIT)
        return err_set(e, -EMSGSIZE, "FUSE_INIT of %zu and %zu bytes has no room in the holder's note", init_length, answer_length);
    n->version = FORMAT_VERSION;
    n->init_length = (uint32_t)init_length;
    n->answer_length = (uint32_t)answer_length;
    memcpy(n->init, init, init_length);
    memcpy(n->answer, answer, answer_length);
    uint64_t magic;
    memcpy(&magic, FMT_HELD_NOTE_MAGIC, sizeof magic);
    struct fmt_held_note whole = *n; /* what the checksum is of: the magic comes last of all */
    memcpy(whole.magic, FMT_HELD_NOTE_MAGIC, sizeof whole.magic);
    n->checksum = note_checksum(&whole);
    __atomic_store_n((uint64_t *)(void *)n->magic, magic, __ATOMIC_RELEASE);
    return 0;
}

uint64_t held_captures(const struct held *h) { return __atomic_load_n(&h->note->captures, __ATOMIC_RELAXED); }

void held_close(struct held *h)
{
    if (!h)
        return;
    if (h->note)
        munmap(h->note, FMT_HELD_NOTE_BYTES);
    if (h->fuse >= 0)
        close(h->fuse);
    if (h->note_fd >= 0)
        close(h->note_fd);
    free(h);
}

/* ---- the holder ---- */

int held_listen(const char *path, struct err *e)
{
    struct sockaddr_un address;
    int rc = address_of(&address, path, e);
    if (rc)
        return rc;
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0)
        return err_sys(e, -errno, "cannot make a socket");
    unlink(path); /* left by a dead holder: the lock says that there is no live one */
    mode_t mask = umask(0177);
    rc = bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 16) < 0 ? -errno : 0;
    umask(mask);
    if (rc == 0)
        return listener;
    close(listener);
    return err_sys(e, rc, "cannot listen at %s", path);
}

int held_hand_out(int listener, int fuse, int note)
{
    CLEANUP_CLOSE int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (peer < 0)
        return -errno;
    if (!is_root(peer))
        return 0;
    struct fmt_held hello = {.version = FORMAT_VERSION};
    memcpy(hello.magic, FMT_HELD_MAGIC, sizeof hello.magic);
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = {.space = {0}};
    struct iovec iov = {.iov_base = &hello, .iov_len = sizeof hello};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    int both[2] = {fuse, note};
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof both);
    memcpy(CMSG_DATA(c), both, sizeof both);
    if (sendmsg(peer, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0 || errno == EPIPE || errno == ECONNRESET)
        return 0; /* who only looked whether somebody holds has gone already */
    return -errno;
}
