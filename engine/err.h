/* Errors: a function returns 0 or -errno, and the one that knows most fills in the message.
 *
 * Two codes beyond errno's meaning: ERR_DAMAGE for stored bytes that are not what was written, ERR_PRECONDITION for
 * something outside that must be mended first. They decide the exit code (err_exit_code).
 */
#ifndef PGCDP_ERR_H
#define PGCDP_ERR_H

#include <errno.h>

#define ERR_DAMAGE (-EBADMSG)
#define ERR_PRECONDITION (-ENOTRECOVERABLE)
#define ERR_USAGE (-EINVAL)

struct err {
    char message[768];
    char hint[384];
};

/* Sets the message (lower case, no full stop, object and number named) and returns `code`. */
int err_set(struct err *e, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The same with ": <strerror>" appended; `code` is -errno. */
int err_sys(struct err *e, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* One sentence: what to type or look at next. */
void err_hint(struct err *e, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* 2 usage, 5 damage, 6 precondition, else 1. */
int err_exit_code(int code);

#endif
