#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

static void log_line(const char *level, const char *format, va_list args)
{
    char line[1024];
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    vsnprintf(line, sizeof line, format, args);
    /* One call, so that lines of several threads do not mix. */
    fprintf(stderr, "%04d-%02d-%02dT%02d:%02d:%02d.%06ldZ %s %s\n", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
            utc.tm_hour, utc.tm_min, utc.tm_sec, now.tv_nsec / 1000, level, line);
}

#define LOG_AT(level)            \
    do {                         \
        va_list args;            \
        va_start(args, format);  \
        log_line(level, format, args); \
        va_end(args);            \
    } while (0)

void log_info(const char *format, ...) { LOG_AT("info"); }
void log_warn(const char *format, ...) { LOG_AT("warning"); }
void log_error(const char *format, ...) { LOG_AT("error"); }
