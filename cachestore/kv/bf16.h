/* Numbers of 16 bits as floats and back, and loops compiled for several processors: for all that is compiled here. */
#ifndef HITPATH_BF16_H
#define HITPATH_BF16_H
#include <stdint.h>
#include <string.h>

/* One program for every machine: the loops are compiled for several, and the loader takes the best. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define CLONES
#endif

typedef uint16_t bf16;

static inline float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
}

static inline float wide_float(float x) { return x; }
static inline float narrow_float(float x) { return x; }
#endif
