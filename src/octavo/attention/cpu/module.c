/* The Python module `_kernels`: one packed request a call, and what tests may set. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>
#include <math.h>
#include <string.h>

#include "copies.h"
#include "job.h"

static bool amx;

static void bytes_of(const int64_t *elements, int64_t *bytes, int64_t size) {
    for (int i = 0; i < 3; i++) bytes[i] = elements[i] * size;
}

static Asked asked_by(const Request *r) {
    Asked asked = {
        .query = (const char *)(intptr_t)r->query, .out = (char *)(intptr_t)r->out,
        .at = (const int32_t *)(intptr_t)r->at,
        .page_key = (const char *)(intptr_t)r->page_key, .page_value = (const char *)(intptr_t)r->page_value,
        .page_key_scale = (const char *)(intptr_t)r->page_key_scale,
        .page_value_scale = (const char *)(intptr_t)r->page_value_scale,
        .page_position = (const char *)(intptr_t)r->page_position,
        .page_expiry = (const char *)(intptr_t)r->page_expiry,
        .table = (const int32_t *)(intptr_t)r->table, .length = (const int32_t *)(intptr_t)r->length,
        .key = (const char *)(intptr_t)r->key, .value = (const char *)(intptr_t)r->value,
        .position = (const int32_t *)(intptr_t)r->position, .expiry = (const int32_t *)(intptr_t)r->expiry,
        .sinks = (const float *)(intptr_t)r->sinks,
        .batch = r->batch, .heads = r->heads, .kv_heads = r->kv_heads, .queries = r->queries,
        .tokens = r->tokens, .head_dim = r->head_dim, .page_size = r->page_size, .page_step = r->page_step,
        .table_step = {r->table_step[0], r->table_step[1]},
        .length_step = {r->length_step[0], r->length_step[1]},
        .dtype = (int)r->dtype, .page_dtype = (int)r->page_dtype,
        .threads = (int)larger(1, smaller(r->threads, MOST_THREADS)), .scale = r->scale, .softcap = r->softcap,
    };
    bytes_of(r->query_step, asked.query_step, SIZE_OF[r->dtype]);
    bytes_of(r->key_step, asked.key_step, SIZE_OF[r->dtype]);
    bytes_of(r->value_step, asked.value_step, SIZE_OF[r->dtype]);
    return asked;
}

/* Addresses and shapes are trusted (`kernels.py` checks them); what would divide by zero here is not. */
static bool readable(PyObject *packed, Request *request) {
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(packed, &bytes, &size) < 0) return false;
    if (size != sizeof *request) {
        PyErr_Format(PyExc_ValueError, "attention: a request has %zu bytes, not %zd", sizeof *request, size);
        return false;
    }
    memcpy(request, bytes, sizeof *request);
    bool quantised = request->page_dtype == INT8 || request->page_dtype == FLOAT8;
    bool scaled = request->page_key_scale && request->page_value_scale;
    if (request->dtype < 0 || request->dtype > FLOAT16 || request->page_dtype < 0 ||
        request->page_dtype >= DTYPES || request->kv_heads < 1 || request->page_size < 1 ||
        quantised != scaled || !isfinite(request->scale) || !isfinite(request->softcap) || request->softcap < 0) {
        PyErr_SetString(PyExc_ValueError, "attention: dtypes, KV heads, page size, page scales or the scale and "
                                          "softcap of scores are not possible");
        return false;
    }
    return true;
}

typedef bool Attend(const Asked *);

static PyObject *attended(PyObject *packed, Attend *attend) {
    Request request;
    if (!readable(packed, &request)) return NULL;
    Asked asked = asked_by(&request);
    bool enough;
    Py_BEGIN_ALLOW_THREADS
    enough = attend(&asked);
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_decode(PyObject *module, PyObject *packed) {
    (void)module;
    return attended(packed, decode_attend);
}

static PyObject *py_prefill(PyObject *module, PyObject *packed) {
    (void)module;
    if (!amx) {
        PyErr_SetString(PyExc_ValueError, "attention: prefill needs AMX");
        return NULL;
    }
    return attended(packed, prefill_attend);
}

/* Copies between pages and flat memory: `what` of copies.h. */
static PyObject *copied(PyObject *packed, int what) {
    char *bytes;
    Py_ssize_t size;
    Copies asked;
    if (PyBytes_AsStringAndSize(packed, &bytes, &size) < 0) return NULL;
    if (size != sizeof asked) return PyErr_Format(PyExc_ValueError, "copies: a request has %zu bytes", sizeof asked);
    memcpy(&asked, bytes, sizeof asked);
    if (asked.page_size < 1 || asked.rows < 0 || asked.last < asked.from) {
        PyErr_SetString(PyExc_ValueError, "copies: page size, rows or positions are not possible");
        return NULL;
    }
    asked.threads = larger(1, smaller(asked.threads, MOST_THREADS));
    bool enough;
    Py_BEGIN_ALLOW_THREADS
    enough = copies_run(&asked, what);
    Py_END_ALLOW_THREADS
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_fill(PyObject *module, PyObject *packed) {
    (void)module;
    return copied(packed, FILL);
}

static PyObject *py_choose(PyObject *module, PyObject *packed) {
    (void)module;
    return copied(packed, CHOOSE);
}

static PyObject *py_take(PyObject *module, PyObject *packed) {
    (void)module;
    return copied(packed, TAKE);
}

static PyObject *py_clear(PyObject *module, PyObject *packed) {
    (void)module;
    return copied(packed, CLEAR);
}

static PyObject *py_expired(PyObject *module, PyObject *packed) {
    (void)module;
    return copied(packed, EXPIRED);
}

static PyObject *py_amx(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return PyBool_FromLong(amx);
}

static PyObject *py_isa(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return PyUnicode_FromString(decode_isa());
}

static PyObject *py_set_isa(PyObject *module, PyObject *name) {
    (void)module;
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return NULL;
    bool known = decode_choose(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (known) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set %R", name);
}

static PyObject *py_set_chunk_work(PyObject *module, PyObject *work) {
    (void)module;
    long long least = PyLong_AsLongLong(work);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLongLong(decode_set_chunk_work(larger(1, least)));
}

static PyMethodDef methods[] = {
    {"decode", py_decode, METH_O, "decode(request): attention of few queries; see job.h."},
    {"prefill", py_prefill, METH_O, "prefill(request): attention of a chunk in bfloat16 on AMX; see job.h."},
    {"fill", py_fill, METH_O, "fill(request): flat slots into pages; see copies.h."},
    {"choose", py_choose, METH_O, "choose(request): which slots of rows are wanted, by position; see copies.h."},
    {"take", py_take, METH_O, "take(request): slots of pages into flat memory; see copies.h."},
    {"clear", py_clear, METH_O, "clear(request): pages without content; see copies.h."},
    {"expired", py_expired, METH_O, "expired(request): slots of rows that are free again; see copies.h."},
    {"amx", py_amx, METH_NOARGS, "amx() -> whether processor and system grant AMX to this process."},
    {"isa", py_isa, METH_NOARGS, "isa() -> what `decode` runs on: scalar, avx2 or avx512."},
    {"set_isa", py_set_isa, METH_O, "set_isa(name): use another instruction set, for tests."},
    {"set_chunk_work", py_set_chunk_work, METH_O,
     "set_chunk_work(n) -> the former: least multiply-adds per chunk, small in tests so that rows are cut."},
    {NULL, NULL, 0, NULL},
};

static int prepare(PyObject *module) {
    (void)module;
    decode_prepare();
    copies_prepare();
    amx = prefill_prepare();
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernels",
    .m_doc = "Attention over ragged pages on the CPU.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
