/* The hashes of a prompt's beginnings in one pass over the body: what `chain(…, messages(body), least)` of dispatch.py
 * returns, which serves where this is not compiled.
 *
 * Pointers stay within [at, end); the hash of a piece is the one that Python gives these bytes in this process.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if PY_VERSION_HEX >= 0x030E0000
#define HASH Py_HashBuffer
#else
#define HASH _Py_HashBytes
#if PY_VERSION_HEX >= 0x030D0000
PyAPI_FUNC(Py_hash_t) _Py_HashBytes(const void *, Py_ssize_t); /* 3.13 exports it, and does not declare it */
#endif
#endif

/* As in dispatch.py. */
#define BLOCK 4096
#define CHAIN_MAX 64
#define PRIME 1099511628211u
#define MASK ((1ull << 60) - 1)
#define MESSAGE "{\"role\":"
#define LAST "}]"
#define NEXT "},"

typedef struct {
    uint64_t values[CHAIN_MAX];
    uint64_t value;
    Py_ssize_t count, size, least;
} Chain;

static uint64_t joined(uint64_t value, Py_hash_t hash)
{
    return ((value ^ (uint64_t)hash) * PRIME) & MASK;
}

/* One more piece of a text; 0 where no more are told apart. */
static int piece(Chain *chain, const char *at, Py_ssize_t size)
{
    if (chain->count >= CHAIN_MAX)
        return 0;
    chain->value = joined(chain->value, HASH(at, size));
    chain->size += size;
    if (chain->size >= chain->least)
        chain->values[chain->count++] = chain->value;
    return 1;
}

/* A text: `size` bytes, and behind them `more` (at most two bytes) that stand somewhere else. */
static int text(Chain *chain, const char *at, Py_ssize_t size, const char *more)
{
    Py_ssize_t behind = (Py_ssize_t)strlen(more);
    char joint[BLOCK];
    do {
        if (size >= BLOCK || !behind) {
            Py_ssize_t taken = size < BLOCK ? size : BLOCK;
            if (!piece(chain, at, taken))
                return 0;
            at += taken;
            size -= taken;
        } else {
            Py_ssize_t added = behind < BLOCK - size ? behind : BLOCK - size;
            memcpy(joint, at, (size_t)size);
            memcpy(joint + size, more, (size_t)added);
            if (!piece(chain, joint, size + added))
                return 0;
            at += size;
            size = 0;
            more += added;
            behind -= added;
        }
    } while (size || behind);
    chain->value = joined(chain->value, 0);
    return 1;
}

/* Where a marker stands first, or NULL. Its first byte is rare in texts, and memchr is ten times as fast as memmem. */
static const char *find(const char *at, const char *end, const char *marker, Py_ssize_t size)
{
    while (end - at >= size && (at = memchr(at, marker[0], (size_t)(end - at))) != NULL) {
        if (end - at >= size && !memcmp(at, marker, (size_t)size))
            return at;
        at++;
    }
    return NULL;
}

static void walk(Chain *chain, const char *at, const char *end)
{
    const Py_ssize_t size = sizeof(MESSAGE) - 1;
    const char *found = find(at, end, MESSAGE, size);
    if (found == NULL) {
        text(chain, at, end - at, "");
        return;
    }
    for (;;) {
        at = found + size;
        found = find(at, end, MESSAGE, size);
        if (found == NULL)
            break;
        if (!text(chain, at, found - at, ""))
            return;
    }
    const char *last = find(at, end, LAST, sizeof(LAST) - 1);
    text(chain, at, (last == NULL ? end : last) - at, NEXT);
}

static PyObject *beginnings(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    char *body;
    Py_ssize_t size;
    Chain chain = {.count = 0, .size = 0};
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "three arguments: a number to begin with, bytes, and the least size");
        return NULL;
    }
    chain.value = PyLong_AsUnsignedLongLong(arguments[0]);
    chain.least = PyLong_AsSsize_t(arguments[2]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[1], &body, &size) < 0)
        return NULL;
    walk(&chain, body, body + size);
    PyObject *list = PyList_New(chain.count);
    for (Py_ssize_t i = 0; list != NULL && i < chain.count; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(chain.values[i]);
        if (value == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, value);
    }
    return list;
}

static PyMethodDef methods[] = {
    {"beginnings", (PyCFunction)(void (*)(void))beginnings, METH_FASTCALL, "Hashes of a body's beginnings."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_beginnings",
    .m_doc = "The hashes of a prompt's beginnings.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__beginnings(void)
{
    return PyModule_Create(&definition);
}
