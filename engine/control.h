/* The control socket: a JSON object a line in, a JSON object a line out, any number of lines a connection. */
#ifndef PGCDP_CONTROL_H
#define PGCDP_CONTROL_H

#include <jansson.h>

#include "err.h"

struct control;

/* Answers one request; returns a new object, or NULL after filling in `e` and `kind` (for {"error": ...}). Any thread. */
typedef json_t *(*control_handler)(void *self, const json_t *request, struct err *e, const char **kind);

/* Listens at `path` (0600) with a thread of its own, and one for each connection. */
int control_start(struct control **out, const char *path, control_handler handler, void *self, struct err *e);

/* Closes the door and waits for the connections' threads; unlinks the socket. */
void control_stop(struct control *c);

/* What a status tells of this process: resident memory. */
long control_rss_kib(void);

#endif
