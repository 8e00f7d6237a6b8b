/* SPDX-License-Identifier: Apache-2.0
 *
 * A clone's memory comes when it is touched: every page of it is paged out before the clone runs,
 * and Xen stops a processor that touches one until it is brought. Meanwhile all others are brought,
 * too; when none is left, Xen pages no more.
 */
#include "helper.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <xen/hvm/params.h>
#include <xen/vm_event.h>
#include <xenevtchn.h>

/* As many processors may wait for pages at once, without one waiting for another's. */
#define BRINGERS 4
/* Pages that are read at once of those that nobody waits for. */
#define AHEAD 64UL
/* Pages of which the others follow one that was waited for. */
#define AROUND 16UL
/* Seconds without a request, before those are. */
#define CALM 0.01
/* Hundredths of a second without a request, after the last page. */
#define QUIET 10

enum { HOLE, PAGED, BRINGING, THERE };

struct pager {
    struct domain domain;
    int memory;
    struct ranges ranges;
    uint64_t frames;
    _Atomic unsigned char *state; /* of each frame */
    atomic_ulong left;            /* frames that are not there */

    xenevtchn_handle *events;
    evtchn_port_t port;
    vm_event_sring_t *ring_page;
    xen_pfn_t ring_frame;
    vm_event_back_ring_t ring;

    /* Requests that nobody has taken yet, as many as the ring can have. */
    vm_event_request_t waiting[256];
    unsigned int first, after;
    unsigned int under_way;
    double last; /* when something was answered */
    pthread_mutex_t lock;
    pthread_cond_t changed;

    atomic_ulong faults;
    _Atomic uint64_t fault_nsec;
};

static struct pager pager = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .changed = PTHREAD_COND_INITIALIZER,
};

/* A thread's own: handles of libxenctrl are not for several. */
struct bringer {
    xc_interface *xc;
    uint8_t *buffer;
};

static void open_bringer(struct bringer *self, size_t pages)
{
    self->xc = xc_interface_open(NULL, NULL, 0);
    if (!self->xc || posix_memalign((void **)&self->buffer, PAGE_BYTES, pages << PAGE_SHIFT) ||
        mlock(self->buffer, pages << PAGE_SHIFT))
        fail_errno("A thread that brings pages cannot be started");
}

static bool is_gone(xc_interface *xc)
{
    xc_dominfo_t info;

    return xc_domain_getinfo(xc, pager.domain.id, 1, &info) != 1 ||
           info.domid != pager.domain.id || info.dying;
}

static void load(struct bringer *self, uint64_t frame, uint8_t *page)
{
    /* It may not be paged any more: its guest has given it back. */
    while (xc_mem_paging_load(self->xc, pager.domain.id, frame, page) && errno != ENOENT) {
        if (is_gone(self->xc))
            pthread_exit(NULL); /* as the main thread will see */
        if (errno != ENOMEM)
            fail_errno("Frame %lu cannot be given to the clone", frame);
        usleep(10000); /* others give some back, or the clone ends */
    }
    atomic_store(&pager.state[frame], THERE);
    atomic_fetch_sub(&pager.left, 1);
}

/* Bring pages that nobody brings yet, from FIRST on and before END; the next one to look at. */
static uint64_t bring_run(struct bringer *self, uint64_t first, uint64_t end)
{
    unsigned char paged = PAGED;
    uint64_t frame = first;

    while (frame < end &&
           atomic_compare_exchange_strong(&pager.state[frame], &paged, BRINGING))
        frame++;
    if (frame != first)
        read_memory(pager.memory, first, frame - first, self->buffer);
    for (uint64_t one = first; one < frame; one++)
        load(self, one, self->buffer + ((one - first) << PAGE_SHIFT));
    return frame != first ? frame : first + 1;
}

/* Bring a page, unless another thread is about to: then wait for that. */
static void bring(struct bringer *self, uint64_t frame)
{
    bring_run(self, frame, frame + 1);
    while (atomic_load(&pager.state[frame]) == BRINGING)
        usleep(50);
}

/* A guest that has touched a page will soon touch those beside it. */
static void bring_around(struct bringer *self, uint64_t frame)
{
    uint64_t first = frame & ~(AROUND - 1);
    uint64_t end = first + AROUND < pager.frames ? first + AROUND : pager.frames;

    while (first < end)
        first = bring_run(self, first, end);
}

static void respond(const vm_event_request_t *request)
{
    vm_event_response_t response = {
        .version = VM_EVENT_INTERFACE_VERSION,
        .flags = request->flags,
        .reason = request->reason,
        .vcpu_id = request->vcpu_id,
        .u.mem_paging = request->u.mem_paging,
    };

    memcpy(RING_GET_RESPONSE(&pager.ring, pager.ring.rsp_prod_pvt), &response, sizeof(response));
    pager.ring.rsp_prod_pvt++;
    RING_PUSH_RESPONSES(&pager.ring);
    xenevtchn_notify(pager.events, pager.port);
}

static void *serve(void *unused)
{
    struct bringer self;

    open_bringer(&self, AROUND);
    pthread_mutex_lock(&pager.lock);
    for (;;) {
        vm_event_request_t request;
        uint64_t frame;
        bool brought;
        double began;

        while (pager.first == pager.after)
            pthread_cond_wait(&pager.changed, &pager.lock);
        request = pager.waiting[pager.first++ % 256];
        pager.under_way++;
        pthread_mutex_unlock(&pager.lock);

        began = now();
        frame = request.u.mem_paging.gfn;
        brought = frame < pager.frames && !(request.u.mem_paging.flags & MEM_PAGING_DROP_PAGE);
        if (brought)
            bring(&self, frame);
        atomic_fetch_add(&pager.faults, 1);
        atomic_fetch_add(&pager.fault_nsec, (uint64_t)((now() - began) * 1e9));

        pthread_mutex_lock(&pager.lock);
        respond(&request);
        pager.under_way--;
        pager.last = now();
        pthread_cond_broadcast(&pager.changed);
        if (brought) {
            pthread_mutex_unlock(&pager.lock);
            bring_around(&self, frame);
            pthread_mutex_lock(&pager.lock);
        }
    }
    return unused;
}

/* A guest that touches page after page waits longer for each if others are brought meanwhile. It
 * does not go on for ever so: there are ever less.
 */
static void wait_for_calm(void)
{
    for (bool calm = false; !calm;) {
        pthread_mutex_lock(&pager.lock);
        calm = pager.first == pager.after && !pager.under_way && now() - pager.last >= CALM;
        pthread_mutex_unlock(&pager.lock);
        if (!calm)
            usleep(1000);
    }
}

/* Bring what nobody waits for, in order. */
static void *bring_all(void *unused)
{
    struct bringer self;

    open_bringer(&self, AHEAD);
    for (size_t i = 0; i < pager.ranges.length; i++) {
        uint64_t end = pager.ranges.list[i].first + pager.ranges.list[i].count;
        uint64_t frame = pager.ranges.list[i].first;

        while (frame < end) {
            if (atomic_load(&pager.state[frame]) == PAGED)
                wait_for_calm();
            frame = bring_run(&self, frame, frame + AHEAD < end ? frame + AHEAD : end);
        }
    }
    return unused;
}

/* What Xen has put into the ring since; the lock is held. */
static void take_requests(void)
{
    while (RING_HAS_UNCONSUMED_REQUESTS(&pager.ring)) {
        vm_event_request_t request;

        memcpy(&request, RING_GET_REQUEST(&pager.ring, pager.ring.req_cons), sizeof(request));
        pager.ring.req_cons++;
        pager.ring.sring->req_event = pager.ring.req_cons + 1;
        if (request.version != VM_EVENT_INTERFACE_VERSION)
            fail("Xen speaks of events in another version than this was built for");
        if (request.reason == VM_EVENT_REASON_MEM_PAGING)
            pager.waiting[pager.after++ % 256] = request;
    }
    pthread_cond_broadcast(&pager.changed);
}

static void enable(void)
{
    struct domain *domain = &pager.domain;
    uint64_t frame;
    uint32_t port;
    int local;

    if (xc_hvm_param_get(domain->xc, domain->id, HVM_PARAM_PAGING_RING_PFN, &frame) || !frame)
        fail("The clone has no frame for the ring of paging");
    pager.ring_frame = frame;
    /* It may be there. */
    xc_domain_populate_physmap_exact(domain->xc, domain->id, 1, 0, 0, &pager.ring_frame);
    pager.ring_page = (vm_event_sring_t *)map_to_write(domain, &pager.ring_frame, 1);
    if (xc_mem_paging_enable(domain->xc, domain->id, &port)) {
        if (errno == ENOSYS || errno == ENODEV || errno == EOPNOTSUPP)
            refuse("Xen does not page the clone's memory");
        fail_errno("Xen does not page the clone's memory");
    }
    pager.events = xenevtchn_open(NULL, 0);
    if (!pager.events || (local = xenevtchn_bind_interdomain(pager.events, domain->id, port)) < 0)
        fail_errno("Xen's requests for pages cannot be heard");
    pager.port = local;
    SHARED_RING_INIT(pager.ring_page);
    BACK_RING_INIT(&pager.ring, pager.ring_page, PAGE_BYTES);
    /* It is Xen's and this program's, not the guest's. */
    xc_domain_decrease_reservation_exact(domain->xc, domain->id, 1, 0, &pager.ring_frame);
}

static bool page_out(uint64_t frame)
{
    struct domain *domain = &pager.domain;

    if (xc_mem_paging_nominate(domain->xc, domain->id, frame)) {
        if (errno != EBUSY)
            fail_errno("Frame %lu cannot be paged out", frame);
        return false;
    }
    if (xc_mem_paging_evict(domain->xc, domain->id, frame))
        fail_errno("Frame %lu cannot be paged out", frame);
    return true;
}

/* Pages that may be of a guest before. */
static void clear(const xen_pfn_t *frames, size_t count)
{
    uint8_t *pages = map_to_write(&pager.domain, frames, count);

    memset(pages, 0, count << PAGE_SHIFT);
    unmap_frames(&pager.domain, pages, count);
}

/* Have every frame of the image that the clone has not got yet be one that is paged out; or, where
 * the image has zeros, zero: that is done sooner.
 */
static void page_all_out(void)
{
    static xen_pfn_t frames[BATCH];
    static unsigned char present[BATCH];
    struct domain *domain = &pager.domain;

    for (size_t i = 0; i < pager.ranges.length; i++) {
        struct range range = pager.ranges.list[i];

        for (uint64_t done = 0; done < range.count;) {
            size_t count = range.count - done < BATCH ? range.count - done : BATCH;
            size_t length = 0;
            bool hole;

            count = count_alike(pager.memory, range.first + done, count, &hole);
            for (size_t j = 0; j < count; j++)
                frames[j] = range.first + done + j;
            find_present(domain, frames, count, present);
            for (size_t j = 0; j < count; j++)
                if (!present[j] && frames[j] != pager.ring_frame)
                    frames[length++] = frames[j];
            if (length && xc_domain_populate_physmap_exact(domain->xc, domain->id, length, 0, 0,
                                                           frames))
                fail_errno("The host has no memory for the clone");
            done += count;
            if (hole && length) {
                clear(frames, length);
                length = 0;
            }
            for (size_t j = 0; j < length; j++) {
                uint64_t frame = frames[j];

                if (page_out(frame)) {
                    atomic_store(&pager.state[frame], PAGED);
                    atomic_fetch_add(&pager.left, 1);
                } else {
                    /* Xen needs it: it has to be there before the clone runs. */
                    xen_pfn_t pinned = frame;
                    uint8_t *place = map_to_write(domain, &pinned, 1);

                    read_memory(pager.memory, frame, 1, place);
                    unmap_frames(domain, place, 1);
                }
            }
        }
    }
}

/* Whether Xen asks no more: it does not end that while somebody waits for room in the ring. */
static bool disable(void)
{
    return !xc_mem_paging_disable(pager.domain.xc, pager.domain.id) || errno != EBUSY;
}

static void say_end(const char *how, double started)
{
    unsigned long faults = pager.faults;

    printf("{\"event\": \"%s\", \"faults\": %lu, \"fault_seconds\": %.6f, \"left\": %lu, "
           "\"seconds\": %.6f}\n",
           how, faults, faults ? pager.fault_nsec / 1e9 / faults : 0.0, pager.left,
           now() - started);
    fflush(stdout);
}

/* Answer what is asked yet, and have Xen ask no more. The guest runs meanwhile: with more processors
 * than there is room in the ring, some of them wait for that in Xen.
 */
static void finish(void)
{
    unsigned int quiet = 0;

    while (quiet < QUIET || !disable()) {
        usleep(10000);
        pthread_mutex_lock(&pager.lock);
        take_requests();
        quiet = pager.first != pager.after || pager.under_way ? 0 : quiet + 1;
        pthread_mutex_unlock(&pager.lock);
    }
}

static void start_thread(void *(*function)(void *))
{
    pthread_t thread;

    errno = pthread_create(&thread, NULL, function, NULL);
    if (errno)
        fail_errno("A thread that brings pages cannot be started");
}

int page(uint32_t id, int memory, int pages)
{
    struct domain *domain = &pager.domain;
    xen_pfn_t highest;
    double started = now();

    open_domain(domain, id);
    describe(domain);
    pager.memory = memory;
    pager.ranges = read_ranges(pages, 1UL << 32);
    if (!pager.ranges.length)
        fail("The image has no pages");
    highest = pager.ranges.list[pager.ranges.length - 1].first +
              pager.ranges.list[pager.ranges.length - 1].count;
    pager.frames = highest;
    pager.state = calloc(highest, 1);
    if (!pager.state)
        fail_errno("There is no memory to keep account of the clone's");
    if (!xs_watch(domain->store, "@releaseDomain", "end"))
        fail_errno("xenstore does not tell of domains that end");
    enable();
    page_all_out();
    /* Nobody else gets what it will need. */
    if (xc_domain_claim_pages(domain->xc, id, describe(domain).nr_pages + pager.left))
        fail_errno("The host has no memory for the clone");
    for (int i = 0; i < BRINGERS; i++)
        start_thread(serve);
    printf("{\"event\": \"ready\", \"pages\": %lu, \"seconds\": %.6f}\n", pager.left,
           now() - started);
    fflush(stdout);
    await("bring");
    started = now();
    start_thread(bring_all);
    while (pager.left) {
        struct pollfd events[] = {
            {xenevtchn_fd(pager.events), POLLIN, 0},
            {xs_fileno(domain->store), POLLIN, 0},
        };

        if (poll(events, 2, 200) < 0 && errno != EINTR)
            fail_errno("Xen's requests for pages cannot be heard");
        if (events[0].revents & POLLIN) {
            xenevtchn_port_or_error_t port = xenevtchn_pending(pager.events);

            if (port >= 0)
                xenevtchn_unmask(pager.events, port);
        }
        if (events[1].revents & POLLIN) {
            char **watch = xs_check_watch(domain->store);

            free(watch);
            if (is_gone(domain->xc)) {
                disable();
                say_end("ended", started);
                return 0;
            }
        }
        pthread_mutex_lock(&pager.lock);
        take_requests();
        pthread_mutex_unlock(&pager.lock);
    }
    finish();
    say_end("populated", started);
    return 0;
}
