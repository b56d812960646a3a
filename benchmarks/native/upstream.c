// A model server that is faster than any proxy: one epoll thread, answers in the shape of the OpenAI API.
//
//   cc -O2 -o upstream upstream.c && ./upstream PORT [KEEP_ALIVE_SECONDS]
//
// POST with "stream":true: "max_tokens" events, the first at once, then one every "tick_us" microseconds (0: one for each
// turn of the loop), then [DONE]; with "stream_id" each event says its stream, its number and when it was due, and the
// last one the checksum of all before. A reader that does not keep up gets its events late, and no one else does.
// Any other POST: a completion, or, after a body that is longer than the buffer, what was received; "user":"id-N" is
// counted, and counted as doubled when N was here before; `x-pause-us` in the head holds up the reading of the body.
// GET /bytes/N: N bytes. GET /stats: what was answered so far. Any other GET: the list of models.
// Request bodies have a Content-Length, or are chunked and fit into the buffer. With KEEP_ALIVE_SECONDS a connection
// that has been idle for so long is closed, as uvicorn does it.
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

enum { MAX_FD = 65536, MAX_ID = 1 << 20, BUFFER = 65536, CATCH_UP = 64, PARTS = 4 };

struct peer {
    int fd, streaming, waits_to_write;
    long events_left, number, stream;   // of a stream; stream < 0: events that say nothing of themselves
    double tick, due, idle, resume;     // seconds of CLOCK_MONOTONIC
    uint64_t sum;
    size_t body_left, body_size;        // of a request's body that is longer than the buffer
    size_t bytes_left;                  // of GET /bytes/N
    char *out;                          // what the socket did not take
    size_t out_start, out_end, out_room, length;
    char in[BUFFER + 1];
};

static struct peer *peers[MAX_FD];
static int streams[MAX_FD], stream_count, highest, epoll, tick_wait = -1;
static long requests, events, doubled, idle_closed;
static double keep_alive;
static unsigned char seen[MAX_ID];
static char plain_event[512], filler[BUFFER];

static const char MODELS[] = "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"bench\"}]}";
static const char ANSWER[] =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\"Paris is the capital of France, and has been since the tenth century, with pauses.\"},"
    "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":37,\"completion_tokens\":18,\"total_tokens\":55}}";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
#define EVENT(more)                                                                                                \
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1795333557,\"model\":\"m\",\"choices\":" \
    "[{\"index\":0,\"delta\":{\"content\":\" capital\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]" more "}\n\n"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void hang_up(struct peer *p) {
    close(p->fd);
    peers[p->fd] = NULL;
    free(p->out);
    free(p);
}

// Output: sent at once where the socket takes it, kept otherwise. -1: the connection is lost.

static void watch(struct peer *p, int read, int write) {
    struct epoll_event interest = {.events = (read ? EPOLLIN : 0) | (write ? EPOLLOUT : 0), .data.fd = p->fd};
    epoll_ctl(epoll, EPOLL_CTL_MOD, p->fd, &interest);
}

static int pending(struct peer *p) { return p->out_end > p->out_start || p->bytes_left; }

static ssize_t try_send(struct peer *p, const char *data, size_t size) {
    ssize_t sent = send(p->fd, data, size, MSG_NOSIGNAL);
    return sent >= 0 ? sent : errno == EAGAIN ? 0 : -1;
}

static void keep(struct peer *p, const char *data, size_t size) {
    if (p->out_end + size > p->out_room) {
        memmove(p->out, p->out + p->out_start, p->out_end - p->out_start);
        p->out_end -= p->out_start, p->out_start = 0;
        if (p->out_end + size > p->out_room) p->out = realloc(p->out, p->out_room = 2 * (p->out_end + size));
    }
    memcpy(p->out + p->out_end, data, size);
    p->out_end += size;
    if (!p->waits_to_write) watch(p, 1, p->waits_to_write = 1);
}

static int put(struct peer *p, const char *data, size_t size) {
    ssize_t sent = pending(p) ? 0 : try_send(p, data, size);
    if (sent < 0) return -1;
    if ((size_t)sent < size) keep(p, data + sent, size - sent);
    return 0;
}

// One part at a time: a large answer does not hold up the streams.
static int flush(struct peer *p) {
    for (int part = 0; pending(p); part++) {
        if (part == PARTS) return 0;
        int kept = p->out_end > p->out_start;
        size_t size = kept ? p->out_end - p->out_start : p->bytes_left < BUFFER ? p->bytes_left : BUFFER;
        ssize_t sent = try_send(p, kept ? p->out + p->out_start : filler, size);
        if (sent <= 0) return sent;
        if (kept) p->out_start += sent;
        else p->bytes_left -= sent;
    }
    p->out_start = p->out_end = 0;
    p->idle = now();
    watch(p, 1, p->waits_to_write = 0);
    return 0;
}

// Answers

static int answer(struct peer *p, const char *body) {
    char out[2048];
    int size = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                        strlen(body), body);
    p->idle = now();
    return put(p, out, size);
}

static double number(const char *text, const char *name, double otherwise) {
    const char *found = strcasestr(text, name);
    return found ? atof(found + strlen(name)) : otherwise;
}

static int bytes(struct peer *p, size_t size) {
    char head[200];
    int length = snprintf(head, sizeof head,
                          "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %zu\r\n\r\n", size);
    if (put(p, head, length) < 0) return -1;
    p->bytes_left = size;
    if (!p->waits_to_write) watch(p, 1, p->waits_to_write = 1);
    return 0;
}

static int get(struct peer *p) {
    char stats[200], *line_end = strchr(p->in, '\r'), *path = strstr(p->in, "/bytes/");
    if (path && path < line_end) return bytes(p, strtoul(path + 7, NULL, 10));
    if (strncmp(p->in, "GET /stats ", 11)) return answer(p, MODELS);
    snprintf(stats, sizeof stats, "{\"requests\":%ld,\"events\":%ld,\"doubled\":%ld,\"idle_closed\":%ld}", requests, events,
             doubled, idle_closed);
    return answer(p, stats);
}

static void count(const char *body) {
    long id = number(body, "\"user\":\"id-", -1);
    requests++;
    if (id >= 0 && id < MAX_ID && seen[id]++) doubled++;
}

static int post(struct peer *p, const char *body) {
    if (!strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true")) return count(body), answer(p, ANSWER);
    p->events_left = number(body, "\"max_tokens\":", 16);
    p->tick = number(body, "\"tick_us\":", 0) / 1e6;
    p->stream = number(body, "\"stream_id\":", -1);
    p->due = now(), p->number = 0, p->sum = SUM_START;
    tick_wait = p->tick > 0;
    p->streaming = 1;
    streams[stream_count++] = p->fd;
    return put(p, STREAM_HEAD, sizeof STREAM_HEAD - 1);
}

static int received(struct peer *p) {
    char body[100];
    snprintf(body, sizeof body, "{\"received\":%zu,\"sum\":\"%016llx\"}", p->body_size, (unsigned long long)p->sum);
    return requests++, answer(p, body);
}

// Requests

static int take_body(struct peer *p) {
    size_t part = p->length < p->body_left ? p->length : p->body_left;
    p->sum = checksum(p->sum, p->in, part);
    memmove(p->in, p->in + part, p->length -= part);
    return p->body_left -= part, p->body_left ? 0 : received(p);
}

static int begin_body(struct peer *p, size_t head, size_t size) {
    double pause = number(p->in, "x-pause-us:", 0) / 1e6;
    p->body_left = p->body_size = size, p->sum = SUM_START;
    memmove(p->in, p->in + head, p->length -= head);
    if (pause) p->resume = now() + pause, watch(p, 0, 0);
    return take_body(p);
}

// All requests that are complete; -1: the connection is lost.
static int serve(struct peer *p) {
    if (p->body_left && take_body(p) < 0) return -1;
    for (char *end; !p->body_left && !p->streaming && (p->in[p->length] = 0, end = strstr(p->in, "\r\n\r\n"));) {
        *end = 0;
        char *length = strcasestr(p->in, "content-length:"), *chunked = strcasestr(p->in, "transfer-encoding: chunked");
        char *body = end + 4, *last = chunked ? strstr(body, "0\r\n\r\n") : NULL;
        size_t declared = length ? strtoul(length + 15, NULL, 10) : 0, head = body - p->in;
        if (!chunked && head + declared > BUFFER) return begin_body(p, head, declared);
        *end = '\r';
        if (chunked && !last) return p->length < BUFFER ? 0 : -1;
        size_t size = head + (chunked ? (size_t)(last + 5 - body) : declared);
        if (p->length < size) return 0;
        char next = p->in[size];
        p->in[size] = 0;
        if ((strncmp(p->in, "GET ", 4) ? post(p, body) : get(p)) < 0) return -1;
        p->in[size] = next;
        memmove(p->in, p->in + size, p->length -= size);
    }
    return 0;
}

// Streams

static int send_event(struct peer *p) {
    char text[512], out[600];
    if (p->stream < 0) return events++, put(p, plain_event, strlen(plain_event));
    int size = snprintf(text, sizeof text, EVENT(",\"stream\":%ld,\"n\":%ld,\"due\":%.6f"), p->stream, p->number, p->due);
    p->sum = checksum(p->sum, text, size);
    int length = snprintf(out, sizeof out, "%x\r\n%s\r\n", size, text);
    return events++, put(p, out, length);
}

static int end_stream(struct peer *p) {
    char text[200], out[250];
    if (p->stream >= 0) {
        int size = snprintf(text, sizeof text, "data: {\"events\":%ld,\"sum\":\"%016llx\"}\n\n", p->number, (unsigned long long)p->sum);
        int length = snprintf(out, sizeof out, "%x\r\n%s\r\n", size, text);
        if (put(p, out, length) < 0) return -1;
    }
    p->streaming = 0;
    p->idle = now();
    return requests++, put(p, STREAM_END, sizeof STREAM_END - 1);
}

// The schedule stays what it was for a reader that was late; it only catches up in steps.
static int step(struct peer *p, double time) {
    int turns = p->tick > 0 ? CATCH_UP : 1;
    for (; turns && p->streaming && time >= p->due && !pending(p); turns--) {
        if ((p->events_left-- > 0 ? send_event(p) : end_stream(p)) < 0) return -1;
        p->due += p->tick, p->number++;
    }
    return 0;
}

static void step_all(void) {
    double time = now();
    int kept = 0;
    for (int i = 0; i < stream_count; i++) {
        struct peer *p = peers[streams[i]];
        if (!p || !p->streaming) continue;
        if (step(p, time) < 0) hang_up(p);
        else if (p->streaming) streams[kept++] = p->fd;
    }
    stream_count = kept;
}

// Connections

static void welcome(int listening) {
    for (int fd, on = 1; (fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct epoll_event interest = {.events = EPOLLIN, .data.fd = fd};
        if (fd >= MAX_FD) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        peers[fd] = calloc(1, sizeof *peers[fd]);
        peers[fd]->fd = fd, peers[fd]->idle = now();
        if (fd > highest) highest = fd;
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &interest);
    }
}

static int ready(struct peer *p, uint32_t what) {
    if (what & EPOLLOUT && flush(p) < 0) return -1;
    if (!(what & (EPOLLIN | EPOLLHUP | EPOLLERR))) return 0;
    ssize_t got = recv(p->fd, p->in + p->length, BUFFER - p->length, 0);
    if (got > 0) p->length += got;
    return got == 0 || (got < 0 && errno != EAGAIN) ? -1 : serve(p);
}

static void look_at_clock(void) {
    double time = now();
    for (int fd = 0; fd <= highest; fd++) {
        struct peer *p = peers[fd];
        if (!p) continue;
        if (p->resume && time >= p->resume) p->resume = 0, watch(p, 1, 0);
        if (keep_alive && !p->streaming && !p->length && !p->body_left && !pending(p) && time - p->idle >= keep_alive)
            idle_closed++, hang_up(p);
    }
}

int main(int argc, char **argv) {
    snprintf(plain_event, sizeof plain_event, "%zx\r\n%s\r\n", sizeof EVENT("") - 1, EVENT(""));
    keep_alive = argc > 2 ? atof(argv[2]) : 0;
    int on = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons(argc > 1 ? atoi(argv[1]) : 9001);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listening, (void *)&address, sizeof address) || listen(listening, 4096)) return perror("upstream"), 1;
    struct epoll_event happened[1024], interest = {.events = EPOLLIN, .data.fd = listening};
    epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, listening, &interest);
    for (double looked = 0;;) {
        // Without paced streams or time limits it sleeps until something happens, but for a body that is held up.
        int count = epoll_wait(epoll, happened, 1024, stream_count ? tick_wait : keep_alive ? 1 : 100);
        for (int i = 0; i < count; i++) {
            struct peer *p = peers[happened[i].data.fd];
            if (p && ready(p, happened[i].events) < 0) hang_up(p);
            if (!p && happened[i].data.fd == listening) welcome(listening);
        }
        if (stream_count) step_all();
        if (now() - looked >= 0.001) look_at_clock(), looked = now();
    }
}
