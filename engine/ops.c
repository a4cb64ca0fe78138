/* The small steps between a decoder's matrix products on a CPU, one pass each; torch takes up to a dozen.
 *
 * Numbers are read as float32 and rounded to their dtype once, at the end of a step (sums of a residual stream, which
 * are kept, when they are made). Rows are shared out by the OpenMP that torch has loaded, if there are enough of them.
 */
#include "loops.h"

#define LANES 16
#define SHARED 65536 /* numbers from which on more than one thread takes part */

/* e to the x, to about a unit in the seventh place, infinite from 88.4 on; a loop of it needs no calls. */
static inline float power(float x) {
    x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
    float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f, rest = x - whole * 0.693145752f;
    rest -= whole * 1.42860677e-6f;
    float y = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.16666667f + rest * (0.041666667f +
              rest * (0.0083333333f + rest * 0.0013888889f)))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return y * scale;
}

/* KIND: name of the dtype here, TYPE: what it is kept as. */
#define STEPS(KIND, TYPE)                                                                                              \
    CLONES static float length_##KIND(const TYPE *x, Py_ssize_t size) {                                                \
        float sums[LANES] = {0}, sum = 0;                                                                              \
        Py_ssize_t i = 0;                                                                                              \
        for (; i + LANES <= size; i += LANES)                                                                          \
            for (int j = 0; j < LANES; j++)                                                                            \
                sums[j] += wide_##KIND(x[i + j]) * wide_##KIND(x[i + j]);                                              \
        for (; i < size; i++)                                                                                          \
            sum += wide_##KIND(x[i]) * wide_##KIND(x[i]);                                                              \
        for (int j = 0; j < LANES; j++)                                                                                \
            sum += sums[j];                                                                                            \
        return sum;                                                                                                    \
    }                                                                                                                  \
    CLONES static void sum_##KIND(TYPE *restrict out, const TYPE *restrict x, const TYPE *restrict delta,              \
                                  Py_ssize_t size) {                                                                   \
        for (Py_ssize_t i = 0; i < size; i++)                                                                          \
            out[i] = narrow_##KIND(wide_##KIND(x[i]) + wide_##KIND(delta[i]));                                         \
    }                                                                                                                  \
    CLONES static void norm_##KIND(TYPE *out, const TYPE *x, const TYPE *restrict weight, Py_ssize_t size,             \
                                   float eps) {                                                                        \
        float scale = 1.0f / sqrtf(length_##KIND(x, size) / (float)size + eps);                                        \
        for (Py_ssize_t i = 0; i < size; i++)                                                                          \
            out[i] = narrow_##KIND(wide_##KIND(x[i]) * scale * wide_##KIND(weight[i]));                                \
    }                                                                                                                  \
    CLONES static void gate_##KIND(TYPE *restrict out, const TYPE *restrict both, Py_ssize_t size) {                   \
        for (Py_ssize_t i = 0; i < size; i++) {                                                                        \
            float gate = wide_##KIND(both[i]);                                                                         \
            out[i] = narrow_##KIND(gate / (1.0f + power(-gate)) * wide_##KIND(both[size + i]));                        \
        }                                                                                                              \
    }                                                                                                                  \
    CLONES static void turn_##KIND(TYPE *restrict x, const TYPE *restrict cosines, const TYPE *restrict sines,         \
                                   Py_ssize_t half) {                                                                  \
        for (Py_ssize_t i = 0; i < half; i++) {                                                                        \
            float a = wide_##KIND(x[i]), b = wide_##KIND(x[i + half]);                                                 \
            x[i] = narrow_##KIND(a * wide_##KIND(cosines[i]) + b * wide_##KIND(sines[i]));                             \
            x[i + half] = narrow_##KIND(b * wide_##KIND(cosines[i + half]) + a * wide_##KIND(sines[i + half]));        \
        }                                                                                                              \
    }                                                                                                                  \
    static void add_norm_##KIND(const Py_ssize_t *n, float eps) {                                                      \
        const Py_ssize_t rows = n[5], size = n[6];                                                                     \
        _Pragma("omp parallel for if (rows * size >= SHARED)") for (Py_ssize_t row = 0; row < rows; row++) {           \
            const TYPE *x = (const TYPE *)n[0] + row * size;                                                           \
            TYPE *summed = (TYPE *)n[3] + row * size;                                                                  \
            if (n[1]) {                                                                                                \
                sum_##KIND(summed, x, (const TYPE *)n[1] + row * size, size);                                          \
                x = summed;                                                                                            \
            }                                                                                                          \
            norm_##KIND((TYPE *)n[4] + row * size, x, (const TYPE *)n[2], size, eps);                                  \
        }                                                                                                              \
    }                                                                                                                  \
    static void gated_##KIND(const Py_ssize_t *n) {                                                                    \
        const Py_ssize_t rows = n[2], size = n[3];                                                                     \
        _Pragma("omp parallel for if (rows * size >= SHARED)") for (Py_ssize_t row = 0; row < rows; row++)             \
            gate_##KIND((TYPE *)n[1] + row * size, (const TYPE *)n[0] + 2 * row * size, size);                         \
    }                                                                                                                  \
    static void turn_write_##KIND(const Py_ssize_t *n, float eps) {                                                    \
        const Py_ssize_t rows = n[8], heads = n[9], kv = n[10], dim = n[11], total = heads + 2 * kv;                   \
        const TYPE *norms[2] = {(const TYPE *)n[3], (const TYPE *)n[4]};                                               \
        const int64_t *slots = (const int64_t *)n[7];                                                                  \
        _Pragma("omp parallel for if (rows * total * dim >= SHARED)") for (Py_ssize_t row = 0; row < rows; row++) {    \
            TYPE *x = (TYPE *)n[0] + row * total * dim, *keys = x + heads * dim;                                       \
            for (Py_ssize_t head = 0; head < heads + kv; head++) {                                                     \
                if (norms[0])                                                                                          \
                    norm_##KIND(x + head * dim, x + head * dim, norms[head >= heads], dim, eps);                       \
                turn_##KIND(x + head * dim, (const TYPE *)n[1] + row * dim, (const TYPE *)n[2] + row * dim, dim / 2);  \
            }                                                                                                          \
            memcpy((TYPE *)n[5] + slots[row] * kv * dim, keys, kv * dim * sizeof(TYPE));                               \
            memcpy((TYPE *)n[6] + slots[row] * kv * dim, keys + kv * dim, kv * dim * sizeof(TYPE));                    \
        }                                                                                                              \
    }

STEPS(bf16, bf16)
STEPS(float, float)

#define MOST 13

/* What follows takes addresses and sizes in the order of their use above, then the bytes of a number, then eps. */
#define CALL(NAME, COUNT, FUNCTION, ...)                                                                               \
    static PyObject *NAME(PyObject *self, PyObject *const *args, Py_ssize_t given) {                                   \
        Py_ssize_t n[MOST];                                                                                            \
        const int more = given > COUNT;                                                                                \
        float eps = more ? (float)PyFloat_AsDouble(args[COUNT]) : 0;                                                   \
        if (PyErr_Occurred() || numbers(args, given - more, COUNT, n) < 0)                                             \
            return NULL;                                                                                               \
        (void)eps;                                                                                                     \
        Py_BEGIN_ALLOW_THREADS;                                                                                        \
        if (n[COUNT - 1] == 2)                                                                                         \
            FUNCTION##_bf16(__VA_ARGS__);                                                                              \
        else                                                                                                           \
            FUNCTION##_float(__VA_ARGS__);                                                                             \
        Py_END_ALLOW_THREADS;                                                                                          \
        Py_RETURN_NONE;                                                                                                \
    }

/* add_norm(x, delta or 0, weight, summed, normed, rows, size, bytes, eps) */
CALL(add_norm, 8, add_norm, n, eps)
/* gate(both, out, rows, size, bytes) */
CALL(gate, 5, gated, n)
/* turn_write(mixed, cosines, sines, query norm or 0, key norm, pool's keys, its values, slots, rows, heads, kv heads,
 * dim, bytes, eps) */
CALL(turn_write, 13, turn_write, n, eps)

static PyMethodDef methods[] = {
    {"add_norm", (PyCFunction)(void (*)(void))add_norm, METH_FASTCALL, NULL},
    {"gate", (PyCFunction)(void (*)(void))gate, METH_FASTCALL, NULL},
    {"turn_write", (PyCFunction)(void (*)(void))turn_write, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__ops(void) { return PyModule_Create(&module); }
