/* SPDX-License-Identifier: Apache-2.0
 *
 * A clone that has nearly no memory, and does not run yet, gets all of it.
 */
#include "helper.h"

#include <stdio.h>
#include <string.h>

/* Frames of which the guest has none yet; zeros, if they are holes of the memory. */
static void fill(struct domain *domain, int memory, uint64_t first, size_t count, bool hole)
{
    static xen_pfn_t frames[BATCH];
    uint8_t *pages;

    for (size_t i = 0; i < count; i++)
        frames[i] = first + i;
    if (xc_domain_populate_physmap_exact(domain->xc, domain->id, count, 0, 0, frames))
        fail_errno("The host has no memory for the clone");
    pages = map_to_write(domain, frames, count);
    if (hole)
        memset(pages, 0, count << PAGE_SHIFT);
    else
        read_memory(memory, first, count, pages);
    unmap_frames(domain, pages, count);
}

int populate(uint32_t id, int memory, int pages)
{
    static xen_pfn_t frames[BATCH];
    static unsigned char present[BATCH];
    struct domain domain;
    struct ranges ranges;
    uint64_t filled = 0;
    double started = now();

    open_domain(&domain, id);
    describe(&domain);
    ranges = read_ranges(pages, 1UL << 32);
    for (size_t i = 0; i < ranges.length; i++) {
        struct range range = ranges.list[i];

        for (uint64_t done = 0; done < range.count;) {
            size_t count = range.count - done < BATCH ? range.count - done : BATCH;
            size_t from = 0;
            bool hole;

            count = count_alike(memory, range.first + done, count, &hole);
            for (size_t j = 0; j < count; j++)
                frames[j] = range.first + done + j;
            find_present(&domain, frames, count, present);
            /* What came with its state is its own already. */
            while (from < count) {
                size_t to = from;

                while (to < count && present[to] == present[from])
                    to++;
                if (!present[from]) {
                    fill(&domain, memory, frames[from], to - from, hole);
                    filled += to - from;
                }
                from = to;
            }
            done += count;
        }
    }
    printf("{\"event\": \"populated\", \"pages\": %lu, \"seconds\": %.6f}\n", filled,
           now() - started);
    fflush(stdout);
    return 0;
}
