/* SPDX-License-Identifier: Apache-2.0
 *
 * The commands, and what they have in common.
 */
#define _GNU_SOURCE /* SEEK_DATA */
#include "helper.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void say(const char *event, const char *why, const char *errors)
{
    /* JSON; none of these sentences has a character that it would have written otherwise. */
    printf("{\"event\": \"%s\", \"message\": \"%s%s%s\"}\n", event, why, *errors ? ": " : "",
           errors);
    fflush(stdout);
}

void fail(const char *format, ...)
{
    char why[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(why, sizeof(why), format, arguments);
    va_end(arguments);
    say("error", why, "");
    exit(1);
}

void fail_errno(const char *format, ...)
{
    int number = errno;
    char why[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(why, sizeof(why), format, arguments);
    va_end(arguments);
    say("error", why, strerror(number));
    exit(1);
}

void refuse(const char *why)
{
    say("refused", why, strerror(errno));
    exit(1);
}

double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

void open_domain(struct domain *domain, uint32_t id)
{
    domain->id = id;
    domain->xc = xc_interface_open(NULL, NULL, 0);
    if (!domain->xc)
        fail_errno("Xen cannot be asked");
    domain->memory = xenforeignmemory_open(NULL, 0);
    if (!domain->memory)
        fail_errno("Guests' memory cannot be mapped");
    domain->store = xs_open(0);
    if (!domain->store)
        fail_errno("xenstore cannot be asked");
    snprintf(domain->path, sizeof(domain->path), "/local/domain/%u", id);
}

xc_dominfo_t describe(const struct domain *domain)
{
    xc_dominfo_t info;

    if (xc_domain_getinfo(domain->xc, domain->id, 1, &info) != 1 || info.domid != domain->id ||
        info.dying)
        fail("There is no domain %u", domain->id);
    return info;
}

void await(const char *word)
{
    char line[32];

    if (!fgets(line, sizeof(line), stdin))
        exit(0); /* who asked has ended, or wants no more */
    line[strcspn(line, "\n")] = '\0';
    if (strcmp(line, word))
        fail("It was not asked to %s", word);
}

/* libxenguest's save and restore are made with this, too; only its declaration is not public
 * (tools/libs/ctrl/xc_private.h). It replaces each frame by its type. */
int xc_get_pfn_type_batch(xc_interface *xc, uint32_t domain, unsigned int count, xen_pfn_t *frames);

void find_present(const struct domain *domain, const xen_pfn_t *frames, size_t count,
                  unsigned char *present)
{
    static xen_pfn_t types[BATCH];

    memcpy(types, frames, count * sizeof(*frames));
    if (xc_get_pfn_type_batch(domain->xc, domain->id, count, types))
        fail_errno("The kinds of the guest's pages cannot be read");
    for (size_t i = 0; i < count; i++) {
        uint32_t type = types[i] & XEN_DOMCTL_PFINFO_LTAB_MASK;

        present[i] = type != XEN_DOMCTL_PFINFO_XTAB && type != XEN_DOMCTL_PFINFO_BROKEN &&
                     type != XEN_DOMCTL_PFINFO_XALLOC;
    }
}

uint8_t *map_frames(const struct domain *domain, int protection, const xen_pfn_t *frames,
                    size_t count, int *errors)
{
    uint8_t *pages = xenforeignmemory_map(domain->memory, domain->id, protection, count, frames,
                                          errors);

    if (!pages)
        fail_errno("The memory of domain %u cannot be mapped", domain->id);
    return pages;
}

uint8_t *map_to_write(const struct domain *domain, const xen_pfn_t *frames, size_t count)
{
    static int errors[BATCH];
    uint8_t *pages = map_frames(domain, PROT_READ | PROT_WRITE, frames, count, errors);

    for (size_t i = 0; i < count; i++)
        if (errors[i])
            fail("Frame %lu of domain %u cannot be mapped", frames[i], domain->id);
    return pages;
}

void unmap_frames(const struct domain *domain, uint8_t *pages, size_t count)
{
    xenforeignmemory_unmap(domain->memory, pages, count);
}

struct ranges read_ranges(int fd, uint64_t limit)
{
    struct ranges ranges = {NULL, 0};
    struct stat status;
    uint64_t end = 0;

    if (fstat(fd, &status))
        fail_errno("The list of the guest's pages cannot be read");
    ranges.length = status.st_size / sizeof(struct range);
    ranges.list = malloc(status.st_size + 1);
    if (!ranges.list)
        fail_errno("There is no memory for the list of the guest's pages");
    if (pread(fd, ranges.list, status.st_size, 0) != status.st_size)
        fail_errno("The list of the guest's pages cannot be read");
    for (size_t i = 0; i < ranges.length; i++) {
        struct range range = ranges.list[i];
        if (range.first < end || !range.count || range.first >= limit ||
            range.count > limit - range.first)
            fail("The list of the guest's pages makes no sense");
        end = range.first + range.count;
    }
    return ranges;
}

size_t count_alike(int memory, uint64_t frame, size_t count, bool *hole)
{
    off_t begin = frame << PAGE_SHIFT;
    off_t other = lseek(memory, begin, SEEK_DATA);
    size_t alike;

    *hole = other != begin;
    if (!*hole)
        other = lseek(memory, begin, SEEK_HOLE);
    else if (other < 0 && errno == ENXIO)
        return count;
    if (other < 0)
        fail_errno("What the image's memory has cannot be found out");
    alike = (other - begin) >> PAGE_SHIFT;
    return alike < count ? alike : count;
}

void read_memory(int memory, uint64_t frame, size_t count, uint8_t *pages)
{
    size_t wanted = count << PAGE_SHIFT, done = 0;

    while (done < wanted) {
        ssize_t got = pread(memory, pages + done, wanted - done, (frame << PAGE_SHIFT) + done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail_errno("The image's memory cannot be read");
        if (!got)
            fail("The image's memory ends before its frame %lu", frame);
        done += got;
    }
}

static void end(int signal)
{
    (void)signal;
    exit(1); /* which undoes what is to be undone */
}

static unsigned long number(const char *text)
{
    char *end;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 10);
    if (errno || *end || end == text)
        fail("%s is no number", text);
    return value;
}

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    unsigned long arguments[4] = {0};
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};

    /* Whoever asked may be gone when something is to be said. */
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < sizeof(signals) / sizeof(*signals); i++)
        signal(signals[i], end);
    for (int i = 2; i < argc && i < 6; i++)
        arguments[i - 2] = number(argv[i]);
    if (argc == 6 && !strcmp(command, "freeze"))
        return freeze(arguments[0], arguments[1], arguments[2], arguments[3]);
    if (argc == 4 && !strcmp(command, "resume"))
        return resume(arguments[0], arguments[1]);
    if (argc == 5 && !strcmp(command, "populate"))
        return populate(arguments[0], arguments[1], arguments[2]);
    if (argc == 5 && !strcmp(command, "page"))
        return page(arguments[0], arguments[1], arguments[2]);
    if (argc == 2 && !strcmp(command, "stopped"))
        return stopped();
    fputs("usage: snowflock-xen freeze DOMAIN MEMORY STATE LIMIT | resume DOMAIN SECONDS |"
          " populate|page DOMAIN MEMORY PAGES | stopped\n",
          stderr);
    return 2;
}
