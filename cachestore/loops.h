/* For all loops that are compiled here: numbers, floats of 16 bits, sums of vectors, one loop for several processors. */
#ifndef HITPATH_LOOPS_H
#define HITPATH_LOOPS_H
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Takes addresses and sizes; 0, or -1 with an exception where they are not so many or no numbers. */
static inline int numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, Py_ssize_t *out) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", given, wanted);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++)
        if ((out[i] = PyLong_AsSsize_t(args[i])) == -1 && PyErr_Occurred())
            return -1;
    return 0;
}

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

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* The sum of eight floats, and the largest. */
__attribute__((target("avx2"))) static inline float total_8(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

__attribute__((target("avx2"))) static inline float top_8(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#endif
#endif
