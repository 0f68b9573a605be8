/* Whole HTTP/1.1 messages of the plain shape, read in one pass: see scan.py, which says what that is for.
 *
 * A function returns None for whatever is not exactly of that shape: cut, followed by more, with a header that changes
 * how a message is framed or its connection used, with one twice, with a byte that two readers might take differently.
 * Nobody is refused here, and nothing is read that llhttp, which gets all of those, would read in another way.
 * Pointers stay within [at, end); every read is behind a comparison with `end`.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#define HEAD_MAX 16384
#define LINES_MAX 64
#define DIGITS_MAX 7 /* of a length: below 10 MB */
#define CHUNK_DIGITS_MAX 6

typedef struct {
    const char *name, *value;
    Py_ssize_t name_size, value_size;
} Line;

typedef struct {
    Py_ssize_t length; /* -1: not told */
    int chunked;
    int strange; /* what only llhttp may decide about */
} Framing;

static int is_name(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
}

static int is_target(unsigned char c)
{
    return is_name(c) || c == '/' || c == '.' || c == '_' || c == ':';
}

static int is_text(unsigned char c)
{
    return c >= 0x20 && c <= 0x7e;
}

static unsigned char lower(unsigned char c)
{
    return c >= 'A' && c <= 'Z' ? c + 32 : c;
}

static int named(const Line *line, const char *name, Py_ssize_t size)
{
    if (line->name_size != size)
        return 0;
    for (Py_ssize_t i = 0; i < size; i++)
        if (lower((unsigned char)line->name[i]) != (unsigned char)name[i])
            return 0;
    return 1;
}

#define NAMED(line, name) named(line, name, sizeof(name) - 1)

static int is_line_end(const char *at, const char *end)
{
    return end - at >= 2 && at[0] == '\r' && at[1] == '\n';
}

/* The header line at *at: 1 and *at behind it; 0 and *at behind the empty line that ends a head; -1 for anything else. */
static int next_line(const char **at, const char *end, Line *line)
{
    const char *p = *at;
    if (is_line_end(p, end)) {
        *at = p + 2;
        return 0;
    }
    line->name = p;
    while (p < end && is_name((unsigned char)*p))
        p++;
    line->name_size = p - line->name;
    if (!line->name_size || p >= end || *p != ':')
        return -1;
    p++;
    if (p < end && *p == ' ')
        p++;
    line->value = p;
    while (p < end && is_text((unsigned char)*p))
        p++;
    line->value_size = p - line->value;
    if (!line->value_size || line->value[0] == ' ' || p[-1] == ' ' || !is_line_end(p, end))
        return -1;
    *at = p + 2;
    return 1;
}

/* What a header says of its message's framing; 0 for one that says nothing of it. */
static int note(Framing *framing, const Line *line)
{
    if (NAMED(line, "content-length")) {
        if (framing->length >= 0 || line->value_size > DIGITS_MAX) {
            framing->strange = 1;
            return 1;
        }
        Py_ssize_t length = 0;
        for (Py_ssize_t i = 0; i < line->value_size; i++) {
            char c = line->value[i];
            if (c < '0' || c > '9') {
                framing->strange = 1;
                return 1;
            }
            length = length * 10 + (c - '0');
        }
        framing->length = length;
        return 1;
    }
    if (NAMED(line, "transfer-encoding")) {
        if (framing->chunked || line->value_size != 7 || memcmp(line->value, "chunked", 7))
            framing->strange = 1;
        framing->chunked = 1;
        return 1;
    }
    if (NAMED(line, "connection") || NAMED(line, "proxy-connection") || NAMED(line, "upgrade") || NAMED(line, "expect") ||
        NAMED(line, "content-encoding") || NAMED(line, "trailer"))
        framing->strange = 1;
    return 0;
}

static int add(PyObject *headers, const Line *line)
{
    Py_ssize_t before = PyDict_GET_SIZE(headers);
    /* Made empty: of one letter that is given there is one object in the whole process. */
    PyObject *value = NULL, *name = PyBytes_FromStringAndSize(NULL, line->name_size);
    int failed = -1;
    if (!name)
        return -1;
    char *letters = PyBytes_AS_STRING(name);
    for (Py_ssize_t i = 0; i < line->name_size; i++)
        letters[i] = (char)lower((unsigned char)line->name[i]);
    value = PyBytes_FromStringAndSize(line->value, line->value_size);
    if (value)
        failed = PyDict_SetItem(headers, name, value);
    Py_DECREF(name);
    Py_XDECREF(value);
    if (failed)
        return -1;
    return PyDict_GET_SIZE(headers) == before; /* 1: it was there */
}

static PyObject *scan_request(PyObject *self, PyObject *data)
{
    if (!PyBytes_CheckExact(data)) {
        PyErr_SetString(PyExc_TypeError, "bytes are read here");
        return NULL;
    }
    const char *at = PyBytes_AS_STRING(data), *end = at + PyBytes_GET_SIZE(data);
    const char *head_end = end - at > HEAD_MAX ? at + HEAD_MAX : end;
    const char *method = at;
    Py_ssize_t method_size = 0;
    if (end - at > 5 && !memcmp(at, "POST ", 5))
        method_size = 4;
    else if (end - at > 4 && !memcmp(at, "GET ", 4))
        method_size = 3;
    else
        Py_RETURN_NONE;
    at += method_size + 1;
    const char *target = at;
    while (at < head_end && is_target((unsigned char)*at))
        at++;
    Py_ssize_t target_size = at - target;
    if (!target_size || *target != '/' || head_end - at < 11 || memcmp(at, " HTTP/1.1\r\n", 11))
        Py_RETURN_NONE;
    at += 11;

    PyObject *headers = PyDict_New();
    if (!headers)
        return NULL;
    Framing framing = {-1, 0, 0};
    Line line;
    int more, lines = 0, hosts = 0;
    while ((more = next_line(&at, head_end, &line)) == 1) {
        note(&framing, &line);
        hosts += NAMED(&line, "host");
        int there = framing.strange || framing.chunked || ++lines > LINES_MAX ? 1 : add(headers, &line);
        if (there) {
            Py_DECREF(headers);
            if (there < 0)
                return NULL;
            Py_RETURN_NONE;
        }
    }
    /* A POST tells its length, a GET has no body; nothing follows. */
    Py_ssize_t length = framing.length < 0 ? 0 : framing.length;
    if (more < 0 || !hosts || (method_size == 4) != (framing.length >= 0) || end - at != length) {
        Py_DECREF(headers);
        Py_RETURN_NONE;
    }
    return Py_BuildValue("(y#y#Ny#)", method, method_size, target, target_size, headers, at, length);
}

/* The data of a chunked body that ends at `end`, into `out` unless that is NULL; its size, or -1 for anything else. */
static Py_ssize_t unchunk(const char *at, const char *end, char *out)
{
    Py_ssize_t total = 0;
    for (;;) {
        Py_ssize_t size = 0;
        int digits = 0;
        for (; at < end; at++, digits++) {
            unsigned char c = lower((unsigned char)*at);
            if (c >= '0' && c <= '9')
                size = size * 16 + (c - '0');
            else if (c >= 'a' && c <= 'f')
                size = size * 16 + (c - 'a' + 10);
            else
                break;
            if (digits >= CHUNK_DIGITS_MAX)
                return -1;
        }
        if (!digits || !is_line_end(at, end))
            return -1;
        at += 2;
        if (end - at < size + 2 || !is_line_end(at + size, end))
            return -1;
        if (!size)
            return end - at == 2 ? total : -1;
        if (out)
            memcpy(out + total, at, (size_t)size);
        total += size;
        at += size + 2;
    }
}

static PyObject *scan_response(PyObject *self, PyObject *data)
{
    if (!PyBytes_CheckExact(data)) {
        PyErr_SetString(PyExc_TypeError, "bytes are read here");
        return NULL;
    }
    const char *at = PyBytes_AS_STRING(data), *end = at + PyBytes_GET_SIZE(data);
    const char *head_end = end - at > HEAD_MAX ? at + HEAD_MAX : end;
    if (head_end - at < 13 || memcmp(at, "HTTP/1.1 ", 9) || at[12] != ' ')
        Py_RETURN_NONE;
    int status = 0;
    for (int i = 9; i < 12; i++) {
        if (at[i] < '0' || at[i] > '9')
            Py_RETURN_NONE;
        status = status * 10 + (at[i] - '0');
    }
    if (status < 200 || status > 599 || status == 204 || status == 304)
        Py_RETURN_NONE;
    at += 13;
    while (at < head_end && is_text((unsigned char)*at))
        at++;
    if (!is_line_end(at, head_end))
        Py_RETURN_NONE;
    at += 2;

    Framing framing = {-1, 0, 0};
    Line line, proxied = {NULL, "", 0, 0};
    int more, lines = 0;
    while ((more = next_line(&at, head_end, &line)) == 1) {
        if (!note(&framing, &line) && NAMED(&line, "x-corral-proxy")) {
            framing.strange |= proxied.name != NULL;
            proxied = line;
        }
        if (framing.strange || ++lines > LINES_MAX)
            Py_RETURN_NONE;
    }
    if (more < 0 || framing.chunked == (framing.length >= 0))
        Py_RETURN_NONE;
    PyObject *body;
    if (framing.chunked) {
        Py_ssize_t size = unchunk(at, end, NULL);
        if (size < 0)
            Py_RETURN_NONE;
        body = PyBytes_FromStringAndSize(NULL, size);
        if (body)
            unchunk(at, end, PyBytes_AS_STRING(body));
    } else {
        if (end - at != framing.length)
            Py_RETURN_NONE;
        body = PyBytes_FromStringAndSize(at, framing.length);
    }
    if (!body)
        return NULL;
    return Py_BuildValue("(iy#N)", status, proxied.value, proxied.value_size, body);
}

static PyMethodDef functions[] = {
    {"request", scan_request, METH_O, "Method, target, headers by lower-case name, and body of a whole plain request."},
    {"response", scan_response, METH_O, "Status, HAProxy's mark and body of a whole plain answer."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_scan", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__scan(void)
{
    return PyModule_Create(&module);
}
