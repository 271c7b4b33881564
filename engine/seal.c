/* See seal.h. */
#include "seal.h"

#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define MOST_NAMED 128u

static struct {
    uint8_t key[SEAL_KEY];
    bool given;
} data_key;

struct seal {
    EVP_CIPHER_CTX *context;
};

int seal_take_key(int fd, struct err *e)
{
    uint8_t bytes[SEAL_KEY + 1];
    size_t got = 0;
    ssize_t n = 1;
    while (got < sizeof bytes && n > 0) {
        n = read(fd, bytes + got, sizeof bytes - got);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            got += (size_t)n;
    }
    int failed = n < 0 ? -errno : 0;
    close(fd);
    if (failed)
        return err_sys(e, failed, "cannot read the key of the store from descriptor %d", fd);
    if (got != SEAL_KEY)
        return err_set(e, ERR_USAGE, "descriptor %d gives %zu bytes as the key of the store instead of %u", fd, got, SEAL_KEY);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0}); /* no core file has it, nor what it opens */
    mlock(&data_key, sizeof data_key); /* refused for a user without privileges: then the kernel may swap it out */
    memcpy(data_key.key, bytes, SEAL_KEY);
    OPENSSL_cleanse(bytes, sizeof bytes);
    data_key.given = true;
    return 0;
}

bool seal_has_key(void) { return data_key.given; }

int seal_derive(const char *label, const void *more, size_t length, uint8_t *key, struct err *e)
{
    uint8_t named[MOST_NAMED];
    size_t begin = strlen(label);
    unsigned made = 0;
    if (begin + length + 1 > sizeof named)
        return err_set(e, -E2BIG, "the key %s is named by too much", label);
    memcpy(named, label, begin);
    memcpy(named + begin, more, length);
    named[begin + length] = 1;
    if (!HMAC(EVP_sha256(), data_key.key, SEAL_KEY, named, begin + length + 1, key, &made) || made != SEAL_KEY)
        return err_set(e, -ENOMEM, "no memory for a key of the store");
    return 0;
}

struct seal *seal_new(void)
{
    struct seal *s = calloc(1, sizeof *s);
    if (s && !(s->context = EVP_CIPHER_CTX_new())) {
        free(s);
        return NULL;
    }
    return s;
}

void seal_free(struct seal *s)
{
    if (!s)
        return;
    EVP_CIPHER_CTX_free(s->context);
    free(s);
}

int seal_use(struct seal *s, const uint8_t *key)
{
    return EVP_DecryptInit_ex(s->context, EVP_aes_256_gcm(), NULL, key, NULL) == 1 ? 0 : -ENOMEM;
}

bool seal_open(struct seal *s, const uint8_t *nonce, const uint8_t *tag, const void *bound_to, size_t bound_length,
               const uint8_t *sealed, size_t length, uint8_t *to)
{
    int part;
    uint8_t expected[SEAL_TAG];
    memcpy(expected, tag, sizeof expected); /* EVP takes no const */
    return length <= INT_MAX && EVP_DecryptInit_ex(s->context, NULL, NULL, NULL, nonce) == 1 &&
           EVP_DecryptUpdate(s->context, NULL, &part, bound_to, (int)bound_length) == 1 &&
           EVP_DecryptUpdate(s->context, to, &part, sealed, (int)length) == 1 &&
           EVP_CIPHER_CTX_ctrl(s->context, EVP_CTRL_AEAD_SET_TAG, sizeof expected, expected) == 1 &&
           EVP_DecryptFinal_ex(s->context, to + part, &part) == 1;
}
