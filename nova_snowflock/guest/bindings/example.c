/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counts the prime numbers below LIMIT in clones of this machine:
 *
 *     cc -std=c99 -o example example.c snowflock.c && ./example 4
 */
#include "snowflock.h"

#include <stdio.h>
#include <stdlib.h>

#define LIMIT 100000

static int is_prime(int number)
{
    for (int i = 2; i <= number / i; i++)
        if (number % i == 0)
            return 0;
    return number >= 2;
}

static int complain(const char *call)
{
    fprintf(stderr, "%s: %s\n", call, sf_error());
    return 1;
}

/* In a clone: every n-th number is its. */
static int work(int clone_id, int n)
{
    char result[32];
    int count = 0;

    for (int number = clone_id; number < LIMIT; number += n)
        count += is_prime(number);
    sf_exit(0, result, (size_t)snprintf(result, sizeof(result), "%d", count));
    return complain("sf_exit");
}

int main(int argc, char **argv)
{
    struct sf_ticket ticket;
    struct sf_joined *joined;
    size_t count;
    long total = 0;
    int clone_id, failed = 0;

    if (sf_request_ticket(argc > 1 ? atoi(argv[1]) : 2, &ticket))
        return complain("sf_request_ticket");
    clone_id = sf_clone(&ticket);
    if (clone_id < 0)
        return complain("sf_clone");
    if (clone_id > 0)
        return work(clone_id, ticket.n);
    if (sf_join(&ticket, &joined, &count))
        return complain("sf_join");
    for (size_t i = 0; i < count; i++) {
        char text[32];

        if (joined[i].status == 0) {
            snprintf(text, sizeof(text), "%.*s", (int)joined[i].size,
                     joined[i].result ? (const char *)joined[i].result : "");
            total += atol(text);
        } else {
            fprintf(stderr, "clone %d: %s\n", joined[i].clone_id,
                    joined[i].error ? joined[i].error : "failed");
            failed = 1;
        }
    }
    printf("%ld prime numbers, counted by %zu clones\n", total, count);
    sf_joined_free(joined, count);
    return failed;
}
