#include "err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int err_set(struct err *e, int code, const char *format, ...)
{
    if (e) {
        va_list args;
        va_start(args, format);
        vsnprintf(e->message, sizeof e->message, format, args);
        va_end(args);
        e->hint[0] = '\0';
    }
    return code;
}

int err_sys(struct err *e, int code, const char *format, ...)
{
    if (e) {
        va_list args;
        va_start(args, format);
        vsnprintf(e->message, sizeof e->message, format, args);
        va_end(args);
        size_t used = strlen(e->message);
        snprintf(e->message + used, sizeof e->message - used, ": %s", strerror(-code));
        e->hint[0] = '\0';
    }
    return code;
}

void err_hint(struct err *e, const char *format, ...)
{
    if (e) {
        va_list args;
        va_start(args, format);
        vsnprintf(e->hint, sizeof e->hint, format, args);
        va_end(args);
    }
}

int err_exit_code(int code)
{
    if (code >= 0)
        return 0;
    if (code == ERR_DAMAGE)
        return 5;
    if (code == ERR_PRECONDITION)
        return 6;
    if (code == ERR_USAGE)
        return 2;
    return 1;
}
