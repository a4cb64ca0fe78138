/* The same in float32, for processors with AVX2: wider vectors would not be used better by the shapes that models have.
 * Included by paged.c. Values need no laying out, since a row of them is what the instruction wants.
 */
#define HERE __attribute__((target("avx2,fma")))
#define INNER HERE static inline __attribute__((always_inline))
#define LANES 8
#define FLOAT_STRIP 64 /* keys and values of so many stay in the first-level cache */
#define TOGETHER 6 /* rows whose sums the registers hold, times two vectors */

/* What one thread works with; 320 KB of its stack. */
typedef struct {
    float queries[ROWS + TOGETHER][DIM];
    float scores[ROWS + TOGETHER][FLOAT_STRIP];
    float sums[ROWS + TOGETHER][DIM];
    float keys[DIM][FLOAT_STRIP];
    const float *rows[DIM], *values[FLOAT_STRIP]; /* of keys, and of the pool */
    float most[ROWS + TOGETHER], total[ROWS + TOGETHER];
} FloatScratch;

HERE static inline __m256 float_power(__m256 x) { /* 2 to the x ≤ 0 */
    x = _mm256_max_ps(x, _mm256_set1_ps(-126.0f));
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_sub_ps(x, whole), y = _mm256_set1_ps(0.00015403530f);
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(0.0013333558f));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(0.0096181291f));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(0.055504109f));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(0.24022651f));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(0.69314718f));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(1.0f));
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

/* Eight numbers of eight keys to eight rows of one number of each. */
HERE static inline void float_transpose(const float *const *from, Py_ssize_t offset, float (*to)[FLOAT_STRIP]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm256_loadu_ps(from[i] + offset);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to[i], _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to[i + 4], _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

/* Keys of tokens `start` to `start + keys` of a sequence, by number, and where their values are; zeros behind them. */
HERE static void float_lay_out(const Step *step, const int32_t *table, Py_ssize_t head, Py_ssize_t start,
                               Py_ssize_t keys, FloatScratch *own) {
    static const float nothing[DIM];
    const float *of_keys[FLOAT_STRIP];
    for (Py_ssize_t i = 0; i < FLOAT_STRIP; i++) {
        Py_ssize_t token = start + i, slot;
        if (i >= keys) {
            of_keys[i] = own->values[i] = nothing;
            continue;
        }
        slot = table[token / step->block] * step->block + token % step->block;
        of_keys[i] = (const float *)step->keys + (slot * step->kv_heads + head) * step->dim;
        own->values[i] = (const float *)step->values + (slot * step->kv_heads + head) * step->dim;
    }
    for (Py_ssize_t i = 0; i < keys; i += LANES)
        for (Py_ssize_t at = 0; at < step->dim; at += LANES)
            float_transpose(of_keys + i, at, (float (*)[FLOAT_STRIP])(own->keys[at] + i));
}

/* Two vectors of each of six rows, which are `apart` numbers apart, become the sums of `by[row * width + i]` times the
 * vectors at `of[i]`, scaled, and `more` what they were. Arrays of registers are written back by some compilers. */
INNER void float_product(float *to, Py_ssize_t apart, const float *by, Py_ssize_t width, const float *const *of,
                         Py_ssize_t at, Py_ssize_t count, int more, float scale) {
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(I) __m256 left##I = _mm256_setzero_ps(), right##I = left##I;
    EACH(BEGIN)
    for (Py_ssize_t i = 0; i < count; i++) {
        const __m256 one = _mm256_loadu_ps(of[i] + at), two = _mm256_loadu_ps(of[i] + at + LANES);
#define ADD(I)                                                                                                         \
    {                                                                                                                  \
        const __m256 all = _mm256_broadcast_ss(by + I * width + i);                                                    \
        left##I = _mm256_fmadd_ps(all, one, left##I);                                                                  \
        right##I = _mm256_fmadd_ps(all, two, right##I);                                                                \
    }
        EACH(ADD)
    }
    const __m256 scales = _mm256_set1_ps(scale), none = _mm256_setzero_ps();
#define END(I)                                                                                                         \
    {                                                                                                                  \
        float *own = to + I * apart + at;                                                                              \
        _mm256_storeu_ps(own, _mm256_fmadd_ps(left##I, scales, more ? _mm256_loadu_ps(own) : none));                   \
        own += LANES;                                                                                                  \
        _mm256_storeu_ps(own, _mm256_fmadd_ps(right##I, scales, more ? _mm256_loadu_ps(own) : none));                  \
    }
    EACH(END)
#undef EACH
#undef BEGIN
#undef ADD
#undef END
}

/* Scores of six rows and `pairs` times sixteen keys. */
HERE static void float_score(FloatScratch *own, Py_ssize_t row, Py_ssize_t pairs, Py_ssize_t dim, float scale) {
    for (Py_ssize_t at = 0; at < pairs * 2 * LANES; at += 2 * LANES)
        float_product(own->scores[row], FLOAT_STRIP, own->queries[row], DIM, own->rows, at, dim, 0, scale);
}

/* Add the weighted values of a strip to six rows' sums. */
HERE static void float_add(FloatScratch *own, Py_ssize_t row, Py_ssize_t keys, Py_ssize_t dim) {
    for (Py_ssize_t at = 0; at < dim; at += 2 * LANES)
        float_product(own->sums[row], DIM, own->scores[row], FLOAT_STRIP, own->values, at, keys, 1, 1.0f);
}

/* Scores of a row at `position` to weights, in their place, and what it has so far brought to their scale. */
HERE static void float_weigh(const Step *step, FloatScratch *own, Py_ssize_t row, Py_ssize_t start, Py_ssize_t groups,
                             int64_t position) {
    float *scores = own->scores[row];
    const __m256 none = _mm256_set1_ps(-INFINITY);
    __m256 most = none, sum = _mm256_setzero_ps();
    int whole = start + groups * LANES <= position + 1 && (!step->window || start > position - step->window);
    for (Py_ssize_t group = 0; group < groups; group++) {
        __m256 one = _mm256_loadu_ps(scores + group * LANES);
        if (!whole) {
            __m256i at = _mm256_add_epi32(_mm256_set1_epi32((int)(start + group * LANES)),
                                          _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            __m256i unseen = _mm256_cmpgt_epi32(at, _mm256_set1_epi32((int)position));
            if (step->window) {
                __m256i first = _mm256_set1_epi32((int)(position - step->window + 1));
                unseen = _mm256_or_si256(unseen, _mm256_cmpgt_epi32(first, at));
            }
            one = _mm256_blendv_ps(one, none, _mm256_castsi256_ps(unseen));
            _mm256_storeu_ps(scores + group * LANES, one);
        }
        most = _mm256_max_ps(most, one);
    }
    float before = own->most[row], now = top_8(most);
    now = now > before ? now : before;
    if (now == -INFINITY) { /* it sees none of these, nor any before */
        memset(scores, 0, groups * LANES * sizeof(float));
        return;
    }
    for (Py_ssize_t group = 0; group < groups; group++) {
        __m256 score = _mm256_loadu_ps(scores + group * LANES);
        __m256 one = float_power(_mm256_sub_ps(score, _mm256_set1_ps(now)));
        one = _mm256_andnot_ps(_mm256_cmp_ps(score, none, _CMP_EQ_OQ), one);
        sum = _mm256_add_ps(sum, one);
        _mm256_storeu_ps(scores + group * LANES, one);
    }
    float shrunk = before == -INFINITY ? 0.0f : _mm256_cvtss_f32(float_power(_mm256_set1_ps(before - now)));
    own->most[row] = now;
    own->total[row] = own->total[row] * shrunk + total_8(sum);
    if (shrunk != 1.0f)
        for (Py_ssize_t at = 0; at < step->dim; at += LANES)
            _mm256_storeu_ps(own->sums[row] + at,
                             _mm256_mul_ps(_mm256_loadu_ps(own->sums[row] + at), _mm256_set1_ps(shrunk)));
}

/* One tile, for one key head. */
HERE static void float_attend_tile(const Step *step, const int32_t *tile, Py_ssize_t head) {
    FloatScratch own;
    const Py_ssize_t group = step->heads / step->kv_heads, dim = step->dim, rows = tile[2] * group;
    const int32_t *table = step->tables + tile[0] * step->width;
    const int64_t *positions = step->positions + tile[1];
    const Py_ssize_t stop = positions[tile[2] - 1] + 1;
    for (Py_ssize_t i = 0; i < dim; i++)
        own.rows[i] = own.keys[i];
    for (Py_ssize_t i = 0; i < rows + TOGETHER; i++) {
        const float *from = (const float *)step->queries + (tile[1] + i / group) * step->row;
        if (i < rows)
            memcpy(own.queries[i], from + (head * group + i % group) * dim, dim * sizeof(float));
        else
            memset(own.queries[i], 0, dim * sizeof(float));
        memset(own.sums[i], 0, dim * sizeof(float));
        own.most[i] = -INFINITY;
        own.total[i] = 0;
    }
    Py_ssize_t start = step->window && positions[0] >= step->window ? positions[0] - step->window + 1 : 0;
    Py_ssize_t first = 0; /* rows before it see none of the strip */
    for (; start < stop; start += FLOAT_STRIP) {
        Py_ssize_t keys = stop - start < FLOAT_STRIP ? stop - start : FLOAT_STRIP;
        Py_ssize_t pairs = (keys + 2 * LANES - 1) / (2 * LANES);
        while (positions[first / group] < start)
            first += group;
        float_lay_out(step, table, head, start, keys, &own);
        for (Py_ssize_t row = first - first % TOGETHER; row < rows; row += TOGETHER) {
            float_score(&own, row, pairs, dim, step->scale * 1.44269504f); /* weights are powers of two */
            for (Py_ssize_t one = row; one < row + TOGETHER; one++)
                if (one < first || one >= rows)
                    memset(own.scores[one], 0, sizeof own.scores[one]);
                else
                    float_weigh(step, &own, one, start, 2 * pairs, positions[one / group]);
            float_add(&own, row, keys, dim);
        }
    }
    for (Py_ssize_t i = 0; i < rows; i++) {
        float *to = (float *)step->out + ((tile[1] + i / group) * step->heads + head * group + i % group) * dim;
        for (Py_ssize_t at = 0; at < dim; at += LANES)
            _mm256_storeu_ps(to + at, _mm256_div_ps(_mm256_loadu_ps(own.sums[i] + at), _mm256_set1_ps(own.total[i])));
    }
}
#undef TOGETHER
#undef FLOAT_STRIP
#undef LANES
#undef INNER
#undef HERE
