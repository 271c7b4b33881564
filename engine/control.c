#include "control.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "cleanup.h"

#define MAX_CONNECTIONS 32
#define MAX_LINE 65536

struct control {
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    int listener;
    pthread_t thread;
    control_handler handler;
    void *self;
    pthread_mutex_t lock;
    pthread_cond_t idle;
    int connections[MAX_CONNECTIONS]; /* -1: free */
    unsigned count;
    bool stop;
};

struct connection {
    struct control *control;
    unsigned slot;
    int fd;
};

static json_t *error_object(const struct err *e, const char *kind)
{
    json_t *hint = e->hint[0] ? json_string(e->hint) : json_null();
    return json_pack("{s:{s:s, s:s, s:o}}", "error", "kind", kind, "message", e->message, "hint", hint);
}

static json_t *answer(struct control *c, const char *line)
{
    struct err e = {.message = ""};
    const char *kind = "error";
    json_error_t bad;
    json_t *request = json_loads(line, 0, &bad), *reply;
    if (!json_is_object(request)) {
        err_set(&e, ERR_USAGE, "the request is not a JSON object");
        reply = error_object(&e, "usage");
    } else {
        reply = c->handler(c->self, request, &e, &kind);
        if (!reply)
            reply = error_object(&e, kind);
    }
    json_decref(request);
    return reply;
}

static bool send_line(int fd, const json_t *reply)
{
    CLEANUP_FREE char *text = json_dumps(reply, JSON_COMPACT);
    if (!text)
        return false;
    size_t length = strlen(text);
    text[length++] = '\n'; /* in the place of the final NUL */
    for (size_t sent = 0; sent < length;) {
        ssize_t n = send(fd, text + sent, length - sent, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        sent += (size_t)n;
    }
    return true;
}

static void serve(struct connection *k)
{
    CLEANUP_FREE char *line = malloc(MAX_LINE);
    size_t used = 0;
    while (line && used < MAX_LINE - 1) {
        ssize_t n = recv(k->fd, line + used, MAX_LINE - 1 - used, 0);
        if (n <= 0)
            return;
        used += (size_t)n;
        line[used] = '\0';
        char *end;
        while ((end = memchr(line, '\n', used))) {
            *end = '\0';
            json_t *reply = answer(k->control, line);
            bool sent = send_line(k->fd, reply);
            json_decref(reply);
            if (!sent)
                return;
            used -= (size_t)(end + 1 - line);
            memmove(line, end + 1, used);
        }
    }
}

static void *connection_main(void *arg)
{
    struct connection *k = arg;
    struct control *c = k->control;
    serve(k);
    close(k->fd);
    {
        HOLD_LOCK(&c->lock);
        c->connections[k->slot] = -1;
        c->count--;
        pthread_cond_signal(&c->idle);
    }
    free(k);
    return NULL;
}

static void accept_one(struct control *c)
{
    int fd = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    struct connection *k = malloc(sizeof *k);
    HOLD_LOCK(&c->lock);
    unsigned slot = 0;
    while (slot < MAX_CONNECTIONS && c->connections[slot] >= 0)
        slot++;
    pthread_t thread;
    if (!k || c->stop || slot == MAX_CONNECTIONS) {
        close(fd);
        free(k);
        return;
    }
    *k = (struct connection){.control = c, .slot = slot, .fd = fd};
    if (pthread_create(&thread, NULL, connection_main, k) != 0) {
        close(fd);
        free(k);
        return;
    }
    pthread_detach(thread);
    c->connections[slot] = fd;
    c->count++;
}

static void *listener_main(void *arg)
{
    struct control *c = arg;
    for (;;) {
        accept_one(c);
        HOLD_LOCK(&c->lock);
        if (c->stop)
            return NULL;
    }
}

int control_start(struct control **out, const char *path, control_handler handler, void *self, struct err *e)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        err_set(e, ERR_USAGE, "the control socket's path %s is longer than %zu bytes", path, sizeof address.sun_path - 1);
        err_hint(e, "choose a shorter PGCDP_ROOT");
        return ERR_USAGE;
    }
    struct control *c = calloc(1, sizeof *c);
    if (!c)
        return err_sys(e, -ENOMEM, "control socket");
    strcpy(c->path, path);
    strcpy(address.sun_path, path);
    c->handler = handler;
    c->self = self;
    memset(c->connections, -1, sizeof c->connections);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->idle, NULL);
    unlink(path); /* left by a dead process: the journal's lock says that there is no live one */
    mode_t mask = umask(0177);
    c->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int rc = c->listener < 0 || bind(c->listener, (struct sockaddr *)&address, sizeof address) < 0 ||
                     listen(c->listener, 16) < 0
                 ? -errno
                 : 0;
    umask(mask);
    if (rc == 0)
        rc = -pthread_create(&c->thread, NULL, listener_main, c);
    if (rc) {
        if (c->listener >= 0)
            close(c->listener);
        free(c);
        return err_sys(e, rc, "cannot listen at %s", path);
    }
    *out = c;
    return 0;
}

void control_stop(struct control *c)
{
    if (!c)
        return;
    {
        HOLD_LOCK(&c->lock);
        c->stop = true;
        shutdown(c->listener, SHUT_RDWR);
    }
    pthread_join(c->thread, NULL);
    pthread_mutex_lock(&c->lock);
    for (unsigned i = 0; i < MAX_CONNECTIONS; i++)
        if (c->connections[i] >= 0)
            shutdown(c->connections[i], SHUT_RD); /* an answer under way still goes out */
    while (c->count)
        pthread_cond_wait(&c->idle, &c->lock);
    pthread_mutex_unlock(&c->lock);
    close(c->listener);
    unlink(c->path);
    free(c);
}

long control_rss_kib(void)
{
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%*d %ld", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}
