/* What an encrypted store seals with (FORMAT.md 7): AES-256-GCM under keys that its data key gives.
 *
 * An engine reads one store: it is given that data key once, through a pipe, before any thread is started. It is never
 * written anywhere, and the engine writes no core file (RLIMIT_CORE).
 */
#ifndef PGCDP_SEAL_H
#define PGCDP_SEAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

#define SEAL_KEY 32u
#define SEAL_NONCE 12u
#define SEAL_TAG 16u
#define SEAL_OVERHEAD (SEAL_NONCE + SEAL_TAG)

struct seal; /* a key that unseals; one thread at a time */

/* Takes the data key from a descriptor, which has it and nothing else, and closes that. ERR_USAGE or -errno. */
int seal_take_key(int fd, struct err *e);

/* Whether this engine was given one. */
bool seal_has_key(void);

/* The key for one purpose, SEAL_KEY bytes: HKDF-Expand with SHA-256 of what is named by `label` and `more`. */
int seal_derive(const char *label, const void *more, size_t length, uint8_t *key, struct err *e);

/* NULL: no memory. */
struct seal *seal_new(void);
void seal_free(struct seal *s);

/* From now on it unseals with this key. */
int seal_use(struct seal *s, const uint8_t *key);

/* `length` bytes; `to` may be `sealed`. False when they are not what was sealed under this nonce, for this place. */
bool seal_open(struct seal *s, const uint8_t *nonce, const uint8_t *tag, const void *bound_to, size_t bound_length,
               const uint8_t *sealed, size_t length, uint8_t *to);

#endif
