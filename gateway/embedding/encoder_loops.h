/* The encoder's loops for vectors of LANES floats, included once for each width. encoder.c says what else they need: OF
 * and OP, which make names of this width's functions and instructions, HERE, INNER, MOST, and a dozen small functions.
 */

/* Rounded to bytes; `size` is a multiple of 16. */
INNER void OF(to_bytes)(uint8_t *to, const float *from, Py_ssize_t size, float inverse, float zero) {
    const OF(Vector) by = OP(set1_ps)(inverse), more = OP(set1_ps)(zero);
    for (Py_ssize_t i = 0; i < size; i += LANES)
        OF(store_bytes)(to + i, OP(cvtps_epi32)(OP(fmadd_ps)(OP(loadu_ps)(from + i), by, more)));
}

/* Sums to numbers. */
INNER void OF(put)(float *to, OF(Whole) sums, const float *scale, const float *bias) {
    OP(storeu_ps)(to, OP(fmadd_ps)(OP(cvtepi32_ps)(sums), OP(loadu_ps)(scale), OP(loadu_ps)(bias)));
}

/* `rows` rows, which are known when it is compiled, times two vectors of columns. */
INNER void OF(multiply_rows)(const int rows, float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t depth,
                             const Product *by, Py_ssize_t column) {
    const int8_t *weights = by->weights + column * depth;
#define BEGIN(I) OF(Whole) left##I = OF(zero)(), right##I = left##I;
    EACH(BEGIN)
    for (Py_ssize_t at = 0; at < depth; at += 4) {
        const int8_t *here = weights + at * 2 * LANES;
        const OF(Whole) one = OF(load)(here), two = OF(load)(here + 4 * LANES);
        for (int line = 0; line < 8 * LANES; line += 64)
            __builtin_prefetch(here + line + AHEAD);
#define ADD(I)                                                                                                         \
    if (I < rows) {                                                                                                    \
        int32_t four;                                                                                                  \
        memcpy(&four, from + I * depth + at, 4);                                                                       \
        const OF(Whole) all = OP(set1_epi32)(four);                                                                    \
        OF(add_products)(&left##I, all, one);                                                                          \
        OF(add_products)(&right##I, all, two);                                                                         \
    }
        EACH(ADD)
    }
#define END(I)                                                                                                         \
    if (I < rows) {                                                                                                    \
        OF(put)(to + I * width + column, left##I, by->scale + column, by->bias + column);                              \
        OF(put)(to + I * width + column + LANES, right##I, by->scale + column + LANES, by->bias + column + LANES);     \
    }
    EACH(END)
#undef BEGIN
#undef ADD
#undef END
}

#define ROWS(N)                                                                                                        \
    case N + 1:                                                                                                        \
        if (N < MOST)                                                                                                  \
            OF(multiply_rows)(N + 1, to, width, from, depth, by, column);                                              \
        break;

HERE static void OF(multiply_some)(int rows, float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t depth,
                                   const Product *by, Py_ssize_t column) {
    switch (rows) {
        EACH(ROWS)
    }
}
#undef ROWS

/* All rows times all columns; each weight is read from afar once. */
HERE static void OF(multiply)(float *to, Py_ssize_t width, const uint8_t *from, Py_ssize_t rows, Py_ssize_t depth,
                              const Product *by) {
    const Py_ssize_t parts = (rows + MOST - 1) / MOST, most = (rows + parts - 1) / parts;
    for (Py_ssize_t column = 0; column < width; column += 2 * LANES)
        for (Py_ssize_t row = 0; row < rows; row += most)
            OF(multiply_some)((int)(rows - row < most ? rows - row : most), to + row * width, width,
                              from + row * depth, depth, by, column);
}

HERE static void OF(norm)(float *to, const float *from, const float *gain, const float *shift) {
    OF(Vector) sum = OP(setzero_ps)(), squares = OP(setzero_ps)();
    for (int i = 0; i < DIM; i += LANES)
        sum = OP(add_ps)(sum, OP(loadu_ps)(from + i));
    const OF(Vector) mean = OP(set1_ps)(OF(total)(sum) / DIM);
    for (int i = 0; i < DIM; i += LANES) {
        OF(Vector) apart = OP(sub_ps)(OP(loadu_ps)(from + i), mean);
        squares = OP(fmadd_ps)(apart, apart, squares);
    }
    const OF(Vector) by = OP(set1_ps)(1.0f / sqrtf(OF(total)(squares) / DIM + 1e-12f));
    for (int i = 0; i < DIM; i += LANES) {
        OF(Vector) apart = OP(mul_ps)(OP(sub_ps)(OP(loadu_ps)(from + i), mean), by);
        OP(storeu_ps)(to + i, OP(fmadd_ps)(apart, OP(loadu_ps)(gain + i), OP(loadu_ps)(shift + i)));
    }
}

INNER OF(Vector) OF(power)(OF(Vector) x) { /* e to the x ≤ 0 */
    x = OP(mul_ps)(OP(max_ps)(x, OP(set1_ps)(-87.0f)), OP(set1_ps)(1.44269504f));
    OF(Vector) whole = OF(rounded)(x);
    OF(Vector) rest = OP(sub_ps)(x, whole), y = OP(set1_ps)(0.00015403530f);
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(0.0013333558f));
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(0.0096181291f));
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(0.055504109f));
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(0.24022651f));
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(0.69314718f));
    y = OP(fmadd_ps)(y, rest, OP(set1_ps)(1.0f));
    return OF(scaled)(y, whole);
}

/* x · Φ(x), times `even` if it is given; erf by Abramowitz and Stegun's 7.1.26, within 1.5e-7. */
HERE static void OF(gate)(float *x, const float *even, Py_ssize_t size) {
    const OF(Vector) one = OP(set1_ps)(1.0f), sign = OP(set1_ps)(-0.0f);
    for (Py_ssize_t i = 0; i < size; i += LANES) {
        OF(Vector) value = OP(loadu_ps)(x + i), scaled = OP(mul_ps)(value, OP(set1_ps)(0.70710678f));
        OF(Vector) size = OP(andnot_ps)(sign, scaled);
        OF(Vector) t = OP(div_ps)(one, OP(fmadd_ps)(size, OP(set1_ps)(0.3275911f), one));
        OF(Vector) y = OP(set1_ps)(1.061405429f);
        y = OP(fmadd_ps)(y, t, OP(set1_ps)(-1.453152027f));
        y = OP(fmadd_ps)(y, t, OP(set1_ps)(1.421413741f));
        y = OP(fmadd_ps)(y, t, OP(set1_ps)(-0.284496736f));
        y = OP(fmadd_ps)(y, t, OP(set1_ps)(0.254829592f));
        OF(Vector) rest = OP(mul_ps)(OP(mul_ps)(y, t), OF(power)(OP(xor_ps)(sign, OP(mul_ps)(size, size))));
        OF(Vector) erf = OP(or_ps)(OP(sub_ps)(one, rest), OP(and_ps)(sign, scaled));
        value = OP(mul_ps)(OP(mul_ps)(value, OP(set1_ps)(0.5f)), OP(add_ps)(one, erf));
        OP(storeu_ps)(x + i, even ? OP(mul_ps)(value, OP(loadu_ps)(even + i)) : value);
    }
}

/* Of one text of `tokens`: `mixed` [tokens, 3 · DIM] to `to` [tokens, DIM]; `keys` [HEAD, wide] and `scores`
 * [QUERIES, wide] are for its use, `wide` the tokens rounded up to whole vectors. */
HERE static void OF(attend)(float *to, const float *mixed, Py_ssize_t tokens, float *keys, float *scores) {
    const Py_ssize_t wide = (tokens + LANES - 1) / LANES * LANES;
    const OF(Vector) none = OP(set1_ps)(-INFINITY);
    const OF(Mask) every = OF(first)(LANES), last = OF(first)(LANES - (wide - tokens));
    for (int head = 0; head < HEADS; head++) {
        const float *of = mixed + head * HEAD;
        memset(keys, 0, HEAD * wide * sizeof(float));
        for (Py_ssize_t token = 0; token < tokens; token++)
            for (int i = 0; i < HEAD; i++)
                keys[i * wide + token] = of[token * 3 * DIM + DIM + i];
        for (Py_ssize_t token = 0; token < tokens; token += QUERIES) {
            const float *query[QUERIES];
            OF(Vector) most[QUERIES], left[QUERIES], right[QUERIES];
            for (int one = 0; one < QUERIES; one++) { /* behind the last one it stands once more */
                query[one] = of + (token + one < tokens ? token + one : tokens - 1) * 3 * DIM;
                most[one] = none;
            }
            for (Py_ssize_t at = 0; at < wide; at += LANES) {
                OF(Vector) score[QUERIES];
                for (int one = 0; one < QUERIES; one++)
                    score[one] = OP(setzero_ps)();
                for (int i = 0; i < HEAD; i++) {
                    const OF(Vector) key = OP(loadu_ps)(keys + i * wide + at);
                    for (int one = 0; one < QUERIES; one++)
                        score[one] = OP(fmadd_ps)(OP(set1_ps)(query[one][i]), key, score[one]);
                }
                const OF(Mask) seen = at + LANES > tokens ? last : every;
                for (int one = 0; one < QUERIES; one++) {
                    score[one] = OP(mul_ps)(score[one], OP(set1_ps)(0.17677669f)); /* 1 / sqrt(HEAD) */
                    score[one] = OF(chosen)(seen, score[one], none);
                    OP(storeu_ps)(scores + one * wide + at, score[one]);
                    most[one] = OP(max_ps)(most[one], score[one]);
                }
            }
            for (int one = 0; one < QUERIES; one++) {
                float *own = scores + one * wide;
                OF(Vector) sum = OP(setzero_ps)();
                most[one] = OP(set1_ps)(OF(top)(most[one]));
                for (Py_ssize_t at = 0; at < wide; at += LANES) {
                    OF(Vector) share = OF(power)(OP(sub_ps)(OP(loadu_ps)(own + at), most[one]));
                    share = OF(chosen)(at + LANES > tokens ? last : every, share, OP(setzero_ps)());
                    OP(storeu_ps)(own + at, share);
                    sum = OP(add_ps)(sum, share);
                }
                most[one] = OP(set1_ps)(1.0f / OF(total)(sum));
            }
            for (int part = 0; part < HEAD; part += 2 * LANES) { /* as much as the registers hold */
                for (int one = 0; one < QUERIES; one++)
                    left[one] = right[one] = OP(setzero_ps)();
                for (Py_ssize_t other = 0; other < tokens; other++) {
                    const float *value = of + other * 3 * DIM + 2 * DIM + part;
                    const OF(Vector) low = OP(loadu_ps)(value), high = OP(loadu_ps)(value + LANES);
                    for (int one = 0; one < QUERIES; one++) {
                        const OF(Vector) share = OP(set1_ps)(scores[one * wide + other]);
                        left[one] = OP(fmadd_ps)(share, low, left[one]);
                        right[one] = OP(fmadd_ps)(share, high, right[one]);
                    }
                }
                for (int one = 0; one < QUERIES && token + one < tokens; one++) {
                    float *out = to + (token + one) * DIM + head * HEAD + part;
                    OP(storeu_ps)(out, OP(mul_ps)(left[one], most[one]));
                    OP(storeu_ps)(out + LANES, OP(mul_ps)(right[one], most[one]));
                }
            }
        }
    }
}

/* rows = branch + rows · entered */
HERE static void OF(add)(float *rows, const float *branch, const float *entered) {
    for (int i = 0; i < DIM; i += LANES) {
        OF(Vector) kept = OP(fmadd_ps)(OP(loadu_ps)(rows + i), OP(loadu_ps)(entered + i), OP(loadu_ps)(branch + i));
        OP(storeu_ps)(rows + i, kept);
    }
}

HERE static void OF(layer_of)(const Layer *of, float *rows, const int32_t *lengths, Py_ssize_t texts,
                              Py_ssize_t count, const Room *room) {
    for (Py_ssize_t row = 0; row < count; row++) {
        OF(norm)(rows + row * DIM, rows + row * DIM, of->gain, of->shift);
        OF(to_bytes)(room->bytes + row * DIM, rows + row * DIM, DIM, of->mixed.inverse, of->mixed.zero);
    }
    OF(multiply)(room->wide, 3 * DIM, room->bytes, count, DIM, &of->mixed);
    for (Py_ssize_t text = 0, row = 0; text < texts; row += lengths[text++])
        OF(attend)(room->branch + row * DIM, room->wide + row * 3 * DIM, lengths[text], room->keys, room->scores);
    OF(to_bytes)(room->bytes, room->branch, count * DIM, of->out.inverse, of->out.zero);
    OF(multiply)(room->branch, DIM, room->bytes, count, DIM, &of->out);
    for (Py_ssize_t row = 0; row < count; row++) {
        float *own = rows + row * DIM;
        OF(add)(own, room->branch + row * DIM, of->entered);
        OF(norm)(own, own, of->second_gain, of->second_shift);
        OF(to_bytes)(room->bytes + row * DIM, own, DIM, of->up.inverse, of->up.zero);
    }
    OF(multiply)(room->wide, HIDDEN, room->bytes, count, DIM, &of->up);
    for (Py_ssize_t row = 0; row < count; row++) {
        OF(gate)(room->wide + row * HIDDEN, of->even, HIDDEN);
        OF(to_bytes)(room->bytes + row * HIDDEN, room->wide + row * HIDDEN, HIDDEN, of->down.inverse, of->down.zero);
    }
    OF(multiply)(room->branch, DIM, room->bytes, count, HIDDEN, &of->down);
    for (Py_ssize_t row = 0; row < count; row++)
        OF(add)(rows + row * DIM, room->branch + row * DIM, of->second_entered);
}

static void OF(encode)(const Py_ssize_t *n, float *rows, const int32_t *lengths, Py_ssize_t texts,
                       Py_ssize_t count, const Room *room) {
    const Py_ssize_t layers = n[0], *own = n + 4;
    const float *floats = (const float *)n[1];
    for (Py_ssize_t at = 0; at < layers; at++, own += ADDRESSES, floats += 8) {
        Layer of = {(const float *)own[0], (const float *)own[1], (const float *)own[2], product(own + 3, floats),
                    product(own + 6, floats + 2), (const float *)own[9], (const float *)own[10],
                    (const float *)own[11], product(own + 12, floats + 4), product(own + 15, floats + 6),
                    (const float *)own[18]};
        OF(layer_of)(&of, rows, lengths, texts, count, room);
    }
    for (Py_ssize_t row = 0; row < count; row++)
        OF(norm)(rows + row * DIM, rows + row * DIM, (const float *)n[2], (const float *)n[3]);
}

INNER float OF(dot)(const float *one, const float *other, Py_ssize_t size) {
    OF(Vector) first = OP(setzero_ps)(), second = first;
    for (Py_ssize_t i = 0; i < size; i += 2 * LANES) {
        first = OP(fmadd_ps)(OP(loadu_ps)(one + i), OP(loadu_ps)(other + i), first);
        second = OP(fmadd_ps)(OP(loadu_ps)(one + i + LANES), OP(loadu_ps)(other + i + LANES), second);
    }
    return OF(total)(OP(add_ps)(first, second));
}

/* One row: weights [columns, depth] times x, and bias; gated or not. */
HERE static void OF(dense_row)(float *out, const float *x, const float *weights, const float *bias, Py_ssize_t columns,
                               Py_ssize_t depth, Py_ssize_t gated) {
    for (Py_ssize_t column = 0; column < columns; column++)
        out[column] = OF(dot)(x, weights + column * depth, depth) + bias[column];
    if (gated)
        OF(gate)(out, NULL, columns);
}

#undef LANES
#undef MOST
#undef OF
#undef OP
#undef HERE
#undef INNER
