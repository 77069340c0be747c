/* The access lines of a few hosts, packet by packet; `wan.py` compiles and starts it.

   wan SEED HOST...    HOST = fd,up_bytes_s,down_bytes_s,up_queue_bytes,down_queue_bytes,delay_ns,loss_ppm,small_first

   Host i is the TUN device `fd`, and its address ends in i + 1. A packet queues for its sender's uplink, travels for the
   sum of both hosts' delays, queues for its receiver's downlink, and is handed over. Queues are drop-tail. Times are
   those of the events, not those of the wake-ups, so being late once does not slow the line down.
   A byte on stdin is answered with a line of JSON of what happened so far; the end of stdin ends the program. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { HOSTS_MAX = 16, MTU = 1500, ETHERNET = 14, SMALL = 200, TURN = 32, MS = 1000000, GRAIN = 200000 };
/* SMALL: acknowledgements, handshakes and short calls; TURN: packets read from one host before the others' turn;
   GRAIN: the shortest sleep in ns, or waking up would cost more than carrying. */

typedef struct Packet {
    struct Packet *next;
    int source, target, size; /* size as on Ethernet */
    unsigned char data[MTU];
} Packet;

typedef struct { Packet *head, *tail; } Queue;

typedef struct {
    int64_t bytes_s, limit, queued; /* queued: bytes that wait, without the one being sent */
    int64_t bytes, packets, dropped, queued_max;
    Queue small, bulk;
    Packet *sending;
} Line;

typedef struct {
    int fd, small_first;
    int64_t delay_ns, loss_ppm, lost;
    Line up, down;
} Host;

typedef enum { UP_DONE, ARRIVED, DOWN_DONE } Kind;
typedef struct { int64_t at_ns, order; Kind kind; Packet *packet; } Event;

static Host hosts[HOSTS_MAX];
static int hosts_n;
static Event *heap;
static Packet *spare;
static uint64_t dice;
static int64_t heap_n, heap_room, order, late_ns_max, late_ms, handed;

static void fail(const char *what) {
    perror(what), exit(1);
}

static int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static Packet *take(void) {
    Packet *packet = spare;
    if (packet) spare = packet->next;
    else if (!(packet = malloc(sizeof *packet))) fail("malloc");
    return packet;
}

static void give(Packet *packet) {
    packet->next = spare;
    spare = packet;
}

static int before(const Event *a, const Event *b) {
    return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->order < b->order;
}

static void schedule(int64_t at_ns, Kind kind, Packet *packet) {
    if (heap_n == heap_room && !(heap = realloc(heap, (heap_room = heap_room * 2 + 64) * sizeof *heap))) fail("realloc");
    Event event = {at_ns, order++, kind, packet};
    int64_t at = heap_n++;
    for (; at && before(&event, &heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = event;
}

static Event next_event(void) {
    Event first = heap[0], last = heap[--heap_n];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < heap_n; at = child) {
        if (child + 1 < heap_n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &last)) break;
        heap[at] = heap[child];
    }
    heap[at] = last;
    return first;
}

static void push(Queue *queue, Packet *packet) {
    packet->next = NULL;
    *(queue->tail ? &queue->tail->next : &queue->head) = packet;
    queue->tail = packet;
}

static Packet *pop(Queue *queue) {
    Packet *packet = queue->head;
    if (packet && !(queue->head = packet->next)) queue->tail = NULL;
    return packet;
}

static void send_next(Line *line, Kind done, int64_t at_ns) {
    Packet *packet = line->sending = pop(line->small.head ? &line->small : &line->bulk);
    if (!packet) return;
    line->queued -= packet->size;
    schedule(at_ns + packet->size * 1000000000LL / line->bytes_s, done, packet);
}

static void enter(Line *line, Packet *packet, Kind done, int small_first, int64_t at_ns) {
    if (line->queued + packet->size > line->limit) {
        line->dropped++;
        give(packet);
        return;
    }
    line->queued += packet->size;
    if (line->queued > line->queued_max) line->queued_max = line->queued;
    push(small_first && packet->size <= SMALL ? &line->small : &line->bulk, packet);
    if (!line->sending) send_next(line, done, at_ns);
}

static Packet *leave(Line *line, Kind done, int64_t at_ns) {
    Packet *packet = line->sending;
    line->bytes += packet->size;
    line->packets++;
    send_next(line, done, at_ns);
    return packet;
}

static void hand_over(Packet *packet, int64_t at_ns) {
    int64_t late_ns = now_ns() - at_ns;
    if (late_ns > late_ns_max) late_ns_max = late_ns;
    late_ms += late_ns > MS, handed++;
    if (write(hosts[packet->target].fd, packet->data, packet->size - ETHERNET) < 0 && errno != EAGAIN && errno != EIO)
        fail("write"); /* EIO: the device is down, its host is gone */
    give(packet);
}

static void happen(Event event) {
    Packet *packet = event.packet;
    Host *source = &hosts[packet->source], *target = &hosts[packet->target];
    switch (event.kind) {
    case UP_DONE:
        leave(&source->up, UP_DONE, event.at_ns);
        schedule(event.at_ns + source->delay_ns + target->delay_ns, ARRIVED, packet);
        break;
    case ARRIVED: enter(&target->down, packet, DOWN_DONE, target->small_first, event.at_ns); break;
    case DOWN_DONE: hand_over(leave(&target->down, DOWN_DONE, event.at_ns), event.at_ns); break;
    }
}

static int lost(Host *host) { /* xorshift64: the same seed, the same dice; which packet meets which is the kernel's */
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    return (int64_t)(dice % 1000000) < host->loss_ppm;
}

static void read_from(int index) {
    Host *host = &hosts[index];
    for (int turn = 0; turn < TURN; turn++) {
        Packet *packet = take();
        ssize_t size = read(host->fd, packet->data, MTU);
        int target = size >= 20 && packet->data[0] >> 4 == 4 ? packet->data[19] - 1 : -1;
        if (size < 0 || target < 0 || target >= hosts_n) {
            give(packet);
            if (size < 0 && (errno == EAGAIN || errno == EIO)) return;
            if (size < 0) fail("read");
            continue; /* not IPv4, or for nobody: a router would drop it too */
        }
        packet->source = index, packet->target = target, packet->size = (int)size + ETHERNET;
        if (host->loss_ppm && lost(host)) {
            host->lost++;
            give(packet);
        } else
            enter(&host->up, packet, UP_DONE, host->small_first, now_ns());
    }
}

static void report_line(const char *name, const Line *line) {
    printf("\"%s\":{\"bytes\":%lld,\"packets\":%lld,\"dropped\":%lld,\"queued_bytes_max\":%lld}", name,
           (long long)line->bytes, (long long)line->packets, (long long)line->dropped, (long long)line->queued_max);
}

static void report(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"cpu_s\":%.3f,\"packets\":%lld,\"late_ms_max\":%.3f,\"late_over_1ms\":%lld,", cpu_s,
           (long long)handed, late_ns_max / 1e6, (long long)late_ms);
    printf("\"realtime\":%s,\"hosts\":[", sched_getscheduler(0) == SCHED_FIFO ? "true" : "false");
    for (int i = 0; i < hosts_n; i++) {
        printf("%s{\"lost\":%lld,", i ? "," : "", (long long)hosts[i].lost);
        report_line("up", &hosts[i].up);
        printf(",");
        report_line("down", &hosts[i].down);
        printf("}");
    }
    printf("]}\n");
    fflush(stdout);
}

static void parse(const char *text) {
    long long v[8];
    if (sscanf(text, "%lld,%lld,%lld,%lld,%lld,%lld,%lld,%lld", v, v + 1, v + 2, v + 3, v + 4, v + 5, v + 6, v + 7) != 8 ||
        hosts_n == HOSTS_MAX || v[1] <= 0 || v[2] <= 0) {
        fprintf(stderr, "not a host, or too many: %s\n", text);
        exit(2);
    }
    Host *host = &hosts[hosts_n++];
    host->fd = (int)v[0], host->delay_ns = v[5], host->loss_ppm = v[6], host->small_first = (int)v[7];
    host->up.bytes_s = v[1], host->down.bytes_s = v[2], host->up.limit = v[3], host->down.limit = v[4];
}

int main(int count, char **words) {
    if (count < 3) return fprintf(stderr, "usage: wan SEED HOST...\n"), 2;
    dice = strtoull(words[1], NULL, 10) * 0x9E3779B97F4A7C15ULL | 1;
    for (int i = 2; i < count; i++) parse(words[i]);
    prctl(PR_SET_TIMERSLACK, 1);
    sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}); /* without it: see `realtime` */
    struct pollfd ready[HOSTS_MAX + 1];
    for (int i = 0; i < hosts_n; i++) ready[i] = (struct pollfd){hosts[i].fd, POLLIN, 0};
    ready[hosts_n] = (struct pollfd){0, POLLIN, 0};
    for (;;) {
        while (heap_n && heap[0].at_ns <= now_ns()) happen(next_event());
        int64_t wait_ns = heap_n ? heap[0].at_ns - now_ns() : 0;
        if (wait_ns < GRAIN) wait_ns = GRAIN;
        struct timespec wait = {wait_ns / 1000000000LL, wait_ns % 1000000000LL};
        if (ppoll(ready, hosts_n + 1, heap_n ? &wait : NULL, NULL) < 0 && errno != EINTR) fail("ppoll");
        for (int i = 0; i < hosts_n; i++)
            if (ready[i].revents & POLLIN) read_from(i);
            else if (ready[i].revents) ready[i].fd = -1; /* its host is gone */
        if (ready[hosts_n].revents) {
            char asked;
            if (read(0, &asked, 1) <= 0) return 0;
            report();
        }
    }
}
