/* One line a message on stderr, with time and level; the agent keeps stderr in a file. */
#ifndef PGCDP_LOG_H
#define PGCDP_LOG_H

void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
