/* MiniLM's encoder in int8, for processors with AVX-512 VNNI or AVX2: what `build.py` writes as a graph, not padded.
 *
 * onnxruntime spends as long between its products as in them where a question has a dozen tokens. Here a layer is six
 * loops over buffers that stay in the second-level cache (`encoder_loops.h`, compiled for either width of vectors).
 * Integers are the graph's, floats differ by their rounding.
 */
#include "loops.h"

#define DIM 384
#define HEADS 12
#define HEAD (DIM / HEADS)
#define HIDDEN 1536
#define LARGEST 16 /* lanes */

#if defined(__x86_64__) && defined(__GNUC__)
#define ABLE 1
#else
#define ABLE 0
#endif

#if ABLE
/* A product: weights laid out as [columns / two vectors, depth / 4, lanes of both, 4], what an integer stands for, what
 * is added. */
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

/* Buffers for so many rows: floats [rows, HIDDEN], floats [rows, DIM], bytes [rows, HIDDEN], and attention's. */
typedef struct {
    float *wide, *branch;
    uint8_t *bytes;
    float *keys, *scores;
} Room;

/* The numbers of a product in Python's list, from `at` on. */
static Product product(const Py_ssize_t *n, const float *floats) {
    Product found = {(const int8_t *)n[0], (const float *)n[1], (const float *)n[2], floats[0], floats[1]};
    return found;
}

#define AHEAD 4096 /* bytes of weights: so early they are asked for, since all together outgrow the nearer caches */
#define TOGETHER 64 /* rows whose buffers the second-level cache holds */
#define ADDRESSES 19 /* of a layer, in the order of `run` */

/* Query rows that go together: each waits for its own sums, not for the others'. */
#define QUERIES 4

/* Once for each row there may be; sums of an array would be written back in each turn. */
#define EACH(DO)                                                                                                       \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13)

/* What differs between the two: names, registers, and what one of them has no instruction for. */
#define LANES 16
#define MOST 14 /* rows whose sums the registers hold */
#define OF(name) name##_16
#define OP(name) _mm512_##name
#define HERE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INNER HERE static inline __attribute__((always_inline))
typedef __m512 Vector_16;
typedef __m512i Whole_16;
typedef __mmask16 Mask_16;

INNER __m512i zero_16(void) { return _mm512_setzero_si512(); }
INNER __m512i load_16(const void *from) { return _mm512_loadu_si512(from); }
INNER float total_16(__m512 x) { return _mm512_reduce_add_ps(x); }
INNER float top_16(__m512 x) { return _mm512_reduce_max_ps(x); }
INNER __m512 rounded_16(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INNER __m512 scaled_16(__m512 x, __m512 exponent) { return _mm512_scalef_ps(x, exponent); }
INNER __mmask16 first_16(Py_ssize_t count) { return (__mmask16)(0xffffu >> (16 - count)); }
INNER __m512 chosen_16(__mmask16 mask, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(mask, no, yes); }

INNER void store_bytes_16(uint8_t *to, __m512i whole) {
    whole = _mm512_max_epi32(whole, _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(whole));
}

/* Four products of bytes to each sum. Written out, since compilers copy the sums of the intrinsic from register to
 * register, and to memory when there are many. */
INNER void add_products_16(__m512i *sum, __m512i unsigned_, __m512i signed_) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_), "v"(signed_));
}
#include "encoder_loops.h"

#define LANES 8
#define MOST 5
#define OF(name) name##_8
#define OP(name) _mm256_##name
#define HERE __attribute__((target("avx2,fma")))
#define INNER HERE static inline __attribute__((always_inline))
typedef __m256 Vector_8;
typedef __m256i Whole_8;
typedef __m256 Mask_8;

INNER __m256i zero_8(void) { return _mm256_setzero_si256(); }
INNER __m256i load_8(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

INNER __m256 rounded_8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INNER __m256 scaled_8(__m256 x, __m256 exponent) { /* by a whole one above -127 */
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}

INNER __m256 first_8(Py_ssize_t count) {
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lanes));
}

INNER __m256 chosen_8(__m256 mask, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, mask); }

INNER void store_bytes_8(uint8_t *to, __m256i whole) {
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(half, half));
}

/* The same in three steps: weights have 7 bits, so that sums of two products fit into 16. */
INNER void add_products_8(__m256i *sum, __m256i unsigned_, __m256i signed_) {
    __m256i pairs;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(*sum), "=&x"(pairs)
            : "x"(unsigned_), "x"(signed_), "x"(_mm256_set1_epi16(1)));
}
#include "encoder_loops.h"
#endif

/* lanes(): floats in the widest vectors that serve here; 0: none do. */
static PyObject *lanes(PyObject *self, PyObject *none) {
#if ABLE
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return PyLong_FromLong(16);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return PyLong_FromLong(8);
#endif
    return PyLong_FromLong(0);
}

/* run(table, rows, lengths, texts, longest, lanes): addresses, but for the last three. The table has, as numbers of 64
 * bits, the layers, the address of 8 floats for each (inverse and zero of its four products), gain and shift of the
 * last norm, and ADDRESSES for each layer: gain, shift, entered; weights, scale, bias of two products; the same of the
 * second half; even. Rows, float32 [sum of lengths, DIM], are replaced by what comes out. MemoryError. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[6];
    if (numbers(args, given, 6, n) < 0)
        return NULL;
#if ABLE
    const int32_t *lengths = (const int32_t *)n[2];
    const Py_ssize_t texts = n[3], longest = (n[4] + LARGEST - 1) / LARGEST * LARGEST;
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
        (n[5] == 16 ? encode_16 : encode_8)((const Py_ssize_t *)n[0], rows, lengths + first, text - first, count,
                                            &room);
        rows += count * DIM;
    }
    Py_END_ALLOW_THREADS;
    free(memory);
#endif
    Py_RETURN_NONE;
}

/* dense(out, x, weights, bias, rows, columns, depth, gated, lanes): float32, out [rows, columns] = x [rows, depth] times
 * weights [columns, depth] transposed, and bias, as x · Φ(x) if gated; addresses, but for the last five. Depth is a
 * multiple of 32, and of columns that are gated there is one of 16. The library behind numpy would wake threads for it. */
static PyObject *dense(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[9];
    if (numbers(args, given, 9, n) < 0)
        return NULL;
#if ABLE
    for (Py_ssize_t row = 0; row < n[4]; row++)
        (n[8] == 16 ? dense_row_16 : dense_row_8)((float *)n[0] + row * n[5], (const float *)n[1] + row * n[6],
                                                  (const float *)n[2], (const float *)n[3], n[5], n[6], n[7]);
#endif
    Py_RETURN_NONE;
}

/* gather(rows, words, scales, places, marks, ids, marked, lengths, texts): addresses, but for the last. Each row, float32
 * [DIM], is the word of its id and the place in its text; words are float32, or int8 where `scales`, one a word, is not
 * 0. Where `marks` is not 0, the row of it that `marked` says is added. */
static PyObject *gather(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[9];
    if (numbers(args, given, 9, n) < 0)
        return NULL;
    const float *words = (const float *)n[1], *scales = (const float *)n[2], *marks = (const float *)n[4];
    const int8_t *whole = (const int8_t *)n[1];
    const int64_t *ids = (const int64_t *)n[5], *marked = (const int64_t *)n[6];
    float *row = (float *)n[0];
    for (Py_ssize_t text = 0; text < n[8]; text++) {
        const float *place = (const float *)n[3], *behind = place + ((const int32_t *)n[7])[text] * DIM;
        for (; place < behind; place += DIM, row += DIM, ids++) {
            if (scales)
                for (int i = 0; i < DIM; i++)
                    row[i] = whole[*ids * DIM + i] * scales[*ids] + place[i];
            else
                for (int i = 0; i < DIM; i++)
                    row[i] = words[*ids * DIM + i] + place[i];
            for (int i = 0; marks && i < DIM; i++)
                row[i] += marks[*marked * DIM + i];
            marked += marks != NULL;
        }
    }
    Py_RETURN_NONE;
}

/* means(out, rows, counts, parts, unit): addresses, but for the last two; float32 out [parts, DIM] of so many rows each,
 * one behind the other; of length one if `unit`. */
static PyObject *means(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[5];
    if (numbers(args, given, 5, n) < 0)
        return NULL;
    float *out = (float *)n[0];
    const float *row = (const float *)n[1];
    for (Py_ssize_t part = 0; part < n[3]; part++, out += DIM) {
        const int32_t count = ((const int32_t *)n[2])[part];
        double squares = 0;
        memset(out, 0, DIM * sizeof(float));
        for (int32_t at = 0; at < count; at++, row += DIM)
            for (int i = 0; i < DIM; i++)
                out[i] += row[i];
        for (int i = 0; i < DIM; i++)
            squares += (double)out[i] * out[i];
        const float by = (float)(n[4] ? 1 / sqrt(squares) : 1.0 / count);
        for (int i = 0; i < DIM; i++)
            out[i] *= by;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"lanes", lanes, METH_NOARGS, NULL},
    {"dense", (PyCFunction)(void (*)(void))dense, METH_FASTCALL, NULL},
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, NULL},
    {"means", (PyCFunction)(void (*)(void))means, METH_FASTCALL, NULL},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_encoder", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__encoder(void) { return PyModule_Create(&module); }
