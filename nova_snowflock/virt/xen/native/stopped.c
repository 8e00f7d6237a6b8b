/* SPDX-License-Identifier: Apache-2.0
 *
 * Guests that have stopped by themselves, and which Xen keeps until somebody ends them.
 */
#include "helper.h"

#include <stdio.h>

#define LISTED 64

/* Why it is to be ended, or started anew; NULL if it is not: it runs, or has suspended. */
static const char *reason(const xc_dominfo_t *info)
{
    /* libxc does not call that a shutdown (xc_domain.c, xc_domain_getinfo). */
    if (info->crashed && !info->dying)
        return "crash";
    if (!info->shutdown || info->dying)
        return NULL;
    switch (info->shutdown_reason) {
    case SHUTDOWN_poweroff:
        return "poweroff";
    case SHUTDOWN_reboot:
        return "reboot";
    default:
        return NULL;
    }
}

int stopped(void)
{
    static xc_dominfo_t infos[LISTED];
    const char *separator = "";
    xc_interface *xc = xc_interface_open(NULL, NULL, 0);
    uint32_t next = 1; /* domain 0 is none */
    int count;

    if (!xc)
        fail_errno("Xen cannot be asked");
    printf("{\"event\": \"listed\", \"domains\": {");
    do {
        count = xc_domain_getinfo(xc, next, LISTED, infos);
        for (int i = 0; i < count; i++) {
            const char *why = reason(&infos[i]);

            next = infos[i].domid + 1;
            if (why) {
                printf("%s\"%u\": \"%s\"", separator, infos[i].domid, why);
                separator = ", ";
            }
        }
    } while (count == LISTED);
    puts("}}");
    fflush(stdout);
    return 0;
}
