/* Attention over paged keys and values: in bfloat16 for processors with AVX-512 and its instructions for that, in
 * float32 (`paged_float.h`) for those with AVX2.
 *
 * A tile is a few query rows of one sequence and all query heads that share a key head: up to ROWS vectors, which meet
 * the keys in strips of STRIP. Per strip keys and values are laid out once the way the instruction wants them (two
 * numbers of one lane side by side), all scores are computed, and the running softmax of FlashAttention (arXiv
 * 2205.14135) goes on. Keys are read where the block table says; positions decide who sees what, so there is neither a
 * gathered copy nor a mask. Tiles are shared out by the OpenMP that torch has loaded, with its number of threads.
 */
#include "loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ABLE 1
#define HERE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#else
#define ABLE 0
#endif

typedef struct {
    void *out;                /* [N, H, D], of `size` bytes a number, as all of these */
    const void *queries;      /* [N, ·, D], rows `row` numbers apart */
    const void *keys;         /* [P, S, K, D], as are the values */
    const void *values;
    const int64_t *positions; /* [N] */
    const int32_t *tables;    /* [B, width] */
    const int32_t *tiles;     /* [tiles, 3]: sequence, first row, rows */
    Py_ssize_t count, row, heads, kv_heads, dim, block, width, window, size; /* window 0: none */
    float scale;
} Step;

#if ABLE
#define STRIP 128
#define ROWS 64
#define DIM 256
#define LANES 16

/* What one thread works with; 300 KB of its stack. */
typedef struct {
    bf16 queries[ROWS + 4][DIM];
    float scores[ROWS + 4][STRIP];
    bf16 weights[ROWS + 4][STRIP];
    float sums[ROWS + 4][DIM];
    uint32_t keys[STRIP / LANES][DIM / 2][LANES];
    uint32_t values[STRIP / 2][DIM];
    float most[ROWS + 4], total[ROWS + 4];
} Scratch;

HERE static inline __m512 power(__m512 x) { /* 2 to the x ≤ 0 */
    x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(0.0013333558f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.009618129f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05550411f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.2402265f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6931472f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* Sixteen vectors of sixteen pairs to sixteen of one pair each. */
HERE static inline void transpose(const bf16 *const *from, Py_ssize_t offset, uint32_t (*to)[LANES]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(from[i] + offset);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to[i], _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to[i + 8], _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to[i + 4], _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to[i + 12], _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

/* Keys and values of tokens `start` to `start + keys` of a sequence, in pairs; nothing behind them. */
HERE static void lay_out(const Step *step, const int32_t *table, Py_ssize_t head, Py_ssize_t start, Py_ssize_t keys,
                         Scratch *own) {
    static const bf16 nothing[DIM];
    const bf16 *of_keys[STRIP], *of_values[STRIP];
    for (Py_ssize_t i = 0; i < STRIP; i++) {
        Py_ssize_t token = start + i, slot;
        if (i >= keys) {
            of_keys[i] = of_values[i] = nothing;
            continue;
        }
        slot = table[token / step->block] * step->block + token % step->block;
        of_keys[i] = (const bf16 *)step->keys + (slot * step->kv_heads + head) * step->dim;
        of_values[i] = (const bf16 *)step->values + (slot * step->kv_heads + head) * step->dim;
    }
    for (Py_ssize_t i = 0; i < keys; i += LANES)
        for (Py_ssize_t at = 0; at < step->dim; at += 2 * LANES)
            transpose(of_keys + i, at, own->keys[i / LANES] + at / 2);
    const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (Py_ssize_t i = 0; i < keys; i += 2)
        for (Py_ssize_t at = 0; at < step->dim; at += LANES) {
            __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(of_values[i] + at)));
            both = _mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i *)(of_values[i + 1] + at)), 1);
            _mm512_storeu_si512(own->values[i / 2] + at, _mm512_permutexvar_epi16(mixed, both));
        }
}

HERE static inline __m512 multiplied(__m512 sum, const void *lanes, const void *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(lanes), (__m512bh)_mm512_set1_epi32(both));
}

/* Scores of four rows and `groups` times sixteen keys. */
HERE static void score(Scratch *own, Py_ssize_t row, Py_ssize_t groups, Py_ssize_t pairs, __m512 scale) {
    for (Py_ssize_t group = 0; group < groups; group += 4) {
        __m512 sums[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                sums[i][j] = _mm512_setzero_ps();
        for (Py_ssize_t pair = 0; pair < pairs; pair++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    sums[i][j] = multiplied(sums[i][j], own->keys[group + j][pair], own->queries[row + i] + 2 * pair);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                _mm512_storeu_ps(own->scores[row + i] + (group + j) * LANES, _mm512_mul_ps(sums[i][j], scale));
    }
}

/* Scores of a row at `position` to weights, and what it has so far brought to their scale. */
HERE static void weigh(const Step *step, Scratch *own, Py_ssize_t row, Py_ssize_t start, Py_ssize_t groups,
                       int64_t position) {
    float *scores = own->scores[row];
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    int whole = start + groups * LANES <= position + 1 && (!step->window || start > position - step->window);
    for (Py_ssize_t group = 0; group < groups; group++) {
        __m512 one = _mm512_loadu_ps(scores + group * LANES);
        if (!whole) {
            __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int)(start + group * LANES)),
                                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
            __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32((int)position));
            if (step->window)
                seen &= _mm512_cmpgt_epi32_mask(at, _mm512_set1_epi32((int)(position - step->window)));
            one = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), one);
            _mm512_storeu_ps(scores + group * LANES, one);
        }
        most = _mm512_max_ps(most, one);
    }
    float before = own->most[row], now = _mm512_reduce_max_ps(most);
    now = now > before ? now : before;
    if (now == -INFINITY) { /* it sees none of these, nor any before */
        memset(own->weights[row], 0, groups * LANES * sizeof(bf16));
        return;
    }
    for (Py_ssize_t group = 0; group < groups; group++) {
        __m512 one = power(_mm512_sub_ps(_mm512_loadu_ps(scores + group * LANES), _mm512_set1_ps(now)));
        sum = _mm512_add_ps(sum, one);
        _mm256_storeu_si256((__m256i *)(own->weights[row] + group * LANES), (__m256i)_mm512_cvtneps_pbh(one));
    }
    float shrunk = _mm512_cvtss_f32(power(_mm512_set1_ps(before - now)));
    own->most[row] = now;
    own->total[row] = own->total[row] * shrunk + _mm512_reduce_add_ps(sum);
    if (shrunk != 1.0f)
        for (Py_ssize_t at = 0; at < step->dim; at += LANES)
            _mm512_storeu_ps(own->sums[row] + at,
                             _mm512_mul_ps(_mm512_loadu_ps(own->sums[row] + at), _mm512_set1_ps(shrunk)));
}

/* Add the weighted values of a strip to four rows' sums, `wide` times sixteen numbers from `at` on. */
HERE static inline void add(Scratch *own, Py_ssize_t row, Py_ssize_t pairs, Py_ssize_t at, const int wide) {
    __m512 sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < wide; j++)
            sums[i][j] = _mm512_loadu_ps(own->sums[row + i] + at + j * LANES);
    for (Py_ssize_t pair = 0; pair < pairs; pair++)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < wide; j++)
                sums[i][j] = multiplied(sums[i][j], own->values[pair] + at + j * LANES, own->weights[row + i] + 2 * pair);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < wide; j++)
            _mm512_storeu_ps(own->sums[row + i] + at + j * LANES, sums[i][j]);
}

HERE static void add_all(Scratch *own, Py_ssize_t row, Py_ssize_t pairs, Py_ssize_t dim) {
    Py_ssize_t at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES)
        add(own, row, pairs, at, 4);
    for (; at < dim; at += 2 * LANES)
        add(own, row, pairs, at, 2);
}

/* One tile, for one key head. */
HERE static void attend_tile(const Step *step, const int32_t *tile, Py_ssize_t head) {
    Scratch own;
    const Py_ssize_t group = step->heads / step->kv_heads, dim = step->dim, rows = tile[2] * group;
    const int32_t *table = step->tables + tile[0] * step->width;
    const int64_t *positions = step->positions + tile[1];
    const Py_ssize_t stop = positions[tile[2] - 1] + 1;
    const __m512 scale = _mm512_set1_ps(step->scale * 1.44269504f); /* weights are powers of two */
    for (Py_ssize_t i = 0; i < rows + 4; i++) {
        const bf16 *from = (const bf16 *)step->queries + (tile[1] + i / group) * step->row;
        if (i < rows)
            memcpy(own.queries[i], from + (head * group + i % group) * dim, dim * sizeof(bf16));
        else
            memset(own.queries[i], 0, dim * sizeof(bf16));
        memset(own.sums[i], 0, dim * sizeof(float));
        own.most[i] = -INFINITY;
        own.total[i] = 0;
    }
    Py_ssize_t start = step->window && positions[0] >= step->window ? positions[0] - step->window + 1 : 0;
    Py_ssize_t first = 0; /* rows before it see none of the strip */
    for (; start < stop; start += STRIP) {
        Py_ssize_t keys = stop - start < STRIP ? stop - start : STRIP;
        Py_ssize_t groups = (keys + LANES - 1) / LANES;
        while (positions[first / group] < start)
            first += group;
        lay_out(step, table, head, start, keys, &own);
        for (Py_ssize_t row = first & ~3; row < rows; row += 4) {
            score(&own, row, groups, dim / 2, scale);
            for (Py_ssize_t one = row; one < row + 4; one++)
                if (one < first || one >= rows)
                    memset(own.weights[one], 0, sizeof own.weights[one]);
                else
                    weigh(step, &own, one, start, groups, positions[one / group]);
            add_all(&own, row, (keys + 1) / 2, dim);
        }
    }
    for (Py_ssize_t i = 0; i < rows; i++) {
        bf16 *to = (bf16 *)step->out + ((tile[1] + i / group) * step->heads + head * group + i % group) * dim;
        for (Py_ssize_t at = 0; at < dim; at += LANES) {
            __m512 mean = _mm512_div_ps(_mm512_loadu_ps(own.sums[i] + at), _mm512_set1_ps(own.total[i]));
            _mm256_storeu_si256((__m256i *)(to + at), (__m256i)_mm512_cvtneps_pbh(mean));
        }
    }
}

#undef HERE
#undef LANES
#include "paged_float.h"

static void attend_all(const Step *step) {
    const Py_ssize_t units = step->count * step->kv_heads;
#pragma omp parallel for schedule(dynamic, 1) if (units > 1)
    for (Py_ssize_t unit = 0; unit < units; unit++) {
        const int32_t *tile = step->tiles + unit / step->kv_heads * 3;
        (step->size == 2 ? attend_tile : float_attend_tile)(step, tile, unit % step->kv_heads);
    }
}
#endif

/* able(size): whether this processor has the instructions for numbers of so many bytes. */
static PyObject *able(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t size;
    if (numbers(args, given, 1, &size) < 0)
        return NULL;
#if ABLE
    __builtin_cpu_init();
    if (size == 4 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        Py_RETURN_TRUE;
    if (size == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"))
        Py_RETURN_TRUE;
#endif
    Py_RETURN_FALSE;
}

/* attend(addresses and numbers of Step in its order, scale): checks nothing. */
static PyObject *attend(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[16];
    double scale = given == 17 ? PyFloat_AsDouble(args[16]) : 0;
    if (PyErr_Occurred() || numbers(args, given - 1, 16, n) < 0)
        return NULL;
#if ABLE
    Step step = {(void *)n[0], (const void *)n[1], (const void *)n[2], (const void *)n[3], (const int64_t *)n[4],
                 (const int32_t *)n[5], (const int32_t *)n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15],
                 (float)scale};
    Py_BEGIN_ALLOW_THREADS;
    attend_all(&step);
    Py_END_ALLOW_THREADS;
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"able", (PyCFunction)(void (*)(void))able, METH_FASTCALL, NULL},
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_paged", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__paged(void) { return PyModule_Create(&module); }
