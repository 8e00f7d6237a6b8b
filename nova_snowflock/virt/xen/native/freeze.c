/* SPDX-License-Identifier: Apache-2.0
 *
 * The parent's memory is copied while it runs, in rounds: each copies what was written during the
 * one before. What is written last is copied while it is stopped, and its state read then.
 */
#include "helper.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <xen/hvm/params.h>
#include <xen/sched.h>

/* More is not gained by another round. */
#define FEW_PAGES 64
#define ROUNDS 30
#define LAST_ROUNDS 5
#define RESUMES 100
/* 4 TiB, as of descriptors; and what is not memory below 4 GiB, and some more. */
#define MOST_FRAMES (1UL << 30)
#define MOST_HOLES ((1UL << 20) + (1UL << 16))
#define SUSPEND_SECONDS 10.0
/* What has begun to suspend is waited for that long: nothing can be done but that. */
#define SUSPENDING_SECONDS 60.0

/* Of the records of a frozen guest's state. */
enum record { END, XEN_VERSION, CPUID, MSRS, TSC, HVM_CONTEXT, HVM_PARAMS, PAGE, PRESENT };

struct freezer {
    struct domain domain;
    uint64_t frames;        /* from 0 to the highest of the guest's; Xen fills whole words of bits */
    uint64_t pages;         /* that it had when it was last looked which are memory */
    uint8_t *copy;         /* a page for each of them, with holes for zeros */
    unsigned char *present; /* a byte for each of them */
    unsigned char *copied;
    xc_hypercall_buffer_t *dirty;
    unsigned long *dirty_bits;
    bool logs_dirty;
    bool suspended;
};

static struct freezer freezer;

/* When it ran again; 0 if it does not. */
static double resume_guest(struct freezer *self)
{
    double resumed;

    for (int i = 0; xc_domain_resume(self->domain.xc, self->domain.id, 1); i++) {
        if (i == RESUMES)
            return 0;
        usleep(10000);
    }
    resumed = now();
    self->suspended = false;
    /* Without it, xenstored tells nobody when the domain stops for good. */
    xs_resume_domain(self->domain.store, self->domain.id);
    return resumed;
}

static void undo(void)
{
    if (freezer.suspended)
        resume_guest(&freezer);
    if (freezer.logs_dirty)
        xc_shadow_control(freezer.domain.xc, freezer.domain.id, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0);
}

static void log_dirty(struct freezer *self)
{
    xc_interface *xc = self->domain.xc;

    if (xc_shadow_control(xc, self->domain.id, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0) < 0 &&
        /* It is on for video memory, or was left on. */
        (xc_shadow_control(xc, self->domain.id, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0) < 0 ||
         xc_shadow_control(xc, self->domain.id, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0) < 0))
        fail_errno("Xen does not log what the guest writes");
    self->logs_dirty = true;
}

static bool is_zero(const uint64_t *page)
{
    for (size_t i = 0; i < PAGE_BYTES / sizeof(*page); i += 8)
        if (page[i] | page[i + 1] | page[i + 2] | page[i + 3] | page[i + 4] | page[i + 5] |
            page[i + 6] | page[i + 7])
            return false;
    return true;
}

static void keep(struct freezer *self, xen_pfn_t frame, const void *page)
{
    void *place = self->copy + (frame << PAGE_SHIFT);

    if (!is_zero(page)) {
        memcpy(place, page, PAGE_BYTES);
        self->copied[frame] = 1;
    } else if (self->copied[frame]) {
        memset(place, 0, PAGE_BYTES);
    }
}

static void copy_batch(struct freezer *self, const xen_pfn_t *frames, size_t count)
{
    static int errors[BATCH];
    uint8_t *pages;

    if (!count)
        return;
    pages = map_frames(&self->domain, PROT_READ, frames, count, errors);
    for (size_t i = 0; i < count; i++) {
        self->present[frames[i]] = !errors[i];
        if (!errors[i])
            keep(self, frames[i], pages + (i << PAGE_SHIFT));
    }
    unmap_frames(&self->domain, pages, count);
}

/* Copy the pages whose bit is set; how many. */
static uint64_t copy_dirty(struct freezer *self)
{
    static xen_pfn_t frames[BATCH];
    size_t length = 0;
    uint64_t total = 0;
    uint64_t words = (self->frames + 63) / 64;

    for (uint64_t word = 0; word < words; word++) {
        for (unsigned long bits = self->dirty_bits[word]; bits; bits &= bits - 1) {
            frames[length++] = word * 64 + __builtin_ctzl(bits);
            total++;
            if (length == BATCH) {
                copy_batch(self, frames, length);
                length = 0;
            }
        }
    }
    copy_batch(self, frames, length);
    return total;
}

/* What was written since this was asked last; how many pages. */
static uint64_t find_dirty(struct freezer *self, unsigned int mode)
{
    xc_shadow_op_stats_t stats = {0, 0};

    if (xc_logdirty_control(self->domain.xc, self->domain.id, XEN_DOMCTL_SHADOW_OP_CLEAN,
                            self->dirty, self->frames, mode, &stats) != (long long)self->frames)
        fail_errno("What the guest has written cannot be found out");
    return stats.dirty_count;
}

/* Set the bits of the frames from FIRST to END that are memory; how many. */
static uint64_t set_present(struct freezer *self, uint64_t first, uint64_t end)
{
    static xen_pfn_t frames[BATCH];
    uint64_t found = 0;

    for (uint64_t frame = first; frame < end; frame++)
        frames[frame - first] = frame;
    find_present(&self->domain, frames, end - first, self->present + first);
    for (uint64_t frame = first; frame < end; frame++) {
        if (self->present[frame]) {
            self->dirty_bits[frame / 64] |= 1UL << (frame % 64);
            found++;
        }
    }
    return found;
}

/* Set the bits of all frames that are memory, and clear all others.
 *
 * Below 4 GiB there is a large hole, with few pages at its end. So they are looked for from the
 * bottom up to the hole, and then from the top down, until there can be no more.
 */
static void set_all(struct freezer *self)
{
    uint64_t bottom = 0, top = self->frames, found = 0, last = 1;
    uint64_t all = self->pages = describe(&self->domain).nr_pages;

    memset(self->dirty_bits, 0, (self->frames + 63) / 64 * 8);
    memset(self->present, 0, self->frames);
    while (bottom < top && found < all) {
        uint64_t count = top - bottom < BATCH ? top - bottom : BATCH;

        if (last) {
            last = set_present(self, bottom, bottom + count);
            found += last;
            bottom += count;
        } else {
            found += set_present(self, top - count, top);
            top -= count;
        }
    }
}

/* Whether the guest has given memory back or got some, which Xen does not log. */
static bool has_ballooned(struct freezer *self)
{
    xen_pfn_t frames;

    return describe(&self->domain).nr_pages != self->pages ||
           xc_domain_nr_gpfns(self->domain.xc, self->domain.id, &frames) || frames > self->frames;
}

/* Rounds until little is left; how many there were, and how much the last one copied. */
static unsigned int catch_up(struct freezer *self, unsigned int most, uint64_t *last)
{
    unsigned int rounds = 0;

    do {
        find_dirty(self, 0);
        *last = copy_dirty(self);
        rounds++;
    } while (*last > FEW_PAGES && rounds < most);
    return rounds;
}

/* Ask the guest no more to suspend; false if it has taken the request already. */
static bool withdraw(struct domain *domain)
{
    char node[96];

    snprintf(node, sizeof(node), "%s/control/shutdown", domain->path);
    for (;;) {
        xs_transaction_t transaction = xs_transaction_start(domain->store);
        unsigned int length;
        char *request = xs_read(domain->store, transaction, node, &length);
        bool pending = request && !strcmp(request, "suspend");

        free(request);
        if (pending)
            xs_write(domain->store, transaction, node, "", 0);
        if (xs_transaction_end(domain->store, transaction, !pending))
            return pending;
        if (errno != EAGAIN)
            return false;
    }
}

/* Have the guest suspend itself, as its drivers for Xen must. */
static void suspend(struct freezer *self)
{
    struct domain *domain = &self->domain;
    char node[96];
    double started = now(), limit = SUSPEND_SECONDS;

    snprintf(node, sizeof(node), "%s/control/shutdown", domain->path);
    if (!xs_watch(domain->store, "@releaseDomain", "suspend"))
        fail_errno("xenstore does not tell of stopped domains");
    if (!xs_write(domain->store, XBT_NULL, node, "suspend", 7))
        fail_errno("The guest cannot be asked to suspend");
    for (;;) {
        struct pollfd event = {xs_fileno(domain->store), POLLIN, 0};
        xc_dominfo_t info = describe(domain);
        char **watch;

        if (info.shutdown) {
            if (info.shutdown_reason != SHUTDOWN_suspend)
                fail("The guest has ended instead of suspending");
            self->suspended = true;
            break;
        }
        if (now() - started > limit) {
            if (limit == SUSPENDING_SECONDS)
                fail("The guest has begun to suspend, and does not end it");
            if (withdraw(domain))
                fail("The guest did not suspend within %.0f s", SUSPEND_SECONDS);
            /* It has taken the request, will suspend, and must be resumed then. */
            limit = SUSPENDING_SECONDS;
        }
        if (poll(&event, 1, 20) > 0 && (watch = xs_check_watch(domain->store)))
            free(watch);
    }
    xs_unwatch(domain->store, "@releaseDomain", "suspend");
}

static FILE *output;

static void put(enum record type, const void *data, uint32_t length)
{
    static const uint8_t padding[8];
    uint32_t header[2] = {type, length};

    if (fwrite(header, sizeof(header), 1, output) != 1 ||
        (length && fwrite(data, length, 1, output) != 1) ||
        (-length % 8 && fwrite(padding, -length % 8, 1, output) != 1) ||
        (type == END && fflush(output)))
        fail_errno("The guest's state cannot be written");
}

static void put_policy(struct freezer *self)
{
    xc_interface *xc = self->domain.xc;
    xc_cpu_policy_t *policy = xc_cpu_policy_init();
    xen_cpuid_leaf_t *leaves;
    xen_msr_entry_t *msrs;
    uint32_t leaf_count, msr_count;
    int version = xc_version(xc, XENVER_version, NULL);
    uint32_t numbers[2] = {version >> 16, version & 0xffff};

    if (version < 0 || !policy || xc_cpu_policy_get_size(xc, &leaf_count, &msr_count))
        fail_errno("What processor the guest sees cannot be read");
    leaves = calloc(leaf_count, sizeof(*leaves));
    msrs = calloc(msr_count, sizeof(*msrs));
    if (!leaves || !msrs || xc_cpu_policy_get_domain(xc, self->domain.id, policy) ||
        xc_cpu_policy_serialise(xc, policy, leaves, &leaf_count, msrs, &msr_count))
        fail_errno("What processor the guest sees cannot be read");
    put(XEN_VERSION, numbers, sizeof(numbers));
    put(CPUID, leaves, leaf_count * sizeof(*leaves));
    put(MSRS, msrs, msr_count * sizeof(*msrs));
    free(leaves);
    free(msrs);
    xc_cpu_policy_destroy(policy);
}

/* Those that libxc saves (xg_sr_save_x86_hvm.c), but for the rings of other tools. */
static const uint32_t params[] = {
    HVM_PARAM_STORE_PFN,
    HVM_PARAM_IOREQ_PFN,
    HVM_PARAM_BUFIOREQ_PFN,
    HVM_PARAM_PAGING_RING_PFN,
    HVM_PARAM_MONITOR_RING_PFN,
    HVM_PARAM_SHARING_RING_PFN,
    HVM_PARAM_VM86_TSS_SIZED,
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_ACPI_IOPORTS_LOCATION,
    HVM_PARAM_VIRIDIAN,
    HVM_PARAM_IDENT_PT,
    HVM_PARAM_VM_GENERATION_ID_ADDR,
    HVM_PARAM_IOREQ_SERVER_PFN,
    HVM_PARAM_NR_IOREQ_SERVER_PAGES,
    HVM_PARAM_X87_FIP_WIDTH,
    HVM_PARAM_MCA_CAP,
};
#define PARAMS (sizeof(params) / sizeof(*params))

struct stopped {
    uint8_t *context;
    int context_length;
    struct {
        uint32_t mode, khz;
        uint64_t nsec;
        uint32_t incarnation, none;
    } tsc;
};

/* CONTEXT is there already: nothing is allocated while the guest is stopped. */
static void read_stopped(struct freezer *self, struct stopped *state)
{
    xc_interface *xc = self->domain.xc;
    int length = xc_domain_hvm_getcontext(xc, self->domain.id, state->context,
                                          state->context_length);

    if (length < 0)
        fail_errno("The guest's state cannot be read");
    state->context_length = length;
    if (xc_domain_get_tsc_info(xc, self->domain.id, &state->tsc.mode, &state->tsc.nsec,
                               &state->tsc.khz, &state->tsc.incarnation))
        fail_errno("The guest's time stamp counter cannot be read");
}

static void put_params(struct freezer *self)
{
    uint64_t pairs[2 * PARAMS];
    uint32_t length = 0;

    for (size_t i = 0; i < PARAMS; i++) {
        uint64_t value;

        if (xc_hvm_param_get(self->domain.xc, self->domain.id, params[i], &value))
            fail_errno("The guest's parameter %u cannot be read", params[i]);
        if (value) {
            pairs[length++] = params[i];
            pairs[length++] = value;
        }
    }
    put(HVM_PARAMS, pairs, length * sizeof(*pairs));
}

/* What was written last, by the guest's own suspending, its resuming will need at once: among it
 * what Xen uses itself (vcpu_info), which it does not have brought where it pages memory.
 */
static void put_last_pages(struct freezer *self)
{
    struct {
        uint64_t frame;
        uint8_t page[PAGE_BYTES];
    } last;

    for (last.frame = 0; last.frame < self->frames; last.frame++) {
        if (!(self->dirty_bits[last.frame / 64] >> (last.frame % 64) & 1) ||
            !self->present[last.frame])
            continue;
        memcpy(last.page, self->copy + (last.frame << PAGE_SHIFT), PAGE_BYTES);
        put(PAGE, &last, sizeof(last));
    }
}

static void put_present(struct freezer *self)
{
    struct range *list = NULL;
    size_t length = 0, room = 0;

    for (uint64_t frame = 0; frame < self->frames; frame++) {
        if (!self->present[frame])
            continue;
        if (length && list[length - 1].first + list[length - 1].count == frame) {
            list[length - 1].count++;
            continue;
        }
        if (length == room) {
            room = room ? 2 * room : 64;
            list = realloc(list, room * sizeof(*list));
            if (!list)
                fail_errno("There is no memory for the list of the guest's pages");
        }
        list[length++] = (struct range){frame, 1};
    }
    put(PRESENT, list, length * sizeof(*list));
    free(list);
}

static void prepare(struct freezer *self, uint32_t id, int memory)
{
    DECLARE_HYPERCALL_BUFFER(unsigned long, bits);
    static xc_hypercall_buffer_t kept;
    xc_dominfo_t info;
    xen_pfn_t frames;
    uint64_t on_demand;
    size_t words;

    open_domain(&self->domain, id);
    info = describe(&self->domain);
    if (!info.hvm)
        fail("Domain %u is paravirtualized", id);
    if (info.shutdown || info.paused)
        fail("Domain %u does not run", id);
    if (info.nr_paged_pages)
        fail("Domain %u has not got all its own memory yet", id);
    /* Reading a page would have Xen give it one. */
    if (xc_domain_get_pod_target(self->domain.xc, id, NULL, NULL, &on_demand))
        fail_errno("How Xen gives the guest its memory cannot be found out");
    if (on_demand)
        fail("Domain %u has not given back yet what memory it has too much", id);
    if (xc_domain_nr_gpfns(self->domain.xc, id, &frames))
        fail_errno("How much memory the guest has cannot be found out");
    /* A guest may put a page where it likes, and this keeps account of all below it. */
    if (frames > (info.max_memkb >> (PAGE_SHIFT - 10)) + MOST_HOLES || frames > MOST_FRAMES)
        fail("Domain %u has memory at the frame %lu, too far up for what it has", id, frames - 1);
    frames = (frames + 63) & ~63UL;
    self->frames = frames;
    words = (frames + 63) / 64;
    bits = xc_hypercall_buffer_alloc_pages(self->domain.xc, bits,
                                           (words * 8 + PAGE_BYTES - 1) / PAGE_BYTES);
    self->present = calloc(frames, 1);
    self->copied = calloc(frames, 1);
    if (!bits || !self->present || !self->copied)
        fail_errno("There is no memory to keep account of the guest's");
    self->dirty_bits = bits;
    kept = *HYPERCALL_BUFFER(bits);
    self->dirty = &kept;
    if (ftruncate(memory, frames << PAGE_SHIFT))
        fail_errno("The file for the guest's memory cannot be made");
    self->copy = mmap(NULL, frames << PAGE_SHIFT, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_NORESERVE, memory, 0);
    if (self->copy == MAP_FAILED)
        fail_errno("The file for the guest's memory cannot be mapped");
}

int freeze(uint32_t id, int memory, int state_fd, uint64_t most_dirty)
{
    struct freezer *self = &freezer;
    struct stopped state = {0};
    uint64_t last, dirty;
    unsigned int rounds;
    double started, suspended, quiet, copied, saved, asked, resumed;

    prepare(self, id, memory);
    output = fdopen(state_fd, "wb");
    if (!output)
        fail_errno("The guest's state cannot be written");
    atexit(undo);
    put_policy(self);
    started = now();
    log_dirty(self);
    set_all(self);
    copy_dirty(self);
    rounds = catch_up(self, ROUNDS, &last) + 1;
    printf("{\"event\": \"ready\", \"frames\": %lu, \"rounds\": %u, \"dirty\": %lu, "
           "\"seconds\": %.6f}\n",
           self->frames, rounds, last, now() - started);
    fflush(stdout);

    await("stop");
    if (has_ballooned(self)) {
        set_all(self);
        copy_dirty(self);
    }
    rounds += catch_up(self, LAST_ROUNDS, &last);
    if (last > most_dirty)
        fail("The guest writes to %lu pages while as many are copied, more than the %lu that may "
             "be copied while it is stopped",
             last, most_dirty);
    state.context_length = xc_domain_hvm_getcontext(self->domain.xc, id, NULL, 0);
    if (state.context_length < 0 || !(state.context = malloc(state.context_length)))
        fail_errno("The guest's state cannot be read");

    started = now();
    suspend(self);
    suspended = now();
    puts("{\"event\": \"suspended\"}");
    fflush(stdout);
    await("copy");
    quiet = now();
    if (has_ballooned(self))
        fail("The guest's memory balloon is changing");
    dirty = find_dirty(self, XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL);
    if (dirty > 4 * most_dirty)
        fail("The guest wrote to %lu pages when it suspended", dirty);
    dirty = copy_dirty(self);
    copied = now();
    read_stopped(self, &state);
    saved = now();
    puts("{\"event\": \"copied\"}");
    fflush(stdout);
    await("resume");
    asked = now();
    resumed = resume_guest(self);
    if (!resumed)
        fail_errno("The guest is stopped, and Xen does not resume it");

    put(TSC, &state.tsc, sizeof(state.tsc));
    put(HVM_CONTEXT, state.context, state.context_length);
    put_params(self);
    put_last_pages(self);
    put_present(self);
    put(END, NULL, 0);
    printf("{\"event\": \"frozen\", \"rounds\": %u, \"dirty\": %lu, \"stages\": {\"suspend\": %.6f, "
           "\"devices\": %.6f, \"copy\": %.6f, \"state\": %.6f, \"disks\": %.6f, "
           "\"resume\": %.6f}}\n",
           rounds, dirty, suspended - started, quiet - suspended, copied - quiet, saved - copied,
           asked - saved, resumed - asked);
    fflush(stdout);
    return 0;
}

/* SECONDS is how long it may take until a guest that was asked to suspend has done so. */
int resume(uint32_t id, unsigned long seconds)
{
    struct freezer *self = &freezer;
    double deadline = now() + seconds;

    open_domain(&self->domain, id);
    if (!withdraw(&self->domain))
        while (!describe(&self->domain).shutdown && now() < deadline)
            usleep(20000);
    if (describe(&self->domain).shutdown &&
        describe(&self->domain).shutdown_reason == SHUTDOWN_suspend && !resume_guest(self))
        fail_errno("The guest is stopped, and Xen does not resume it");
    xc_shadow_control(self->domain.xc, id, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0);
    return 0;
}
