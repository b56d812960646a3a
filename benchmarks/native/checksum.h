// FNV-1a over the bytes of a stream; the same on both sides of a proxy.
#include <stddef.h>
#include <stdint.h>

#define SUM_START 14695981039346656037u

static inline uint64_t checksum(uint64_t sum, const char *data, size_t size) {
    for (size_t i = 0; i < size; i++) sum = (sum ^ (unsigned char)data[i]) * 1099511628211u;
    return sum;
}
