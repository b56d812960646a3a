// Reads many paced streams of upstream.c at once and judges each: complete, in order, unchanged, and how late.
//
//   cc -O2 -o streams streams.c && ./streams PORT PATH STREAMS SECONDS TICK_US
//
// An event is late by the time from when it was due at the server to when it is read here, so both run on one machine.
// One line of JSON: "streams", "complete" (every event there, in order, the checksum right, [DONE], a clean end),
// "events", "unfinished" (GRACE seconds after their time), "lost" (skipped, or not there when the stream was over),
// "disordered" (or another stream's), "altered" (checksums), "late" (streams with an event more than
// LATE seconds late), "p50_ms", "p999_ms", "max_ms". Exits with 1 when a stream is not complete.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "checksum.h"

#define LATE 0.2
enum { MAX_STREAMS = 8192, EVENT = 4096, INPUT = 65536, BINS = 400000, BIN_US = 50, RAMP_US = 2000, GRACE = 30 };

// What of the chunked coding comes next.
enum part { HEAD, SIZE, DATA, AFTER_DATA, LAST, OVER };

struct stream {
    int fd, done, right, closed;
    enum part part;
    long number, got, expected, chunk;  // the next event's number; events so far, and in all
    size_t length;
    uint64_t sum;
    double latest;
    char text[EVENT];  // of a head, a chunk's size or an event: what of it has arrived
};

static struct stream all[MAX_STREAMS];
static long events, disordered, altered, bins[BINS + 1];
static double latest;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double number(const char *text, const char *name, double otherwise) {
    const char *found = strstr(text, name);
    return found ? atof(found + strlen(name)) : otherwise;
}

static void judge_time(struct stream *s, double late) {
    long bin = late < 0 ? 0 : late * 1e6 / BIN_US;
    bins[bin < BINS ? bin : BINS]++;
    if (late > s->latest) s->latest = late;
    if (late > latest) latest = late;
}

// A whole event of SSE, with its empty line.
static void judge(struct stream *s, double time) {
    const char *sum = strstr(s->text, "\"sum\":\"");
    if (!strncmp(s->text, "data: [DONE]", 12)) s->done = 1;
    else if (sum) {
        s->right = strtoull(sum + 7, NULL, 16) == s->sum;
        altered += !s->right;
    } else {
        events++, s->got++;
        if (number(s->text, "\"stream\":", -1) != s - all || number(s->text, "\"n\":", -1) != s->number) disordered++;
        s->number = number(s->text, "\"n\":", s->number) + 1;
        s->sum = checksum(s->sum, s->text, s->length);
        judge_time(s, time - number(s->text, "\"due\":", time));
    }
}

static int ends_with(struct stream *s, const char *end) {
    size_t size = strlen(end);
    return s->length >= size && !memcmp(s->text + s->length - size, end, size);
}

static int head_is_good(struct stream *s) {
    return !strncmp(s->text, "HTTP/1.1 200", 12) && strcasestr(s->text, "transfer-encoding: chunked");
}

// One byte more; -1 for what is not an answer like the server's.
static int take(struct stream *s, char byte, double time) {
    if (s->part == OVER || s->length + 1 >= EVENT) return -1;
    if (s->part == AFTER_DATA) {
        if (byte == '\n') s->part = SIZE;
        return 0;
    }
    if (s->part == SIZE || s->part == LAST) {  // events may begin in one chunk and end in the next: s->text is theirs
        if (byte == '\n' && s->part == LAST) s->part = OVER;
        else if (byte == '\n') s->part = s->chunk ? DATA : LAST;
        else if (byte != '\r') s->chunk = s->chunk * 16 + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        return 0;
    }
    s->text[s->length++] = byte, s->text[s->length] = 0;
    if (s->part == HEAD) {
        if (!ends_with(s, "\r\n\r\n")) return 0;
        if (!head_is_good(s)) return -1;
        s->part = SIZE, s->length = 0;
        return 0;
    }
    if (ends_with(s, "\n\n")) judge(s, time), s->length = 0;
    if (!--s->chunk) s->part = AFTER_DATA;
    return 0;
}

// 0: the stream is over, for better or worse.
static int read_some(struct stream *s) {
    static char input[INPUT];
    ssize_t got = recv(s->fd, input, INPUT, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return 1;
    double time = now();
    for (ssize_t i = 0; i < got; i++)
        if (take(s, input[i], time) < 0) return 0;
    return got > 0 && s->part != OVER;
}

static int open_stream(int port, const char *path, int index, long count, long tick, int epoll) {
    struct stream *s = &all[index];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    char body[300], out[800];
    int on = 1, size = snprintf(body, sizeof body,
                        "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"Paris?\"}],\"stream\":true,"
                        "\"stream_id\":%d,\"max_tokens\":%ld,\"tick_us\":%ld}", index, count, tick);
    int length = snprintf(out, sizeof out,
                          "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                          "Content-Length: %d\r\n\r\n%s", path, size, body);
    s->fd = socket(AF_INET, SOCK_STREAM, 0), s->expected = count, s->sum = SUM_START;
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(s->fd, (void *)&address, sizeof address) || send(s->fd, out, length, MSG_NOSIGNAL) != length) return -1;
    struct epoll_event interest = {.events = EPOLLIN, .data.u32 = index};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &interest);
}

static double quantile(double part) {
    long seen = 0;
    for (int bin = 0; bin <= BINS; bin++)
        if ((seen += bins[bin]) >= part * events) return bin * BIN_US / 1e3;
    return latest * 1e3;
}

static int report(int count) {
    long complete = 0, late = 0, lost = 0, unfinished = 0;
    for (int i = 0; i < count; i++) {
        struct stream *s = &all[i];
        complete += s->done && s->right && s->part == OVER && s->got == s->expected;
        late += s->latest > LATE;
        lost += s->number - s->got + (s->closed ? s->expected - s->number : 0);
        unfinished += !s->closed;
    }
    printf("{\"streams\":%d,\"complete\":%ld,\"events\":%ld,\"unfinished\":%ld,\"lost\":%ld,\"disordered\":%ld,\"altered\":%ld,\"late\":%ld,"
           "\"p50_ms\":%.2f,\"p999_ms\":%.2f,\"max_ms\":%.2f}\n",
           count, complete, events, unfinished, lost, disordered, altered, late, quantile(0.5), quantile(0.999), latest * 1e3);
    return complete != count;
}

int main(int argc, char **argv) {
    if (argc != 6) return fprintf(stderr, "streams PORT PATH STREAMS SECONDS TICK_US\n"), 2;
    int port = atoi(argv[1]), count = atoi(argv[3]), open = 0, epoll = epoll_create1(0);
    long tick = atol(argv[5]), each = atof(argv[4]) * 1e6 / tick;
    double began = now(), deadline = began + atof(argv[4]) + count * RAMP_US / 1e6 + GRACE;
    struct epoll_event happened[1024];
    for (int started = 0; (started < count || open) && now() < deadline;) {
        if (started < count && now() - began >= started * RAMP_US / 1e6) {
            if (open_stream(port, argv[2], started++, each, tick, epoll)) perror("streams");
            else open++;
        }
        int ready = epoll_wait(epoll, happened, 1024, started < count ? 1 : 100);
        for (int i = 0; i < ready; i++) {
            struct stream *s = &all[happened[i].data.u32];
            if (!read_some(s)) close(s->fd), s->closed = 1, open--;
        }
    }
    return report(count);
}
