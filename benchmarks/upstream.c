// A model server that is faster than any proxy: one epoll thread, answers in the shape of the OpenAI API.
//
//   cc -O2 -o upstream upstream.c && ./upstream PORT
//
// POST with "stream":true: "max_tokens" events, the first at once, then one every "tick_us" microseconds (0: one for each
// turn of the loop), then [DONE]. Any other POST: a completion. GET /stats: what was answered so far. Any other GET: the
// list of models. Request bodies need a Content-Length or must end with the last chunk.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 65536, BUFFER = 65536 };

struct peer {
    int fd, streaming;
    long left;
    double tick, due;
    size_t length;
    char in[BUFFER + 1];
};

static struct peer *peers[MAX_FD];
static int streams[MAX_FD], stream_count, tick_wait;
static long requests, events;
static char event[512];

static const char MODELS[] = "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"bench\"}]}";
static const char ANSWER[] =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\"Paris is the capital of France, and has been since the tenth century, with pauses.\"},"
    "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":37,\"completion_tokens\":18,\"total_tokens\":55}}";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void hang_up(struct peer *p) {
    close(p->fd);
    peers[p->fd] = NULL;
    free(p);
}

// A reader that does not keep up is waited for: the load generator always reads.
static int put(struct peer *p, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(p->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return -1;
        if (sent < 0) usleep(50);
        else data += sent, size -= sent;
    }
    return 0;
}

static int answer(struct peer *p, const char *body) {
    char out[2048];
    int size = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                        strlen(body), body);
    return put(p, out, size);
}

static double number(const char *body, const char *name, double otherwise) {
    const char *found = strstr(body, name);
    return found ? atof(found + strlen(name)) : otherwise;
}

static int get(struct peer *p) {
    char stats[100];
    if (strncmp(p->in, "GET /stats ", 11)) return answer(p, MODELS);
    snprintf(stats, sizeof stats, "{\"requests\":%ld,\"events\":%ld}", requests, events);
    return answer(p, stats);
}

static int post(struct peer *p, const char *body) {
    if (!strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true")) return requests++, answer(p, ANSWER);
    p->left = number(body, "\"max_tokens\":", 16);
    p->tick = number(body, "\"tick_us\":", 0) / 1e6;
    p->due = now();
    tick_wait = p->tick > 0;
    if (!p->streaming) streams[stream_count++] = p->fd;
    p->streaming = 1;
    return put(p, STREAM_HEAD, sizeof STREAM_HEAD - 1);
}

// The requests that are complete; -1 if the connection is lost.
static int serve(struct peer *p) {
    for (char *end; p->in[p->length] = 0, (end = strstr(p->in, "\r\n\r\n"));) {
        *end = 0;
        char *length = strcasestr(p->in, "content-length:"), *chunked = strcasestr(p->in, "transfer-encoding: chunked");
        *end = '\r';
        char *body = end + 4, *last = chunked ? strstr(body, "0\r\n\r\n") : NULL;
        if (chunked && !last) return 0;
        size_t size = body - p->in + (chunked ? (size_t)(last + 5 - body) : length ? strtoul(length + 15, NULL, 10) : 0);
        if (size > BUFFER) return -1;
        if (p->length < size) return 0;
        if ((strncmp(p->in, "GET ", 4) ? post(p, body) : get(p)) < 0) return -1;
        memmove(p->in, p->in + size, p->length -= size);
    }
    return 0;
}

static int step(struct peer *p, double time) {
    if (time < p->due) return 0;
    p->due += p->tick;
    if (p->left-- > 0) return events++, put(p, event, strlen(event));
    p->streaming = 0;
    return requests++, put(p, STREAM_END, sizeof STREAM_END - 1);
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

static void welcome(int poll, int listening) {
    for (int fd, on = 1; (fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        struct epoll_event interest = {.events = EPOLLIN, .data.fd = fd};
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        peers[fd] = calloc(1, sizeof *peers[fd]);
        peers[fd]->fd = fd;
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &interest);
    }
}

int main(int argc, char **argv) {
    static const char JSON[] =
        "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1795333557,\"model\":\"m\",\"choices\":"
        "[{\"index\":0,\"delta\":{\"content\":\" capital\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n";
    snprintf(event, sizeof event, "%zx\r\n%s\r\n", sizeof JSON - 1, JSON);
    int on = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons(argc > 1 ? atoi(argv[1]) : 9001);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listening, (void *)&address, sizeof address) || listen(listening, 4096)) return perror("upstream"), 1;
    struct epoll_event ready[1024], interest = {.events = EPOLLIN, .data.fd = listening};
    epoll_ctl(poll, EPOLL_CTL_ADD, listening, &interest);
    for (;;) {
        int count = epoll_wait(poll, ready, 1024, !stream_count ? -1 : tick_wait);
        for (int i = 0; i < count; i++) {
            struct peer *p = peers[ready[i].data.fd];
            if (!p) {
                if (ready[i].data.fd == listening) welcome(poll, listening);
                continue;
            }
            ssize_t got = recv(p->fd, p->in + p->length, BUFFER - p->length, 0);
            if (got > 0) p->length += got;
            if (got == 0 || (got < 0 && errno != EAGAIN) || serve(p) < 0) hang_up(p);
        }
        if (stream_count) step_all();
    }
}
