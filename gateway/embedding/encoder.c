/* MiniLM's encoder in int8 for processors with AVX-512 VNNI: what `build.py` writes as a graph, without padding.
 *
 * onnxruntime spends as long between its products as in them where a question has a dozen tokens. Here a layer is six
 * loops over buffers that stay in the second-level cache. Integers are the graph's, floats differ by their rounding.
 */
#include "loops.h"

#define DIM 384
#define HEADS 12
#define HEAD (DIM / HEADS)
#define HIDDEN 1536
#define LANES 16

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ABLE 1
#define HERE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INNER HERE static inline __attribute__((always_inline))
#else
#define ABLE 0
#endif

#if ABLE
/* A product: weights laid out as [columns / 16, depth / 4, 16, 4], what an integer stands for, what is added. */
typedef struct {
    const int8_t *weights;
    const float *scale, *bias;
    float inverse, zero; /* of what enters it: integer = value * inverse + zero */
} Product;

typedef struct {
    const float *gain, *shift;                    /* of the norm before attention */
    const float *entered;                         /* what the normed rows are multiplied with where they go on */
    Product mixed, out;
    const float *second_gain, *second_shift, *second_entered;
    Product up, down;
    const float *even; /* [HIDDEN], by which what comes out of the gate is multiplied */
} Layer;

/* Rounded to bytes; `size` is a multiple of 16. */
INNER void to_bytes(uint8_t *to, const float *from, Py_ssize_t size, float inverse, float zero) {
    const __m512 by = _mm512_set1_ps(inverse), more = _mm512_set1_ps(zero);
    for (Py_ssize_t i = 0; i < size; i += LANES) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(from + i), by, more));
        whole = _mm512_max_epi32(whole, _mm512_setzero_si512());
        _mm_storeu_si128((__m128i *)(to + i), _mm512_cvtusepi32_epi8(whole));
    }
}

/* Four products of bytes to each sum. Written out, since compilers copy the sums of the intrinsic from register to
 * register, and to memory when there are many. */
INNER void add_products(__m512i *sum, __m512i unsigned_, __m512i signed_) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_), "v"(signed_));
}

/* Once for each row there may be; sums of an array would be written back in each turn. */
#define MOST 14
#define EACH(DO)                                                                                                       \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13)

/* `rows` rows, which are known when it is compiled, times 32 columns. */
INNER void multiply_rows(const int rows, float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t depth,
                         const Product *by, Py_ssize_t column) {
    const int8_t *left = by->weights + column * depth, *right = left + LANES * depth;
#define BEGIN(I) __m512i left##I = _mm512_setzero_si512(), right##I = left##I;
    EACH(BEGIN)
    for (Py_ssize_t at = 0; at < depth; at += 4) {
        const __m512i one = _mm512_loadu_si512(left + at * LANES), two = _mm512_loadu_si512(right + at * LANES);
#define ADD(I)                                                                                                         \
    if (I < rows) {                                                                                                    \
        int32_t four;                                                                                                  \
        memcpy(&four, from + I * depth + at, 4);                                                                       \
        const __m512i all = _mm512_set1_epi32(four);                                                                   \
        add_products(&left##I, all, one);                                                                              \
        add_products(&right##I, all, two);                                                                             \
    }
        EACH(ADD)
    }
#define END(I)                                                                                                         \
    if (I < rows) {                                                                                                    \
        float *out = to + I * width + column;                                                                          \
        _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(left##I), _mm512_loadu_ps(by->scale + column),         \
                                              _mm512_loadu_ps(by->bias + column)));                                    \
        _mm512_storeu_ps(out + LANES,                                                                                  \
                         _mm512_fmadd_ps(_mm512_cvtepi32_ps(right##I), _mm512_loadu_ps(by->scale + column + LANES),     \
                                         _mm512_loadu_ps(by->bias + column + LANES)));                                 \
    }
    EACH(END)
}

#define ROWS(N)                                                                                                        \
    case N:                                                                                                            \
        multiply_rows(N, to, width, from, depth, by, column);                                                          \
        break;

HERE static void multiply_some(int rows, float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t depth,
                               const Product *by, Py_ssize_t column) {
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7)
        ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
    }
}

/* All rows times all columns; each weight is read from afar once. */
HERE static void multiply(float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t rows, Py_ssize_t depth,
                          const Product *by) {
    const Py_ssize_t parts = (rows + MOST - 1) / MOST, most = (rows + parts - 1) / parts;
    for (Py_ssize_t column = 0; column < width; column += 2 * LANES)
        for (Py_ssize_t row = 0; row < rows; row += most)
            multiply_some((int)(rows - row < most ? rows - row : most), to + row * width, width, from + row * depth, depth,
                          by, column);
}

HERE static void norm(float *to, const float *from, const float *gain, const float *shift) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < DIM; i += LANES)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / DIM);
    for (int i = 0; i < DIM; i += LANES) {
        __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(from + i), mean);
        squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / DIM + 1e-12f));
    for (int i = 0; i < DIM; i += LANES) {
        __m512 apart = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + i), mean), by);
        _mm512_storeu_ps(to + i, _mm512_fmadd_ps(apart, _mm512_loadu_ps(gain + i), _mm512_loadu_ps(shift + i)));
    }
}

INNER __m512 power(__m512 x) { /* e to the x ≤ 0 */
    x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(0.00015403530f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0013333558f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0096181291f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055504109f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24022651f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69314718f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* x · Φ(x); erf by Abramowitz and Stegun's 7.1.26, within 1.5e-7. */
HERE static void gate(float *x, const float *even) {
    const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
    for (int i = 0; i < HIDDEN; i += LANES) {
        __m512 value = _mm512_loadu_ps(x + i), scaled = _mm512_mul_ps(value, _mm512_set1_ps(0.70710678f));
        __m512 size = _mm512_andnot_ps(sign, scaled);
        __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
        __m512 y = _mm512_set1_ps(1.061405429f);
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
        __m512 rest = _mm512_mul_ps(_mm512_mul_ps(y, t), power(_mm512_xor_ps(sign, _mm512_mul_ps(size, size))));
        __m512 erf = _mm512_or_ps(_mm512_sub_ps(one, rest), _mm512_and_ps(sign, scaled));
        value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, erf));
        _mm512_storeu_ps(x + i, _mm512_mul_ps(value, _mm512_loadu_ps(even + i)));
    }
}

/* Query rows that go together: each waits for its own sums, not for the others'. */
#define QUERIES 4

/* Of one text of `tokens`: `mixed` [tokens, 3 · DIM] to `to` [tokens, DIM]; `keys` [HEAD, wide] and `scores`
 * [QUERIES, wide] are for its use, `wide` the tokens rounded up to 16. */
HERE static void attend(float *to, const float *mixed, Py_ssize_t tokens, float *keys, float *scores) {
    const Py_ssize_t wide = (tokens + LANES - 1) / LANES * LANES;
    const __m512 none = _mm512_set1_ps(-INFINITY);
    const __mmask16 last = (__mmask16)(0xffffu >> (wide - tokens));
    for (int head = 0; head < HEADS; head++) {
        const float *of = mixed + head * HEAD;
        memset(keys, 0, HEAD * wide * sizeof(float));
        for (Py_ssize_t token = 0; token < tokens; token++)
            for (int i = 0; i < HEAD; i++)
                keys[i * wide + token] = of[token * 3 * DIM + DIM + i];
        for (Py_ssize_t token = 0; token < tokens; token += QUERIES) {
            const float *query[QUERIES];
            __m512 most[QUERIES], left[QUERIES], right[QUERIES];
            for (int one = 0; one < QUERIES; one++) { /* behind the last one it stands once more */
                query[one] = of + (token + one < tokens ? token + one : tokens - 1) * 3 * DIM;
                most[one] = none;
                left[one] = right[one] = _mm512_setzero_ps();
            }
            for (Py_ssize_t at = 0; at < wide; at += LANES) {
                __m512 score[QUERIES];
                for (int one = 0; one < QUERIES; one++)
                    score[one] = _mm512_setzero_ps();
                for (int i = 0; i < HEAD; i++) {
                    const __m512 key = _mm512_loadu_ps(keys + i * wide + at);
                    for (int one = 0; one < QUERIES; one++)
                        score[one] = _mm512_fmadd_ps(_mm512_set1_ps(query[one][i]), key, score[one]);
                }
                const __mmask16 seen = at + LANES > tokens ? last : 0xffff;
                for (int one = 0; one < QUERIES; one++) {
                    score[one] = _mm512_mul_ps(score[one], _mm512_set1_ps(0.17677669f)); /* 1 / sqrt(HEAD) */
                    score[one] = _mm512_mask_blend_ps(seen, none, score[one]);
                    _mm512_storeu_ps(scores + one * wide + at, score[one]);
                    most[one] = _mm512_max_ps(most[one], score[one]);
                }
            }
            for (int one = 0; one < QUERIES; one++) {
                float *own = scores + one * wide;
                __m512 sum = _mm512_setzero_ps();
                most[one] = _mm512_set1_ps(_mm512_reduce_max_ps(most[one]));
                for (Py_ssize_t at = 0; at < wide; at += LANES) {
                    __m512 share = power(_mm512_sub_ps(_mm512_loadu_ps(own + at), most[one]));
                    share = _mm512_maskz_mov_ps(at + LANES > tokens ? last : 0xffff, share);
                    _mm512_storeu_ps(own + at, share);
                    sum = _mm512_add_ps(sum, share);
                }
                most[one] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
            }
            for (Py_ssize_t other = 0; other < tokens; other++) {
                const float *value = of + other * 3 * DIM + 2 * DIM;
                const __m512 low = _mm512_loadu_ps(value), high = _mm512_loadu_ps(value + LANES);
                for (int one = 0; one < QUERIES; one++) {
                    const __m512 share = _mm512_set1_ps(scores[one * wide + other]);
                    left[one] = _mm512_fmadd_ps(share, low, left[one]);
                    right[one] = _mm512_fmadd_ps(share, high, right[one]);
                }
            }
            for (int one = 0; one < QUERIES && token + one < tokens; one++) {
                float *out = to + (token + one) * DIM + head * HEAD;
                _mm512_storeu_ps(out, _mm512_mul_ps(left[one], most[one]));
                _mm512_storeu_ps(out + LANES, _mm512_mul_ps(right[one], most[one]));
            }
        }
    }
}

/* rows = branch + rows · entered */
HERE static void add(float *rows, const float *branch, const float *entered) {
    for (int i = 0; i < DIM; i += LANES) {
        __m512 kept = _mm512_fmadd_ps(_mm512_loadu_ps(rows + i), _mm512_loadu_ps(entered + i), _mm512_loadu_ps(branch + i));
        _mm512_storeu_ps(rows + i, kept);
    }
}

/* Buffers for so many rows: floats [rows, HIDDEN], floats [rows, DIM], bytes [rows, HIDDEN], and attention's. */
typedef struct {
    float *wide, *branch;
    uint8_t *bytes;
    float *keys, *scores;
} Room;

HERE static void layer_of(const Layer *of, float *rows, const int32_t *lengths, Py_ssize_t texts, Py_ssize_t count,
                          const Room *room) {
    for (Py_ssize_t row = 0; row < count; row++) {
        norm(rows + row * DIM, rows + row * DIM, of->gain, of->shift);
        to_bytes(room->bytes + row * DIM, rows + row * DIM, DIM, of->mixed.inverse, of->mixed.zero);
    }
    multiply(room->wide, 3 * DIM, room->bytes, count, DIM, &of->mixed);
    for (Py_ssize_t text = 0, row = 0; text < texts; row += lengths[text++])
        attend(room->branch + row * DIM, room->wide + row * 3 * DIM, lengths[text], room->keys, room->scores);
    to_bytes(room->bytes, room->branch, count * DIM, of->out.inverse, of->out.zero);
    multiply(room->branch, DIM, room->bytes, count, DIM, &of->out);
    for (Py_ssize_t row = 0; row < count; row++) {
        float *own = rows + row * DIM;
        add(own, room->branch + row * DIM, of->entered);
        norm(own, own, of->second_gain, of->second_shift);
        to_bytes(room->bytes + row * DIM, own, DIM, of->up.inverse, of->up.zero);
    }
    multiply(room->wide, HIDDEN, room->bytes, count, DIM, &of->up);
    for (Py_ssize_t row = 0; row < count; row++) {
        gate(room->wide + row * HIDDEN, of->even);
        to_bytes(room->bytes + row * HIDDEN, room->wide + row * HIDDEN, HIDDEN, of->down.inverse, of->down.zero);
    }
    multiply(room->branch, DIM, room->bytes, count, HIDDEN, &of->down);
    for (Py_ssize_t row = 0; row < count; row++)
        add(rows + row * DIM, room->branch + row * DIM, of->second_entered);
}

/* The numbers of a product in Python's list, from `at` on. */
static Product product(const Py_ssize_t *n, const float *floats) {
    Product found = {(const int8_t *)n[0], (const float *)n[1], (const float *)n[2], floats[0], floats[1]};
    return found;
}

#define TOGETHER 64 /* rows whose buffers the second-level cache holds */
#define ADDRESSES 19 /* of a layer, in the order of `run` */

static void encode(const Py_ssize_t *n, float *rows, const int32_t *lengths, Py_ssize_t texts, Py_ssize_t count,
                   const Room *room) {
    const Py_ssize_t layers = n[0], *own = n + 4;
    const float *floats = (const float *)n[1];
    for (Py_ssize_t at = 0; at < layers; at++, own += ADDRESSES, floats += 8) {
        Layer of = {(const float *)own[0], (const float *)own[1], (const float *)own[2], product(own + 3, floats),
                    product(own + 6, floats + 2), (const float *)own[9], (const float *)own[10],
                    (const float *)own[11], product(own + 12, floats + 4), product(own + 15, floats + 6),
                    (const float *)own[18]};
        layer_of(&of, rows, lengths, texts, count, room);
    }
    for (Py_ssize_t row = 0; row < count; row++)
        norm(rows + row * DIM, rows + row * DIM, (const float *)n[2], (const float *)n[3]);
}
#endif

#if ABLE
HERE static float dot(const float *one, const float *other, Py_ssize_t size) {
    __m512 first = _mm512_setzero_ps(), second = first;
    for (Py_ssize_t i = 0; i < size; i += 2 * LANES) {
        first = _mm512_fmadd_ps(_mm512_loadu_ps(one + i), _mm512_loadu_ps(other + i), first);
        second = _mm512_fmadd_ps(_mm512_loadu_ps(one + i + LANES), _mm512_loadu_ps(other + i + LANES), second);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(first, second));
}
#endif

/* able(): whether this processor has the instructions. */
static PyObject *able(PyObject *self, PyObject *none) {
#if ABLE
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        Py_RETURN_TRUE;
#endif
    Py_RETURN_FALSE;
}

/* run(table, rows, lengths, texts, longest): addresses, but for the last two. The table has, as 64-bit numbers,
 * the layers, the address of 8 floats for each (inverse and zero of its four products), gain and shift of the last norm,
 * and ADDRESSES for each layer: gain, shift, entered; weights, scale, bias of two products; the same of the second half;
 * even. Rows, float32 [sum of lengths, DIM], are replaced by what comes out. MemoryError. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[5];
    if (numbers(args, given, 5, n) < 0)
        return NULL;
#if ABLE
    const int32_t *lengths = (const int32_t *)n[2];
    const Py_ssize_t texts = n[3], longest = (n[4] + LANES - 1) / LANES * LANES;
    const Py_ssize_t most = longest > TOGETHER ? longest : TOGETHER;
    const size_t floats = (size_t)most * (HIDDEN + DIM) + (size_t)longest * (HEAD + QUERIES);
    float *rows = (float *)n[1], *memory = malloc(floats * sizeof(float) + (size_t)most * HIDDEN);
    if (memory == NULL)
        return PyErr_NoMemory();
    Room room = {memory, memory + most * HIDDEN, NULL, NULL, NULL};
    room.keys = room.branch + most * DIM;
    room.scores = room.keys + longest * HEAD;
    room.bytes = (uint8_t *)(room.scores + longest * QUERIES);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t text = 0; text < texts;) {
        Py_ssize_t count = 0, first = text;
        do
            count += lengths[text++];
        while (text < texts && count + lengths[text] <= TOGETHER);
        encode((const Py_ssize_t *)n[0], rows, lengths + first, text - first, count, &room);
        rows += count * DIM;
    }
    Py_END_ALLOW_THREADS;
    free(memory);
#endif
    Py_RETURN_NONE;
}

/* dense(out, x, weights, rows, columns, depth): float32, out [rows, columns] = x [rows, depth] times weights [columns,
 * depth] transposed; addresses, but for the last three, and depth a multiple of 32. The library behind numpy would wake
 * threads for it. */
static PyObject *dense(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[6];
    if (numbers(args, given, 6, n) < 0)
        return NULL;
#if ABLE
    for (Py_ssize_t row = 0; row < n[3]; row++)
        for (Py_ssize_t column = 0; column < n[4]; column++)
            ((float *)n[0])[row * n[4] + column] =
                dot((const float *)n[1] + row * n[5], (const float *)n[2] + column * n[5], n[5]);
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"able", able, METH_NOARGS, NULL},
    {"dense", (PyCFunction)(void (*)(void))dense, METH_FASTCALL, NULL},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_encoder", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__encoder(void) { return PyModule_Create(&module); }
