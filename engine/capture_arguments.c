/* The command line of `pgcdp-engine capture`. */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "capture_process.h"
#include "command.h"
#include "util.h"

static const char USAGE[] =
    "usage: pgcdp-engine capture --set-id HEX --journal DIR [--create] --fuse DIR --control SOCKET [--holder SOCKET]\n"
    "                            [--segment-bytes N] [--journal-limit N] [--on-full stall|track] [--put-back]\n"
    "                            NAME[:BYTES]=PATH ...\n"
    "With --holder the FUSE connection is the one that pgcdp-engine hold keeps there, mounted at DIR.\n"
    "BYTES of the backing are shown; without, all of it. With --put-back the journal may hold writes to one volume more,\n"
    "which is given up: they are not replayed.\n";

static int parse_set_id(const char *text, uint8_t out[16])
{
    if (strlen(text) != 32 || strspn(text, "0123456789abcdefABCDEF") != 32)
        return -EINVAL;
    for (int i = 0; i < 16; i++) {
        char pair[3] = {text[2 * i], text[2 * i + 1], '\0'};
        out[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return 0;
}

int capture_arguments(struct capture *c, int argc, char **argv, int *first, struct err *e)
{
    static const struct option OPTIONS[] = {{"set-id", required_argument, NULL, 's'},
                                            {"journal", required_argument, NULL, 'j'},
                                            {"create", no_argument, NULL, 'c'},
                                            {"segment-bytes", required_argument, NULL, 'b'},
                                            {"journal-limit", required_argument, NULL, 'l'},
                                            {"on-full", required_argument, NULL, 'o'},
                                            {"put-back", no_argument, NULL, 'p'},
                                            {"fuse", required_argument, NULL, 'f'},
                                            {"control", required_argument, NULL, 'k'},
                                            {"holder", required_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
        int rc = 0;
        switch (option) {
        case 's': rc = parse_set_id(optarg, c->set_id); c->has_set_id = true; break;
        case 'j': c->journal = optarg; break;
        case 'c': c->create = true; break;
        case 'p': c->put_back = true; break;
        case 'o':
            c->track = strcmp(optarg, "track") == 0;
            rc = c->track || strcmp(optarg, "stall") == 0 ? 0 : -EINVAL;
            break;
        case 'b': rc = command_number(optarg, &c->segment_bytes) ? 0 : -EINVAL; break;
        case 'l': rc = command_number(optarg, &c->limit) ? 0 : -EINVAL; break;
        case 'f': c->fuse_dir = optarg; break;
        case 'k': c->socket = optarg; break;
        case 'h': c->holder = optarg; break;
        default: return err_set(e, ERR_USAGE, "unknown option\n%s", USAGE);
        }
        if (rc)
            return err_set(e, ERR_USAGE, "\"%s\" is not a valid value", optarg);
    }
    if (!c->has_set_id || !c->journal || !c->fuse_dir || !c->socket || optind == argc)
        return err_set(e, ERR_USAGE, "an option is missing\n%s", USAGE);
    if (c->segment_bytes < ((uint64_t)8 << 20) || c->segment_bytes % BLOCK)
        return err_set(e, ERR_USAGE, "--segment-bytes is %lu: at least 8388608 and a multiple of 4096", c->segment_bytes);
    if (c->limit < 4 * c->segment_bytes)
        return err_set(e, ERR_USAGE, "--journal-limit is %lu: at least four segments of %lu", c->limit, c->segment_bytes);
    if (c->limit / c->segment_bytes >= JW_MOST_SEGMENTS)
        return err_set(e, ERR_USAGE, "--journal-limit is %lu: at most %u segments of %lu", c->limit, JW_MOST_SEGMENTS - 1,
                       c->segment_bytes);
    for (int i = optind; i < argc; i++)
        if (!strchr(argv[i], '='))
            return err_set(e, ERR_USAGE, "\"%s\" is not NAME[:BYTES]=PATH", argv[i]);
    *first = optind;
    return 0;
}
