/* Two loops over keys and values that torch takes a dozen passes for: decoding int8, and turning keys while they are
 * written to the pool. Whoever calls holds the memory and has checked sizes (native.py); the interpreter is let go of.
 *
 * Products and sums are of float32, and rounded to the tensor's dtype once, to even, as torch does it; a product and the
 * sum that it goes into may be rounded together.
 */
#include "loops.h"

#define GROUP 64 /* tokens that share the scale of a key channel, as in codecs.py */

/* KIND: name of the dtype here, TYPE: what it is kept as. */
#define LOOPS(KIND, TYPE)                                                                                              \
    CLONES static void keys_##KIND(TYPE *restrict out, const uint8_t *restrict levels, const TYPE *restrict step,     \
                                   const TYPE *restrict low, Py_ssize_t tokens, Py_ssize_t width) {                    \
        for (Py_ssize_t t = 0; t < tokens; t++) {                                                                      \
            const TYPE *s = step + t / GROUP * width, *l = low + t / GROUP * width;                                    \
            for (Py_ssize_t i = 0; i < width; i++)                                                                     \
                out[t * width + i] =                                                                                   \
                    narrow_##KIND(wide_##KIND(l[i]) + (float)levels[t * width + i] * wide_##KIND(s[i]));               \
        }                                                                                                              \
    }                                                                                                                  \
    CLONES static void values_##KIND(TYPE *restrict out, const int8_t *restrict levels, const TYPE *restrict unit,     \
                                     Py_ssize_t rows, Py_ssize_t dim) {                                                \
        for (Py_ssize_t r = 0; r < rows; r++) {                                                                        \
            float u = wide_##KIND(unit[r]);                                                                            \
            for (Py_ssize_t i = 0; i < dim; i++)                                                                       \
                out[r * dim + i] = narrow_##KIND((float)levels[r * dim + i] * u);                                      \
        }                                                                                                              \
    }                                                                                                                  \
    CLONES static void turn_##KIND(TYPE *restrict out, const TYPE *restrict keys, const float *restrict cosines,       \
                                   const float *restrict sines, Py_ssize_t heads, Py_ssize_t half) {                   \
        for (Py_ssize_t h = 0; h < heads; h++, keys += 2 * half, out += 2 * half)                                      \
            for (Py_ssize_t i = 0; i < half; i++) {                                                                    \
                float a = wide_##KIND(keys[i]), b = wide_##KIND(keys[i + half]);                                       \
                out[i] = narrow_##KIND(a * cosines[i] + b * sines[i]);                                                 \
                out[i + half] = narrow_##KIND(b * cosines[i + half] + a * sines[i + half]);                            \
            }                                                                                                          \
    }                                                                                                                  \
    static void decode_##KIND(TYPE *out, const TYPE *step, const TYPE *low, const uint8_t *levels, const TYPE *unit,  \
                              const int8_t *signs, Py_ssize_t layers, Py_ssize_t tokens, Py_ssize_t heads,             \
                              Py_ssize_t dim) {                                                                        \
        Py_ssize_t width = heads * dim, scales = (tokens + GROUP - 1) / GROUP * width;                                 \
        for (Py_ssize_t layer = 0; layer < layers; layer++, out += 2 * tokens * width) {                               \
            keys_##KIND(out, levels + layer * scales * GROUP, step + layer * scales, low + layer * scales, tokens,     \
                        width);                                                                                        \
            values_##KIND(out + tokens * width, signs + layer * tokens * width, unit + layer * tokens * heads,         \
                          tokens * heads, dim);                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    static void place_##KIND(TYPE *pool, const TYPE *keys, const float *cosines, const float *sines,                   \
                             const int64_t *slots, int64_t first, Py_ssize_t tokens, Py_ssize_t heads,                 \
                             Py_ssize_t dim) {                                                                         \
        for (Py_ssize_t t = 0; t < tokens; t++)                                                                        \
            turn_##KIND(pool + (slots ? slots[t] : first + t) * heads * dim, keys + t * heads * dim,                   \
                        cosines + t * dim, sines + t * dim, heads, dim / 2);                                           \
    }

LOOPS(bf16, bf16)
LOOPS(float, float)

/* decode(out, step, low, levels, unit, signs, layers, tokens, heads, dim, bytes of a number): addresses first. */
static PyObject *decode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[11];
    if (numbers(args, given, 11, n) < 0)
        return NULL;
    const uint8_t *levels = (const uint8_t *)n[3];
    const int8_t *signs = (const int8_t *)n[5];
    Py_BEGIN_ALLOW_THREADS;
    if (n[10] == 2)
        decode_bf16((bf16 *)n[0], (bf16 *)n[1], (bf16 *)n[2], levels, (bf16 *)n[4], signs, n[6], n[7], n[8], n[9]);
    else
        decode_float((float *)n[0], (float *)n[1], (float *)n[2], levels, (float *)n[4], signs, n[6], n[7], n[8], n[9]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* place(pool, keys, cosines, sines, slots or 0, first, tokens, heads, dim, bytes of a number): addresses first. */
static PyObject *place(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Py_ssize_t n[10];
    if (numbers(args, given, 10, n) < 0)
        return NULL;
    const float *cosines = (const float *)n[2], *sines = (const float *)n[3];
    const int64_t *slots = (const int64_t *)n[4];
    Py_BEGIN_ALLOW_THREADS;
    if (n[9] == 2)
        place_bf16((bf16 *)n[0], (const bf16 *)n[1], cosines, sines, slots, n[5], n[6], n[7], n[8]);
    else
        place_float((float *)n[0], (const float *)n[1], cosines, sines, slots, n[5], n[6], n[7], n[8]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decode", (PyCFunction)(void (*)(void))decode, METH_FASTCALL, NULL},
    {"place", (PyCFunction)(void (*)(void))place, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
