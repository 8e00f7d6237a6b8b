/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SnowFlock's API for the programs in a guest: they fork the machine that they run on.
 *
 * C99, for Linux, without dependencies: compile snowflock.c with the program. Calls wait as long as
 * it takes and may be made by several threads. What they return is negative if they failed: one of
 * enum sf_status; sf_error() then says why, in words.
 */
#ifndef SNOWFLOCK_H
#define SNOWFLOCK_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum sf_status {
    SF_OK = 0,
    SF_REFUSED = -1,  /* not allowed: by the owner, by quota, by what the server is */
    SF_INVALID = -2,  /* the call, an argument or a ticket is wrong */
    SF_FAILED = -3,   /* it was tried and did not work; it may be tried again */
    SF_BUSY = -4,     /* too many requests at a time */
    SF_FORKED = -5,   /* this is a clone, and its parent had asked */
    SF_OFFLINE = -6,  /* the host knows nothing of forks */
    SF_NO_AGENT = -7, /* the agent cannot be reached or went away; it may have been done */
    SF_OTHER = -8     /* no proper answer, or no memory left */
};

#define SF_ID_SIZE 128 /* bytes of an ID, its end included */

/* Permission to be cloned once, n times at a time. */
struct sf_ticket {
    char id[SF_ID_SIZE];
    int n;
};

/* This machine as it was: clone_id is 0 in the parent, and 1.. in clones made of it. */
struct sf_checkpoint {
    char id[SF_ID_SIZE];
    int clone_id;
};

/* A clone that has ended: status is -1, and error says why, if it did not call sf_exit. */
struct sf_joined {
    int clone_id;
    int status;
    char *error;           /* NULL: none */
    unsigned char *result; /* NULL if size is 0 */
    size_t size;
};

/* What the clones are told. */
struct sf_param {
    const char *name;
    const char *value;
};

struct sf_held_ticket {
    struct sf_ticket ticket;
    char state[16]; /* "granted", "cloning", "cloned" */
};

/* What this server is; fork, parent (empty if it is no clone) and params are a clone's. */
struct sf_info {
    char server[SF_ID_SIZE];
    char fork[SF_ID_SIZE];
    char parent[SF_ID_SIZE];
    int clone_id;
    int limit; /* clones it may have at a time */
    struct sf_param *params;
    size_t params_count;
    struct sf_held_ticket *tickets;
    size_t tickets_count;
};

/* Ask for up to n clones. ticket->n says how many are granted. */
int sf_request_ticket(int n, struct sf_ticket *ticket);

/* Fork this machine. Returns 0 in the parent, and 1..ticket->n in the clones. */
int sf_clone(const struct sf_ticket *ticket);
int sf_clone_with(const struct sf_ticket *ticket, const struct sf_param *params, size_t count);

/* Keep this machine as it is now. Clones made of it later return from here as well. */
int sf_checkpoint_parent(struct sf_checkpoint *checkpoint);
int sf_checkpoint_parent_with(struct sf_checkpoint *checkpoint, const struct sf_param *params,
                              size_t count);

/* Make clones of a checkpoint. */
int sf_create_clones(const struct sf_checkpoint *checkpoint, const struct sf_ticket *ticket);

/* End this clone, and leave its parent a status (0..255) and a result. Returns if it failed. */
int sf_exit(int status, const void *result, size_t size);

/* Wait until all clones of a ticket have ended: an array by clone_id, for sf_joined_free. */
int sf_join(const struct sf_ticket *ticket, struct sf_joined **joined, size_t *count);
void sf_joined_free(struct sf_joined *joined, size_t count);

/* Stop all clones of a ticket. */
int sf_kill(const struct sf_ticket *ticket);

/* Keep a checkpoint no longer. */
int sf_release(const struct sf_checkpoint *checkpoint);

/* What this server is; for sf_info_free. */
int sf_info(struct sf_info *info);
void sf_info_free(struct sf_info *info);

/* Why the last call of this thread that failed did. Valid until its next. */
const char *sf_error(void);

#ifdef __cplusplus
}
#endif

#endif
