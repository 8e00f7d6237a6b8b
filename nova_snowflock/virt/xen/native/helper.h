/* SPDX-License-Identifier: Apache-2.0
 *
 * snowflock-xen: what the Xen back end does with libxenctrl, whose structures differ with each
 * release of Xen: built on the host that it runs on. docs/xen.rst tells what it is asked and says.
 */
#ifndef SNOWFLOCK_XEN_HELPER_H
#define SNOWFLOCK_XEN_HELPER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xenguest.h>
#include <xenstore.h>

#define PAGE_SHIFT 12
#define PAGE_BYTES (1UL << PAGE_SHIFT)
/* Pages that are looked at, mapped or read at a time. */
#define BATCH 1024UL

struct domain {
    uint32_t id;
    xc_interface *xc;
    xenforeignmemory_handle *memory;
    struct xs_handle *store;
    char path[64]; /* of its own in xenstore */
};

/* Guest frames, one after another. */
struct range {
    uint64_t first;
    uint64_t count;
};

struct ranges {
    struct range *list;
    size_t length;
};

/* Say why, and end: what is to be undone is undone by handlers of exit(). */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same, with what errno means. */
_Noreturn void fail_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Likewise, where Xen cannot do it, and nothing was done. */
_Noreturn void refuse(const char *why);

void open_domain(struct domain *domain, uint32_t id);
xc_dominfo_t describe(const struct domain *domain);
double now(void);

/* Wait for a line on standard input, which is WORD; end if there is none any more. */
void await(const char *word);

/* Say of COUNT frames which are memory. */
void find_present(const struct domain *domain, const xen_pfn_t *frames, size_t count,
                  unsigned char *present);

/* Map COUNT frames. Those that are holes, or a device's, have an error. */
uint8_t *map_frames(const struct domain *domain, int protection, const xen_pfn_t *frames,
                    size_t count, int *errors);
/* Map up to BATCH frames that are all to be there. For one thread. */
uint8_t *map_to_write(const struct domain *domain, const xen_pfn_t *frames, size_t count);
void unmap_frames(const struct domain *domain, uint8_t *pages, size_t count);

struct ranges read_ranges(int fd, uint64_t limit);

/* How many of COUNT frames from FRAME on are holes of the image's memory, which are zero; or if the
 * first is none, how many are not.
 */
size_t count_alike(int memory, uint64_t frame, size_t count, bool *hole);

/* COUNT pages of the image's memory from FRAME on. */
void read_memory(int memory, uint64_t frame, size_t count, uint8_t *pages);

/* The commands. MEMORY, STATE and PAGES are descriptors. */
int freeze(uint32_t id, int memory, int state, uint64_t most_dirty);
int resume(uint32_t id, unsigned long seconds);
int populate(uint32_t id, int memory, int pages);
int page(uint32_t id, int memory, int pages);
int stopped(void);

#endif
