/* SPDX-License-Identifier: Apache-2.0 */
/* Calls the C library as its arguments say, and prints what comes back. */
#include "snowflock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *text(const char *string)
{
    return string ? string : "-";
}

static int told(int status)
{
    if (status < 0)
        printf("%d %s\n", status, sf_error());
    return status;
}

static void join(const struct sf_ticket *ticket)
{
    struct sf_joined *joined;
    size_t count;

    if (told(sf_join(ticket, &joined, &count)))
        return;
    for (size_t i = 0; i < count; i++) {
        unsigned long sum = 0;

        for (size_t j = 0; j < joined[i].size; j++)
            sum = (sum * 31 + joined[i].result[j]) % 1000003;
        printf("%d %d %s %zu %lu\n", joined[i].clone_id, joined[i].status, text(joined[i].error),
               joined[i].size, sum);
    }
    sf_joined_free(joined, count);
}

static void info(void)
{
    struct sf_info info;

    if (told(sf_info(&info)))
        return;
    printf("%s,%s,%s,%d,%d\n", info.server, info.fork, info.parent, info.clone_id, info.limit);
    for (size_t i = 0; i < info.params_count; i++)
        printf("%s=%s\n", info.params[i].name, info.params[i].value);
    for (size_t i = 0; i < info.tickets_count; i++)
        printf("%s,%d,%s\n", info.tickets[i].ticket.id, info.tickets[i].ticket.n,
               info.tickets[i].state);
    sf_info_free(&info);
}

static void leave(int status, size_t size)
{
    unsigned char *result = malloc(size + 1);

    for (size_t i = 0; i < size; i++)
        result[i] = (unsigned char)(i * i % 251);
    told(sf_exit(status, result, size));
    free(result);
}

int main(int argc, char **argv)
{
    const char *call = argv[1];
    const char *argument = argc > 2 ? argv[2] : "";
    struct sf_ticket ticket = {"", 0};
    struct sf_checkpoint checkpoint = {"", 0};
    struct sf_param params[] = {{"a", argc > 3 ? argv[3] : ""}, {"b\"", ""}};
    size_t count = argc > 3 ? 2 : 0;

    snprintf(ticket.id, sizeof(ticket.id), "%s", argument);
    snprintf(checkpoint.id, sizeof(checkpoint.id), "%s", argument);
    if (!strcmp(call, "request_ticket")) {
        if (!told(sf_request_ticket(atoi(argument), &ticket)))
            printf("%s %d\n", ticket.id, ticket.n);
    } else if (!strcmp(call, "clone")) {
        int clone_id = count ? sf_clone_with(&ticket, params, count) : sf_clone(&ticket);

        if (told(clone_id) >= 0)
            printf("%d\n", clone_id);
    } else if (!strcmp(call, "checkpoint_parent")) {
        int clone_id = count ? sf_checkpoint_parent_with(&checkpoint, params, count)
                             : sf_checkpoint_parent(&checkpoint);

        if (told(clone_id) >= 0)
            printf("%s %d %d\n", checkpoint.id, checkpoint.clone_id, clone_id);
    } else if (!strcmp(call, "create_clones")) {
        snprintf(ticket.id, sizeof(ticket.id), "%s", argv[3]);
        printf("%d\n", told(sf_create_clones(&checkpoint, &ticket)));
    } else if (!strcmp(call, "kill")) {
        printf("%d\n", told(sf_kill(&ticket)));
    } else if (!strcmp(call, "release")) {
        printf("%d\n", told(sf_release(&checkpoint)));
    } else if (!strcmp(call, "exit")) {
        leave(atoi(argument), (size_t)atol(argv[3]));
    } else if (!strcmp(call, "join")) {
        for (int times = argc > 3 ? atoi(argv[3]) : 1; times; times--)
            join(&ticket);
    } else if (!strcmp(call, "info")) {
        for (int times = argc > 3 ? atoi(argv[3]) : 1; times; times--)
            info();
    } else {
        return 2;
    }
    return 0;
}
