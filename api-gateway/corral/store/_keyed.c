/* HMAC-SHA-256 (RFC 2104) of a text's SHA-256, under a key whose two halves are computed once: see content.py.
 *
 * The rounds are OpenSSL's: its SHA256_* functions, found in the library that Python's own hashlib has loaded. Through
 * hashlib each hash makes and frees contexts that cost ten times what the rounds of a short text do.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#define DIGEST 32
#define BLOCK 64

/* SHA256_CTX of <openssl/sha.h>, the same since 0.9.8: 112 bytes. There is room for more, should it ever grow. */
typedef union {
    unsigned char bytes[256];
    uint64_t aligned;
} Context;

typedef struct {
    int (*init)(void *);
    int (*update)(void *, const void *, size_t);
    int (*final)(unsigned char *, void *);
} Functions;

static Functions sha256; /* all of them, or none */

/* A void pointer to a function, as POSIX has it of dlsym. */
static int find(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static PyObject *use(PyObject *module, PyObject *argument)
{
    Functions found;
    const char *path = PyUnicode_AsUTF8(argument);
    if (path == NULL)
        return NULL;
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL || !find(library, "SHA256_Init", &found.init) ||
        !find(library, "SHA256_Update", &found.update) || !find(library, "SHA256_Final", &found.final))
        Py_RETURN_FALSE;
    sha256 = found;
    Py_RETURN_TRUE; /* the library stays open: its functions are used from now on */
}

static PyObject *halves(PyObject *module, PyObject *argument)
{
    char *key;
    Py_ssize_t size;
    Context contexts[2];
    unsigned char padded[BLOCK];
    if (PyBytes_AsStringAndSize(argument, &key, &size) < 0)
        return NULL;
    if (size > BLOCK || sha256.final == NULL) {
        PyErr_SetString(PyExc_ValueError, "a key of at most 64 bytes, after use() has found its functions");
        return NULL;
    }
    memset(contexts, 0, sizeof contexts);
    for (int half = 0; half < 2; half++) {
        memset(padded, half ? 0x5c : 0x36, BLOCK);
        for (Py_ssize_t i = 0; i < size; i++)
            padded[i] ^= (unsigned char)key[i];
        sha256.init(&contexts[half]);
        sha256.update(&contexts[half], padded, BLOCK);
    }
    return PyBytes_FromStringAndSize((char *)contexts, sizeof contexts);
}

static PyObject *keyed(const char *both, const unsigned char *digest)
{
    static const char HEX[] = "0123456789abcdef";
    Context context;
    unsigned char hash[DIGEST];
    memcpy(&context, both, sizeof context);
    sha256.update(&context, digest, DIGEST);
    sha256.final(hash, &context);
    memcpy(&context, both + sizeof context, sizeof context);
    sha256.update(&context, hash, DIGEST);
    sha256.final(hash, &context);
    PyObject *text = PyUnicode_New(2 * DIGEST, 127);
    if (text == NULL)
        return NULL;
    Py_UCS1 *hex = PyUnicode_1BYTE_DATA(text);
    for (int i = 0; i < DIGEST; i++) {
        *hex++ = (Py_UCS1)HEX[hash[i] >> 4];
        *hex++ = (Py_UCS1)HEX[hash[i] & 15];
    }
    return text;
}

/* The halves and the bytes of a call's two arguments; 0 and an error set where they are something else. */
static int taken(PyObject *const *arguments, Py_ssize_t count, char **both, char **data, Py_ssize_t *size)
{
    Py_ssize_t length;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "two arguments: the halves, and bytes");
        return 0;
    }
    if (PyBytes_AsStringAndSize(arguments[0], both, &length) < 0 || PyBytes_AsStringAndSize(arguments[1], data, size) < 0)
        return 0;
    if (length != 2 * (Py_ssize_t)sizeof(Context) || sha256.final == NULL) {
        PyErr_SetString(PyExc_ValueError, "the first argument is not of halves()");
        return 0;
    }
    return 1;
}

static PyObject *of_digest(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    char *both, *data;
    Py_ssize_t size;
    if (!taken(arguments, count, &both, &data, &size))
        return NULL;
    if (size != DIGEST) {
        PyErr_SetString(PyExc_ValueError, "a SHA-256 has 32 bytes");
        return NULL;
    }
    return keyed(both, (const unsigned char *)data);
}

static PyObject *of_text(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    char *both, *data;
    Py_ssize_t size;
    Context context;
    unsigned char digest[DIGEST];
    if (!taken(arguments, count, &both, &data, &size))
        return NULL;
    sha256.init(&context);
    sha256.update(&context, data, (size_t)size);
    sha256.final(digest, &context);
    return keyed(both, digest);
}

static PyMethodDef methods[] = {
    {"use", use, METH_O, "Whether the library at a path, which is loaded, leads to the functions this needs."},
    {"halves", halves, METH_O, "The two halves of a key, for the functions below."},
    {"of_digest", (PyCFunction)(void (*)(void))of_digest, METH_FASTCALL, "The keyed hash of a text's SHA-256, in hex."},
    {"of_text", (PyCFunction)(void (*)(void))of_text, METH_FASTCALL, "The keyed hash of a text, in hex."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_keyed",
    .m_doc = "Keyed hashes of texts, by the library of hashlib.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__keyed(void)
{
    return PyModule_Create(&definition);
}
