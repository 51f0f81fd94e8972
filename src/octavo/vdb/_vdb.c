/* vdb.h for Python: the core of octavo.vdb.VectorDatabase.

   A Database wraps one vdb_database; a Hits wraps one vdb_answer and lends its arrays without copying. Calls that
   can wait or work release the GIL. A database closed while other threads are inside it is freed by the last of them.

   Arguments are parsed by hand, and the hot methods are called without a Python frame: a search of ten rows costs
   about as much as reading its arguments. */
#ifndef Py_LIMITED_API
#if !defined(OCTAVO_FREE_THREADED) /* the free-threaded build of CPython 3.13 has no limited API */
#define Py_LIMITED_API 0x030B0000
#endif
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "vdb.h"
/* in this order */
#include "_values.h"
#include "_metadata.h"
#include "_filter.h"
#include "_hits.h"

typedef struct {
    PyObject_HEAD
    State *state; /* of the module, which the type keeps alive */
    _Atomic(vdb_database *) db;
    _Atomic int64_t users; /* twice the calls inside, plus 1 once closed */
    _Atomic int has_ids;   /* answers carry ids from the first id on */
    size_t dimensions;
    int metric;
    Py_ssize_t shape[2], strides[2]; /* of vectors that are lent */
} Database;

/* ---- entering and leaving ---- */

static void leave(Database *self) {
    if (atomic_fetch_sub(&self->users, 2) != 3) return;
    /* Closed, and nobody is inside. A late comer who was turned away may arrive here too: one of us frees. */
    vdb_database *db = atomic_exchange(&self->db, NULL);
    if (db) vdb_destroy(db);
}

/* The database, safe from close() until leave(); NULL with an error set. */
static vdb_database *enter(Database *self) {
    if (!(atomic_fetch_add(&self->users, 2) & 1)) {
        vdb_database *db = atomic_load(&self->db);
        if (db) return db;
    }
    leave(self);
    raise_error(self->state, CLOSED, "the database is closed; open it again with VectorDatabase.open(path)");
    return NULL;
}

static void close_database(Database *self) {
    int64_t before = atomic_fetch_or(&self->users, 1);
    if (before != 0) return; /* closed already, or the last one inside frees it */
    vdb_database *db = atomic_exchange(&self->db, NULL);
    if (!db) return;
    Py_BEGIN_ALLOW_THREADS
    vdb_destroy(db);
    Py_END_ALLOW_THREADS
}

/* ---- adding ---- */

typedef struct {
    vdb_record *records; /* NULL if no row has an id or metadata */
    PyObject *ids;       /* a tuple that keeps the texts alive */
    Arena arena;         /* of the metadata */
    bool any_id;
} Records;

static void records_close(Records *records) {
    free(records->records);
    Py_XDECREF(records->ids);
    arena_close(&records->arena);
}

/* A tuple of `count` items; for one vector the bare item will do. */
static PyObject *items_for(const State *state, PyObject *source, const char *name, bool bare, size_t count) {
    PyObject *items = bare && count == 1 ? PyTuple_Pack(1, source) : bare ? NULL : PySequence_Tuple(source);
    if (!items) {
        PyErr_Clear();
        return raise_error(state, CONFIG_ERROR, "%s must be a list with one item for each of the %zu vectors, not %R",
                           name, count, (PyObject *)Py_TYPE(source));
    }
    if (PyTuple_Size(items) != (Py_ssize_t)count) {
        raise_error(state, CONFIG_ERROR, "%zd %s for %zu vectors; pass one for each (None for a vector without)",
                    PyTuple_Size(items), name, count);
        Py_DECREF(items);
        return NULL;
    }
    return items;
}

static bool read_ids(const State *state, PyObject *source, size_t count, Records *out) {
    out->ids = items_for(state, source, "ids", PyUnicode_Check(source) || PyLong_Check(source), count);
    if (!out->ids) return false;
    char *rooms = NULL;
    for (size_t i = 0; i < count; i++) {
        PyObject *id = PyTuple_GetItem(out->ids, (Py_ssize_t)i);
        char place[32];
        if (id == Py_None) continue;
        snprintf(place, sizeof place, "ids[%zu]", i);
        if (!rooms && !PyUnicode_Check(id) && !(rooms = arena_take(&out->arena, count, NUMBER_ROOM))) return false;
        if (!(out->records[i].id = read_id(state, id, place, rooms ? rooms + i * NUMBER_ROOM : NULL))) return false;
        out->any_id |= *out->records[i].id != 0;
    }
    return true;
}

static bool read_metadata(const State *state, PyObject *source, size_t count, Records *out) {
    bool bare = PyObject_CheckBuffer(source) || PyDict_Check(source);
    PyObject *items = items_for(state, source, "metadata", bare, count);
    bool good = items != NULL;
    for (size_t i = 0; good && i < count; i++) {
        char place[32];
        snprintf(place, sizeof place, "metadata[%zu]", i);
        good = read_metadata_item(state, PyTuple_GetItem(items, (Py_ssize_t)i), place, &out->arena, &out->records[i]);
    }
    Py_XDECREF(items);
    return good;
}

static bool read_records(const State *state, PyObject *ids, PyObject *metadata, size_t count, Records *out) {
    memset(out, 0, sizeof *out);
    if (!ids && !metadata) return true;
    out->records = calloc(count + 1, sizeof *out->records);
    if (!out->records) return no_memory();
    return (!ids || read_ids(state, ids, count, out)) && (!metadata || read_metadata(state, metadata, count, out));
}

/* Says which id was refused: one that is given twice or, unless it may be replaced, is there already. */
static PyObject *raise_duplicate(const State *state, const vdb_database *db, const Records *records, bool replace) {
    PyObject *seen = PySet_New(NULL);
    for (Py_ssize_t i = 0; seen && i < PyTuple_Size(records->ids); i++) {
        const char *text = records->records[i].id;
        if (!text || !*text) continue;
        PyObject *id = PyUnicode_FromString(text);
        if (!id) break;
        uint64_t index;
        vdb_error error;
        Py_BEGIN_ALLOW_THREADS
        error = vdb_find(db, text, &index);
        Py_END_ALLOW_THREADS
        const char *what = error == VDB_OK && !replace ? "is in the database already; pass replace=True to take its place"
                                                       : NULL;
        if (PySet_Contains(seen, id) == 1) what = "is given twice";
        if (what || PySet_Add(seen, id)) {
            Py_DECREF(seen);
            if (what) raise_error(state, DUPLICATE_ID, "id %R %s; nothing was added", id, what);
            Py_DECREF(id);
            return NULL;
        }
        Py_DECREF(id);
    }
    Py_XDECREF(seen);
    if (PyErr_Occurred()) return NULL;
    return raise_error(state, DUPLICATE_ID, "an id is in the database already; nothing was added");
}

/* Lets signals be handled and progress be told while a call takes long, twenty times a second; see vdb_add_watched. */
typedef struct {
    PyThreadState *thread;
    int64_t last;       /* when it was last looked after, in nanoseconds */
    PyObject *progress; /* a function of (done, all), or NULL */
    bool failed;        /* an error is set */
} Patience;

static int64_t nanoseconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* With the GIL. */
static bool tell(PyObject *progress, size_t done, size_t count) {
    PyObject *answer = progress ? PyObject_CallFunction(progress, "nn", (Py_ssize_t)done, (Py_ssize_t)count) : NULL;
    Py_XDECREF(answer);
    return !progress || answer;
}

static int go_on(size_t done, size_t count, void *context) {
    Patience *patience = context;
    int64_t now = nanoseconds();
    if (now - patience->last < 50000000 && now >= patience->last) return 1;
    PyEval_RestoreThread(patience->thread);
    patience->failed = PyErr_CheckSignals() != 0 || !tell(patience->progress, done, count);
    patience->last = nanoseconds();
    patience->thread = PyEval_SaveThread();
    return !patience->failed;
}

static bool check_progress(const State *state, PyObject *progress) {
    if (!progress || PyCallable_Check(progress)) return true;
    raise_error(state, CONFIG_ERROR, "progress must be a function of two numbers, (done, all), not %R", progress);
    return false;
}

/* Adds, and returns the indices in a new array, or NULL with an error set. */
static uint64_t *add_rows(Database *self, const Vectors *vectors, const Records *records, vdb_add_mode mode,
                          PyObject *progress, const char *name) {
    uint64_t *indices = malloc(sizeof *indices * (vectors->count + 1));
    if (!indices) return (void)PyErr_NoMemory(), NULL;
    vdb_database *db = enter(self);
    if (!db) return free(indices), NULL;
    if (records->any_id) atomic_store(&self->has_ids, 1);
    Patience patience = {PyEval_SaveThread(), progress ? 0 : nanoseconds(), progress, false};
    vdb_error error =
        vdb_add_watched(db, vectors->values, vectors->count, records->records, mode, indices, go_on, &patience);
    PyEval_RestoreThread(patience.thread);
    if (error == VDB_ERROR_INTERRUPTED) (void)0; /* the error of the signal, or of `progress`, is set */
    else if (error == VDB_ERROR_DUPLICATE_ID) raise_duplicate(self->state, db, records, mode == VDB_ADD_REPLACE);
    else if (error == VDB_ERROR_NOT_FINITE) raise_not_finite(self->state, self->dimensions, vectors, name);
    else if (error) raise_failure(self->state, error, "add");
    leave(self);
    if (!error) return indices;
    free(indices);
    return NULL;
}

static PyObject *index_list(const uint64_t *indices, size_t count) {
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        PyObject *index = PyLong_FromUnsignedLongLong(indices[i]);
        if (!index || PyList_SetItem(list, (Py_ssize_t)i, index)) {
            Py_DECREF(list);
            list = NULL;
        }
    }
    return list;
}

PyDoc_STRVAR(add_doc, "add($self, /, vectors, ids=None, metadata=None, replace=False, *, progress=None)\n--\n\n"
"Add one vector or many, all or none of them, and return their indices.\n\n"
"vectors: [D] or [n, D]: an array or anything with the buffer protocol, a torch tensor on the CPU, raw bytes of\n"
"float32, or lists of numbers. float32 without gaps is read where it lies; other numbers are rounded to it. ids: n texts,\n"
"ints (kept as their text) or None each (a bare one for one vector); the empty text is no id.\n"
"metadata: for each bytes, a dict of str, int, float, bool and None (which searches can filter by), or None.\n"
"replace=True removes every older row of the same id.\n"
"progress: a function that is called with (rows in the graph, all rows) while many rows are added, about twenty times a\n"
"second; what it raises ends the call, as Ctrl-C does, and nothing was added.\n"
"Returns an int for one vector, else a list of n. Indices of removed rows are used again.\n"
"Raises VectorError, DuplicateIdError, ReadOnlyDatabaseError, DatabaseClosedError, ConfigError.");

static PyObject *database_add(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {
        "add", 1, 4, 5, {WORD_vectors, WORD_ids, WORD_metadata, WORD_replace, WORD_progress}};
    const State *state = self->state;
    PyObject *given[5], *result = NULL;
    if (!parse(state, &signature, args, count, names, given) || !check_progress(state, given[4])) return NULL;
    int replace = given[3] ? PyObject_IsTrue(given[3]) : 0;
    if (replace < 0) return NULL;
    Vectors vectors;
    Records records = {0};
    if (read_vectors(state, self->dimensions, given[0], "vectors", &vectors) &&
        read_records(state, given[1], given[2], vectors.count, &records)) {
        uint64_t *indices = NULL;
        indices = add_rows(self, &vectors, &records, replace ? VDB_ADD_REPLACE : VDB_ADD_UNIQUE, given[4], "vectors");
        if (indices && vectors.single) result = PyLong_FromUnsignedLongLong(indices[0]);
        else if (indices) result = index_list(indices, vectors.count);
        free(indices);
    }
    records_close(&records);
    vectors_close(&vectors);
    return result;
}

PyDoc_STRVAR(add_vector_doc, "add_vector($self, /, vector, vector_id=None)\n--\n\n"
"Add one vector [D]; a row of the same id may be there already. Errors as for `add`.");

static PyObject *database_add_vector(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"add_vector", 1, 2, 2, {WORD_vector, WORD_vector_id}};
    PyObject *given[2];
    bool added = false;
    if (!parse(self->state, &signature, args, count, names, given)) return NULL;
    Vectors vectors;
    Records records = {0};
    if (read_vectors(self->state, self->dimensions, given[0], "vector", &vectors)) {
        if (!vectors.single)
            raise_error(self->state, VECTOR_ERROR, "add_vector takes one vector of %zu numbers; add() takes many",
                        self->dimensions);
        else if (read_records(self->state, given[1], NULL, 1, &records)) {
            uint64_t *indices = add_rows(self, &vectors, &records, VDB_ADD_ANY, NULL, "vector");
            added = indices != NULL;
            free(indices);
        }
    }
    records_close(&records);
    vectors_close(&vectors);
    if (!added) return NULL;
    Py_RETURN_NONE;
}

/* ---- searching ---- */

/* Asks once more if the first id was added meanwhile: an answer must not miss the ids of its rows. */
static vdb_error ask(Database *self, vdb_database *db, const Vectors *vectors, vdb_query_options *options, Reach reach,
                     Filter *filter, vdb_answer **out) {
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    do {
        if (*out) vdb_free_answer(*out);
        *out = NULL;
        options->with_ids = atomic_load(&self->has_ids);
        error = query_rows(db, vectors->values, vectors->count, options, reach, filter, out);
    } while (!error && !options->with_ids && atomic_load(&self->has_ids));
    Py_END_ALLOW_THREADS
    return error;
}

static PyObject *search_rows(Database *self, const Vectors *vectors, PyObject *kept, vdb_query_options *options, bool all,
                             Reach reach) {
    const State *state = self->state;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    Filter filter = {0};
    vdb_answer *answer = NULL;
    bool good = !kept || read_filter(state, db, kept, &filter);
    if (good && vectors->count > 0 && (options->k > 0 || all)) {
        options->bitset = filter.words;
        options->bitset_words = filter.count;
        options->where = filter.has_where ? &filter.where : NULL;
        vdb_error error = ask(self, db, vectors, options, reach, &filter, &answer);
        if (error == VDB_ERROR_NOT_FOUND)
            raise_unknown_item(state, "filter", &filter);
        else if (error == VDB_ERROR_NOT_FINITE) raise_not_finite(state, self->dimensions, vectors, "query");
        else if (error) raise_failure(state, error, "search");
        good = !error;
    }
    leave(self);
    filter_close(&filter);
    if (!good) return NULL;
    Hits *hits = hits_new(self->state, answer, NULL);
    if (!hits) {
        if (answer) vdb_free_answer(answer);
        return NULL;
    }
    hits->single = vectors->single;
    if (!answer) {
        hits->queries = vectors->count;
        hits->k = options->k;
    }
    return hits->single ? single_new(self->state, hits) : (PyObject *)hits;
}

PyDoc_STRVAR(search_doc,
"search($self, /, query, k=5, filter=None, exact=False, *, effort=None, with_metadata=False, radius=None)\n--\n\n"
"The k nearest rows to one query [D], nearest first: a `Hits`, which is a list; or to each of many [n, D]: a `HitsBatch`.\n\n"
"Distances ascend: 1 - cosine, the Euclidean distance, or the negated dot product. Fewer than k come back only if\n"
"fewer can be found.\n"
"filter: which rows may be in the answer: ids (a list or set of str, every row of each), indices (ints, or an int\n"
"array), one bool per index (an array of info().slots), a bitset (bytes or uint8, bit i % 8 of byte i // 8 for\n"
"index i, as numpy.packbits(mask, bitorder=\"little\") makes it), or a function of an index, which is called for every\n"
"row before the search, under the GIL: right, and slow. Or a dict of conditions on metadata that is a dict:\n"
"{\"year\": {\"$gte\": 2020}, \"lang\": {\"$in\": [\"fr\", \"ru\"]}}, all of which must hold. There are $eq (or the bare\n"
"value), $ne, $gt, $gte, $lt, $lte (numbers only), $in, $nin, and $and and $or, which join lists of dicts. 1 equals 1.0\n"
"and not True; None equals None only; a row without the key passes $ne and $nin alone. The first search that asks for a\n"
"key reads it from all rows, later ones only what has changed.\n"
"radius: only rows at most so far away; all of them, by an exact scan, unless k is given.\n"
"exact=True reads every row although there is a graph. effort: HNSW's efSearch, up to 2^20; None for max(64, 2 k).\n"
"Raises VectorError, UnknownIdError, DatabaseClosedError, ConfigError.");

static bool read_radius(const State *state, PyObject *object, float *out) {
    double radius = PyFloat_AsDouble(object);
    bool failed = PyErr_Occurred() != NULL;
    PyErr_Clear();
    *out = (float)radius;
    if ((double)*out > radius) *out = nextafterf(*out, -INFINITY); /* no distance lies between */
    if (!failed && !isnan(radius)) return true;
    raise_error(state, CONFIG_ERROR, "radius must be a number, the greatest distance, not %R", object);
    return false;
}

static PyObject *database_search(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {
        "search", 1, 4, 7,
        {WORD_query, WORD_k, WORD_filter, WORD_exact, WORD_effort, WORD_with_metadata, WORD_radius}};
    const State *state = self->state;
    PyObject *given[7], *result = NULL;
    long long k = 5, effort = 0;
    if (!parse(state, &signature, args, count, names, given)) return NULL;
    if (given[1] && !read_integer(state, given[1], "k", 0, INT64_MAX, &k)) return NULL;
    if (given[4] && !read_integer(state, given[4], "effort", 1, 1 << 20, &effort)) return NULL;
    int exact = given[3] ? PyObject_IsTrue(given[3]) : 0;
    int with_metadata = given[5] ? PyObject_IsTrue(given[5]) : 0;
    if (exact < 0 || with_metadata < 0) return NULL;
    Reach reach = {given[6] != NULL, 0};
    if (reach.within && !read_radius(state, given[6], &reach.radius)) return NULL;
    bool all = reach.within && !given[1];
    vdb_query_options options = vdb_default_query_options(all ? 0 : (size_t)k);
    options.exact = exact;
    options.effort = (uint32_t)effort;
    options.with_metadata = with_metadata;
    Vectors vectors;
    if (read_vectors(state, self->dimensions, given[0], "query", &vectors))
        result = search_rows(self, &vectors, given[2], &options, all, reach);
    vectors_close(&vectors);
    return result;
}

/* ---- the database ---- */

static const char *const METRICS[] = {"cosine", "euclidean", "dot", NULL};
static const char *const STORAGES[] = {"f32", "f16", "bf16", "i8", "f32+i8", NULL};
static const char *const INDEXES[] = {"flat", "hnsw", NULL};
static const char *const MODES[] = {"read", "mmap", NULL};
static const char *const SAVE_MODES[] = {"any", "new", "same", NULL};

/* The place of a name in the list; `numbers` allows the place itself, as an int. */
static bool read_choice(const State *state, PyObject *object, const char *what, const char *const *names, bool numbers,
                        int *out) {
    char list[64] = "";
    int count = 0;
    for (; names[count]; count++) {
        if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, names[count]) == 0)
            return *out = count, true;
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s\"%s\"", count ? ", " : "", names[count]);
    }
    if (numbers && PyLong_Check(object)) {
        long place = PyLong_AsLong(object);
        PyErr_Clear(); /* of an overflow, which is -1 */
        if (place >= 0 && place < count) return *out = (int)place, true;
    }
    raise_error(state, CONFIG_ERROR, "%s %R is unknown; choose one of %s", what, object, list);
    return false;
}

/* Heap types may be subclassed from Python: the module is known to the one that is ours. */
static State *state_of_type(PyTypeObject *type) {
    for (; type; type = PyType_GetSlot(type, Py_tp_base)) {
        State *state = PyType_GetModuleState(type);
        if (state) return state;
        PyErr_Clear();
    }
    PyErr_SetString(PyExc_SystemError, "not a vector database");
    return NULL;
}

static PyObject *database_new(PyTypeObject *type, PyObject *args, PyObject *named) {
    (void)args, (void)named;
    State *state = state_of_type(type);
    if (!state) return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Database *self = (Database *)allocate(type, 0);
    if (!self) return NULL;
    self->state = state;
    atomic_init(&self->db, NULL);
    atomic_init(&self->users, 0);
    atomic_init(&self->has_ids, 0);
    return (PyObject *)self;
}

static void database_dealloc(Database *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    vdb_database *db = atomic_exchange(&self->db, NULL);
    if (db) vdb_destroy(db);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static bool read_options(const State *state, PyObject **given, vdb_options *out) {
    int storage = VDB_STORAGE_F32, index = VDB_INDEX_FLAT;
    long long links = out->links, effort = out->build_effort;
    if (given[0] && !read_choice(state, given[0], "storage", STORAGES, false, &storage)) return false;
    if (given[1] && !read_choice(state, given[1], "index", INDEXES, false, &index)) return false;
    if (given[2] && !read_integer(state, given[2], "links", 2, 128, &links)) return false;
    if (given[3] && !read_integer(state, given[3], "build_effort", 1, 4096, &effort)) return false;
    out->storage = (vdb_storage)storage;
    out->index = (vdb_index)index;
    out->links = (uint32_t)links;
    out->build_effort = (uint32_t)effort;
    return true;
}

static int database_init(Database *self, PyObject *args, PyObject *named) {
    static char *words[] = {"dimensions", "metric",       "multithreaded", "storage", "index",
                            "links",      "build_effort", "threads",       NULL};
    const State *state = self->state;
    PyObject *size, *metric = NULL, *settings[4] = {0}, *threads = NULL;
    int multithreaded = 1, measure = VDB_METRIC_COSINE;
    long long dimensions;
    if (!PyArg_ParseTupleAndKeywords(args, named, "O|Op$OOOOO:VectorDatabase", words, &size, &metric, &multithreaded,
                                     &settings[0], &settings[1], &settings[2], &settings[3], &threads))
        return -1;
    vdb_options options = vdb_default_options();
    if (threads == Py_None) threads = NULL;
    if (!read_integer(state, size, "dimensions", 1, VDB_MAX_DIMENSIONS, &dimensions) ||
        (metric && !read_choice(state, metric, "metric", METRICS, true, &measure)) ||
        !read_options(state, settings, &options) || !read_threads(state, threads, &options.threads))
        return -1;
    if (!threads && !multithreaded) options.threads = 1;
    vdb_database *db = NULL, *none = NULL;
    vdb_error error = vdb_new((size_t)dimensions, (vdb_metric)measure, &options, &db);
    if (error) return raise_failure(state, error, "make a database"), -1;
    if (atomic_load(&self->users) || !atomic_compare_exchange_strong(&self->db, &none, db)) {
        vdb_destroy(db);
        raise_error(state, BASE_ERROR, "this database is made already; make a new object");
        return -1;
    }
    self->dimensions = (size_t)dimensions;
    self->metric = measure;
    return 0;
}

/* Says what is wrong with a file that was refused. */
static PyObject *raise_file(const State *state, const char *doing, PyObject *path, vdb_error error, int number,
                            const char *message) {
    if (error == VDB_ERROR_OUT_OF_MEMORY) return PyErr_NoMemory();
    if (error == VDB_ERROR_NOT_REGULAR)
        return raise_error(state, FILE_ERROR,
                           "cannot %s %S: it is a folder, a pipe or a device, not a regular file; save to another path",
                           doing, path);
    if (error == VDB_ERROR_LINKED)
        return raise_error(state, FILE_ERROR,
                           "cannot %s %S: the file has other names (hard links), and saving puts a new file in the "
                           "place of this one; remove the other names, or save to another path",
                           doing, path);
    if (error == VDB_ERROR_OWNER)
        return raise_error(state, FILE_ERROR,
                           "cannot %s %S: the file belongs to another user or group, and saving would make it yours "
                           "(%s); save to another path",
                           doing, path, strerror(number));
    if (error == VDB_ERROR_FOLDER)
        return raise_error(state, FILE_ERROR,
                           "cannot %s %S: its folder does not let a new file take its place (%s); saving needs that, so "
                           "that no crash leaves half a file. Make the folder writable, or save to another path",
                           doing, path, strerror(number));
    if (error == VDB_ERROR_CHANGED)
        return raise_error(state, FILE_ERROR,
                           number == EEXIST ? "cannot %s %S: the file exists"
                                            : "cannot %s %S: the file is not the one that this database was read from; "
                                              "another program has changed it since. Open it again and repeat the change",
                           doing, path);
    if (error == VDB_ERROR_IO)
        return raise_error(state, FILE_ERROR, "cannot %s %S: %s", doing, path,
                           number ? strerror(number) : "input or output failed");
    return raise_error(state, FILE_ERROR, "cannot %s %S: %s", doing, path,
                       message && *message ? message : vdb_error_text(error));
}

typedef struct {
    char message[256];
    vdb_error error;
    int number; /* errno */
} FileFault;

static FileFault verify_file(const char *path) {
    FileFault fault = {"", VDB_OK, 0};
    errno = 0;
    fault.error = vdb_verify(path, fault.message, sizeof fault.message);
    fault.number = errno;
    fault.message[sizeof fault.message - 1] = 0;
    return fault;
}

/* A new Python object for a database, which it takes over. */
static PyObject *database_wrap(PyTypeObject *type, vdb_database *db, const vdb_information *facts) {
    Database *self = (Database *)database_new(type, NULL, NULL);
    if (!self) return vdb_destroy(db), NULL;
    self->dimensions = facts->dimensions;
    self->metric = (int)facts->metric;
    atomic_store(&self->has_ids, facts->has_ids != 0);
    atomic_store(&self->db, db);
    return (PyObject *)self;
}

PyDoc_STRVAR(open_doc, "open($type, /, path, mode=\"read\", threads=None, *, progress=None)\n--\n\n"
"Open a saved database, of this version or the first.\n\n"
"mode \"read\": into memory, every checksum verified. mode \"mmap\": a read-only view of the file, which opens at\n"
"once and is read as it is searched; its bounds are checked, its checksums only by `verify`. threads: None for every\n"
"core. progress: a function that is called with (bytes read, bytes of the file) about twenty times a second; what it\n"
"raises ends the call, as Ctrl-C does.\n"
"Raises DatabaseFileError if the file is missing or damaged.");

static PyObject *database_open(PyTypeObject *type, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"open", 1, 3, 4, {WORD_path, WORD_mode, WORD_threads, WORD_progress}};
    State *state = state_of_type(type);
    PyObject *given[4], *name;
    int mode = VDB_OPEN_READ;
    uint32_t threads;
    if (!state || !parse(state, &signature, args, count, names, given)) return NULL;
    if (given[1] && !read_choice(state, given[1], "mode", MODES, false, &mode)) return NULL;
    if (!read_threads(state, given[2], &threads) || !check_progress(state, given[3]) ||
        !PyUnicode_FSConverter(given[0], &name))
        return NULL;
    const char *path = PyBytes_AsString(name);
    vdb_database *db = NULL;
    vdb_information facts = {0};
    FileFault fault = {"", VDB_OK, 0};
    Patience patience = {PyEval_SaveThread(), given[3] ? 0 : nanoseconds(), given[3], false};
    errno = 0;
    fault.error = vdb_open_watched(path, (vdb_open_mode)mode, threads, &db, go_on, &patience);
    fault.number = errno;
    if (fault.error == VDB_ERROR_CORRUPT) {
        FileFault found = verify_file(path);
        if (found.error == VDB_ERROR_CORRUPT) fault = found;
    }
    if (!fault.error) fault.error = vdb_info(db, &facts);
    PyEval_RestoreThread(patience.thread);
    Py_DECREF(name);
    if (fault.error) {
        if (db) vdb_destroy(db);
        return patience.failed ? NULL : raise_file(state, "open", given[0], fault.error, fault.number, fault.message);
    }
    return database_wrap(type, db, &facts);
}

PyDoc_STRVAR(save_doc, "save($self, /, path, mode=\"any\")\n--\n\n"
"Write everything to a file: whole and flushed to disk, or not at all, so that the old file stays.\n\n"
"A new file takes the old one's place, with its mode, owner and group. Symbolic links are followed. Refused: what is no\n"
"regular file, a file with hard links, one whose owner cannot be kept, a folder that takes no new file.\n"
"mode: what may be at the path: \"any\", \"new\" (nothing), or \"same\" (the file that this database was opened from or\n"
"saved to last, unchanged); see `octavo.vdb.locks.locked` for changing a file that others change too.\n"
"Raises DatabaseFileError, DatabaseClosedError, ConfigError.");

static PyObject *database_save(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"save", 1, 2, 2, {WORD_path, WORD_mode}};
    PyObject *given[2], *name;
    int mode = VDB_SAVE_ANY;
    if (!parse(self->state, &signature, args, count, names, given) ||
        (given[1] && !read_choice(self->state, given[1], "mode", SAVE_MODES, false, &mode)) ||
        !PyUnicode_FSConverter(given[0], &name))
        return NULL;
    vdb_database *db = enter(self);
    if (!db) return Py_DECREF(name), NULL;
    vdb_error error;
    int number;
    Py_BEGIN_ALLOW_THREADS
    errno = 0;
    error = vdb_save_as(db, PyBytes_AsString(name), (vdb_save_mode)mode);
    number = errno;
    Py_END_ALLOW_THREADS
    leave(self);
    Py_DECREF(name);
    if (error) return raise_file(self->state, "write", given[0], error, number, NULL);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(save_changes_doc, "_save_changes($self, path, /)\n--\n\n"
"Append to the file that this database was opened from or saved to last what has changed since. Raises as `save`.");

static PyObject *database_save_changes(Database *self, PyObject *path) {
    PyObject *name;
    if (!PyUnicode_FSConverter(path, &name)) return NULL;
    vdb_database *db = enter(self);
    if (!db) return Py_DECREF(name), NULL;
    vdb_error error;
    int number;
    Py_BEGIN_ALLOW_THREADS
    errno = 0;
    error = vdb_save_changes(db, PyBytes_AsString(name));
    number = errno;
    Py_END_ALLOW_THREADS
    leave(self);
    Py_DECREF(name);
    if (error) return raise_file(self->state, "write", path, error, number, NULL);
    Py_RETURN_NONE;
}

static PyObject *database_close(Database *self, PyObject *unused) {
    (void)unused;
    close_database(self);
    Py_RETURN_NONE;
}

static PyObject *database_enter(Database *self, PyObject *unused) {
    (void)unused;
    if (!enter(self)) return NULL;
    leave(self);
    return Py_NewRef((PyObject *)self);
}

static PyObject *database_exit(Database *self, PyObject *args) {
    (void)args;
    close_database(self);
    Py_RETURN_NONE;
}

static Py_ssize_t database_length(Database *self) {
    vdb_database *db = enter(self);
    if (!db) return -1;
    size_t count;
    Py_BEGIN_ALLOW_THREADS
    count = vdb_count(db);
    Py_END_ALLOW_THREADS
    leave(self);
    return (Py_ssize_t)count;
}

static PyObject *database_count(Database *self, PyObject *unused) {
    (void)unused;
    Py_ssize_t count = database_length(self);
    return count < 0 ? NULL : PyLong_FromSsize_t(count);
}

/* 1 and the lowest index of an id, 0 if no row has it, -1 with an error set. */
static int look_up(Database *self, PyObject *id, uint64_t *index) {
    char room[NUMBER_ROOM];
    const char *text = read_id(self->state, id, "id", room);
    if (!text) return -1;
    vdb_database *db = enter(self);
    if (!db) return -1;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = *text ? vdb_find(db, text, index) : VDB_ERROR_NOT_FOUND; /* the empty text is no id */
    Py_END_ALLOW_THREADS
    leave(self);
    if (error && error != VDB_ERROR_NOT_FOUND) return raise_failure(self->state, error, "find"), -1;
    return error == VDB_OK;
}

static PyObject *raise_unknown_id(const State *state, PyObject *id) {
    return raise_error(state, UNKNOWN_ID, "no row has the id %R", id);
}

static int database_contains(Database *self, PyObject *id) {
    uint64_t index;
    return look_up(self, id, &index);
}

PyDoc_STRVAR(find_doc, "find($self, /, id)\n--\n\nThe lowest index of a row with this id. Raises UnknownIdError.");

static PyObject *database_find(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"find", 1, 1, 1, {WORD_id}};
    PyObject *given[1];
    uint64_t index;
    if (!parse(self->state, &signature, args, count, names, given)) return NULL;
    int found = look_up(self, given[0], &index);
    if (found < 0) return NULL;
    return found ? PyLong_FromUnsignedLongLong(index) : raise_unknown_id(self->state, given[0]);
}

static bool read_index(const State *state, PyObject *object, uint64_t *out) {
    long long index;
    if (!read_integer(state, object, "index", INT64_MIN, INT64_MAX, &index)) return false;
    *out = index < 0 ? VDB_NO_INDEX : (uint64_t)index; /* none is negative: not found, as any other beyond the rows */
    return true;
}

static PyObject *raise_unknown_index(const State *state, PyObject *index) {
    return raise_error(state, UNKNOWN_ID, "no row has the index %S; indices are from 0 to info().slots - 1", index);
}

/* Exactly one of the two must be given. */
static bool one_of(const State *state, const char *function, PyObject *id, PyObject *index) {
    if (!id != !index) return true;
    raise_error(state, CONFIG_ERROR, "%s() takes an id or an index, and not both: id=\"...\" or index=...", function);
    return false;
}

PyDoc_STRVAR(remove_doc, "remove($self, /, id=None, index=None, filter=None)\n--\n\n"
"Remove every row with this id, the row with this index, or those of a filter, and return how many were removed.\n\n"
"id and index may be lists: then all of them must be there, or nothing is removed. filter: as for `search`.\n"
"Other rows keep their indices.\n"
"Raises UnknownIdError, ReadOnlyDatabaseError, DatabaseClosedError, ConfigError.");

/* By a filter: a list of ids or of indices is one. */
static PyObject *remove_many(Database *self, PyObject *source, const char *name) {
    const State *state = self->state;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    Filter filter = {0};
    size_t removed = 0;
    vdb_error error = VDB_OK;
    bool good = read_filter(state, db, source, &filter);
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        error = remove_filtered(db, &filter, &removed);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (error == VDB_ERROR_NOT_FOUND) raise_unknown_item(state, name, &filter);
    else if (error) raise_failure(state, error, "remove");
    filter_close(&filter);
    return good && !error ? PyLong_FromSize_t(removed) : NULL;
}

static PyObject *database_remove(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"remove", 0, 3, 3, {WORD_id, WORD_index, WORD_filter}};
    const State *state = self->state;
    PyObject *given[3];
    char room[NUMBER_ROOM];
    const char *id = NULL;
    uint64_t index = VDB_NO_INDEX;
    size_t removed = 1;
    if (!parse(state, &signature, args, count, names, given)) return NULL;
    if ((given[0] != NULL) + (given[1] != NULL) + (given[2] != NULL) != 1)
        return raise_error(state, CONFIG_ERROR,
                           "remove() takes one of the three: id=\"...\", index=... or filter=...");
    if (given[2]) return remove_many(self, given[2], "filter");
    if (given[0] && (PyList_Check(given[0]) || PyTuple_Check(given[0]) || PyAnySet_Check(given[0])))
        return remove_many(self, given[0], "id");
    if (given[1] && PyObject_Size(given[1]) >= 0) return remove_many(self, given[1], "index");
    PyErr_Clear();
    if (given[0] && !(id = read_id(state, given[0], "id", room))) return NULL;
    if (given[1] && !read_index(state, given[1], &index)) return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    if (!id) error = vdb_remove_index(db, index);
    else error = *id ? vdb_remove_id(db, id, &removed) : VDB_ERROR_NOT_FOUND;
    Py_END_ALLOW_THREADS
    leave(self);
    if (error == VDB_ERROR_NOT_FOUND || error == VDB_ERROR_INVALID_INDEX)
        return id ? raise_unknown_id(state, given[0]) : raise_unknown_index(state, given[1]);
    return error ? raise_failure(state, error, "remove") : PyLong_FromSize_t(removed);
}

PyDoc_STRVAR(set_metadata_doc, "set_metadata($self, /, metadata, id=None, index=None)\n--\n\n"
"Give the row with this index, or the first with this id, other metadata: bytes, a dict, or None for none.\n\n"
"Its vector and id stay. Raises UnknownIdError, ReadOnlyDatabaseError, DatabaseClosedError, ConfigError.");

static PyObject *database_set_metadata(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"set_metadata", 1, 3, 3, {WORD_metadata, WORD_id, WORD_index}};
    const State *state = self->state;
    PyObject *given[3], *result = NULL;
    char room[NUMBER_ROOM];
    const char *id = NULL;
    uint64_t index = VDB_NO_INDEX;
    vdb_record record = {NULL, NULL, 0, NULL, 0};
    Arena arena = {0};
    if (!parse(state, &signature, args, count, names, given) || !one_of(state, "set_metadata", given[1], given[2]))
        return NULL;
    if (given[1] && !(id = read_id(state, given[1], "id", room))) return NULL;
    if (given[2] && !read_index(state, given[2], &index)) return NULL;
    vdb_database *db = NULL;
    if ((!given[0] || read_metadata_item(state, given[0], "metadata", &arena, &record)) && (db = enter(self))) {
        vdb_error error;
        Py_BEGIN_ALLOW_THREADS
        error = id ? vdb_set_metadata_of(db, id, &record) : vdb_set_metadata(db, index, &record);
        Py_END_ALLOW_THREADS
        leave(self);
        if (error == VDB_ERROR_NOT_FOUND || error == VDB_ERROR_INVALID_INDEX)
            id ? raise_unknown_id(state, given[1]) : raise_unknown_index(state, given[2]);
        else if (error) raise_failure(state, error, "set the metadata");
        else result = Py_NewRef(Py_None);
    }
    arena_close(&arena);
    return result;
}

PyDoc_STRVAR(remove_vector_doc, "remove_vector($self, /, index)\n--\n\n"
"Remove the row with this index; later indices, those of removed rows too, shift down by one. Errors as for `remove`.");

static PyObject *database_remove_vector(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"remove_vector", 1, 1, 1, {WORD_index}};
    PyObject *given[1];
    uint64_t index;
    if (!parse(self->state, &signature, args, count, names, given) || !read_index(self->state, given[0], &index))
        return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_remove_vector(db, index);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error == VDB_ERROR_NOT_FOUND || error == VDB_ERROR_INVALID_INDEX)
        return raise_unknown_index(self->state, given[0]);
    if (error) return raise_failure(self->state, error, "remove");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(compact_doc, "compact($self, /)\n--\n\n"
"Give the memory of removed rows back. Rows keep their order; their indices become 0 to count() - 1.");

static PyObject *database_compact(Database *self, PyObject *unused) {
    (void)unused;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_compact(db);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error) return raise_failure(self->state, error, "compact");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reserve_doc, "reserve($self, /, rows)\n--\n\nTake the memory for that many more rows at once.");

static PyObject *database_reserve(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"reserve", 1, 1, 1, {WORD_rows}};
    PyObject *given[1];
    long long rows;
    if (!parse(self->state, &signature, args, count, names, given) ||
        !read_integer(self->state, given[0], "rows", 0, UINT32_MAX - 1, &rows))
        return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_reserve(db, (size_t)rows);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error) return raise_failure(self->state, error, "reserve");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(keep_on_disk_doc, "keep_on_disk($self, folder, /)\n--\n\n"
"Keep the vectors of this database, which must be new, in a file without a name in `folder` instead of in memory.\n\n"
"Codes, norms and links stay in memory: with storage \"f32+i8\" searches and builds read few vectors, so a database may\n"
"be several times larger than memory. `save` makes a file of it as always. After a fork only one process may change it.\n"
"Raises ConfigError, DatabaseFileError.");

static PyObject *database_keep_on_disk(Database *self, PyObject *folder) {
    PyObject *name;
    if (!PyUnicode_FSConverter(folder, &name)) return NULL;
    vdb_database *db = enter(self);
    if (!db) return Py_DECREF(name), NULL;
    errno = 0;
    vdb_error error = vdb_keep_on_disk(db, PyBytes_AsString(name));
    int number = errno;
    leave(self);
    Py_DECREF(name);
    if (error == VDB_ERROR_INVALID_ARGUMENT)
        return raise_error(self->state, CONFIG_ERROR, "keep_on_disk comes before the first row, and once");
    if (error == VDB_ERROR_IO) return raise_file(self->state, "keep vectors in", folder, error, number, "");
    if (error) return raise_failure(self->state, error, "keep vectors on disk");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(limit_resident_doc, "limit_resident($self, bytes=None, /)\n--\n\n"
"Let about so many bytes of what lies on disk stay in memory as this process's: vectors after `keep_on_disk`, or all of\n"
"a file opened with mode \"mmap\"; None for as many as the system likes. Of a mapped file with codes these stay if they\n"
"fit; with less room every search reads them again. What is read through `vectors()` counts for nothing.\n"
"Raises ConfigError.");

static PyObject *database_limit_resident(Database *self, PyObject *const *args, Py_ssize_t count) {
    long long bytes = 0;
    if (count > 1) return PyErr_SetString(PyExc_TypeError, "limit_resident takes one argument"), NULL;
    if (count && args[0] != Py_None && !read_integer(self->state, args[0], "bytes", 1, LLONG_MAX, &bytes)) return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_set_resident(db, (size_t)bytes);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error == VDB_ERROR_INVALID_ARGUMENT)
        return raise_error(self->state, CONFIG_ERROR,
                           "nothing of this database lies on disk: open a file with mode=\"mmap\", or call keep_on_disk");
    if (error) return raise_failure(self->state, error, "limit resident bytes");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_threads_doc, "set_threads($self, /, threads=None)\n--\n\n"
"Let at most this many threads work on one call; None for every core.");

static PyObject *database_set_threads(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"set_threads", 0, 1, 1, {WORD_threads}};
    PyObject *given[1];
    uint32_t threads;
    if (!parse(self->state, &signature, args, count, names, given) || !read_threads(self->state, given[0], &threads))
        return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_set_threads(db, threads);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error) return raise_failure(self->state, error, "set the threads");
    Py_RETURN_NONE;
}

typedef struct {
    uint64_t index;
    char *text; /* id, NUL, metadata; NULL if the row has neither */
    size_t id_size, metadata_size;
    bool has_values;
} RowText;

/* A row with its id at one moment; vdb_find, vdb_read_vector and vdb_read_record would see three. */
static vdb_error read_row(vdb_database *db, const char *id, float *vector, RowText *out) {
    const char *name = NULL;
    const unsigned char *metadata = NULL;
    vdb_error error = VDB_OK;
    vdb_enter_read(&db->lock);
    if (id) out->index = *id ? vdb_lowest_row(db, id, strlen(id)) : VDB_NO_ROW;
    if (!vdb_is_row(db, out->index)) error = VDB_ERROR_INVALID_INDEX;
    else {
        vdb_decode_row(db, (size_t)out->index, vector);
        if (vdb_record_at(db, (size_t)out->index, &name, &out->id_size, &metadata, &out->metadata_size)) {
            out->has_values = vdb_has_values(db, (size_t)out->index);
            out->text = malloc(out->id_size + 1 + out->metadata_size);
            if (!out->text) error = VDB_ERROR_OUT_OF_MEMORY;
        }
    }
    if (out->text) {
        if (out->id_size) memcpy(out->text, name, out->id_size);
        out->text[out->id_size] = 0;
        if (out->metadata_size) memcpy(out->text + out->id_size + 1, metadata, out->metadata_size);
    }
    vdb_leave_read(&db->lock);
    return error;
}

static PyObject *row_object(const RowText *row, PyObject *vector) {
    PyObject *id = id_object(row->text && row->id_size ? row->text : NULL);
    PyObject *metadata = row->text ? metadata_object(row->text + row->id_size + 1, row->metadata_size, row->has_values)
                                   : Py_NewRef(Py_None);
    PyObject *tuple = id && metadata ? Py_BuildValue("(KOOO)", (unsigned long long)row->index, vector, id, metadata) : NULL;
    Py_XDECREF(id);
    Py_XDECREF(metadata);
    return tuple;
}

/* (index, vector as bytes, id, metadata) of one row. */
static PyObject *database_row(Database *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    static const Signature signature = {"get", 0, 2, 2, {WORD_id, WORD_index}};
    const State *state = self->state;
    PyObject *given[2], *result = NULL;
    char room[NUMBER_ROOM];
    const char *id = NULL;
    RowText row = {VDB_NO_INDEX, NULL, 0, 0, false};
    if (!parse(state, &signature, args, count, names, given) || !one_of(state, "get", given[0], given[1])) return NULL;
    if (given[0] && !(id = read_id(state, given[0], "id", room))) return NULL;
    if (given[1] && !read_index(state, given[1], &row.index)) return NULL;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    PyObject *vector = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * self->dimensions));
    if (vector) {
        float *into = (float *)(void *)PyBytes_AsString(vector);
        vdb_error error;
        Py_BEGIN_ALLOW_THREADS
        error = read_row(db, id, into, &row);
        Py_END_ALLOW_THREADS
        if (!error) result = row_object(&row, vector);
        else if (error == VDB_ERROR_OUT_OF_MEMORY) PyErr_NoMemory();
        else if (id) raise_unknown_id(state, given[0]);
        else raise_unknown_index(state, given[1]);
        free(row.text);
        Py_DECREF(vector);
    }
    leave(self);
    return result;
}

static PyObject *database_facts(Database *self, PyObject *unused) {
    (void)unused;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    vdb_information facts;
    vdb_error error = information(db, &facts);
    leave(self);
    if (error) return raise_failure(self->state, error, "describe the database");
    return Py_BuildValue("(nissIIInnnnOO)", (Py_ssize_t)facts.dimensions, (int)facts.metric,
                         STORAGES[facts.options.storage], INDEXES[facts.options.index], facts.options.links,
                         facts.options.build_effort, facts.options.threads, (Py_ssize_t)facts.count,
                         (Py_ssize_t)facts.slots, (Py_ssize_t)facts.bytes, (Py_ssize_t)facts.vector_bytes,
                         facts.read_only ? Py_True : Py_False, facts.has_ids ? Py_True : Py_False);
}

/* ---- all rows at once ---- */

static PyObject *database_bytes(Database *self, PyObject *unused) {
    (void)unused;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    void *bytes = NULL;
    size_t size = 0;
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_to_bytes(db, &bytes, &size);
    Py_END_ALLOW_THREADS
    leave(self);
    if (error) return raise_failure(self->state, error, "write the database");
    PyObject *object = PyBytes_FromStringAndSize(bytes, (Py_ssize_t)size);
    vdb_free_bytes(bytes);
    return object;
}

PyDoc_STRVAR(from_bytes_doc, "from_bytes($type, data, /)\n--\n\n"
"A database from what `bytes(db)` gave, or from the content of a saved file. Raises DatabaseFileError.");

static PyObject *database_from_bytes(PyTypeObject *type, PyObject *data) {
    State *state = state_of_type(type);
    PyObject *bytes = state ? PyBytes_FromObject(data) : NULL;
    if (!bytes) return NULL;
    vdb_database *db = NULL;
    vdb_information facts = {0};
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_from_bytes(PyBytes_AsString(bytes), (size_t)PyBytes_Size(bytes), 0, &db);
    if (!error) error = vdb_info(db, &facts);
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    if (error == VDB_ERROR_OUT_OF_MEMORY) return PyErr_NoMemory();
    if (error) return raise_error(state, FILE_ERROR, "these bytes are no database, or damaged: %s", vdb_error_text(error));
    return database_wrap(type, db, &facts);
}

/* (indices of the rows as int64 bytes, their ids in a list), in the order of the indices. */
static PyObject *database_listing(Database *self, PyObject *unused) {
    (void)unused;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    size_t count = 0, text = 0, room = 0;
    char *ids = NULL;
    int64_t *indices = NULL;
    vdb_error error = VDB_OK;
    Py_BEGIN_ALLOW_THREADS
    vdb_enter_read(&db->lock);
    for (int fill = 0; fill < 2 && !error; fill++) { /* first the room that is needed */
        count = text = 0;
        for (size_t row = 0; row < db->slots; row++) {
            const char *id;
            const unsigned char *metadata;
            size_t id_size, size;
            if (!vdb_is_live(db, row)) continue;
            vdb_record_at(db, row, &id, &id_size, &metadata, &size);
            if (fill) indices[count] = (int64_t)row;
            if (fill && id) memcpy(ids + text, id, id_size);
            if (fill) ids[text + id_size] = 0;
            text += id_size + 1;
            count++;
        }
        room = text;
        if (fill) continue;
        ids = malloc(room + 1);
        indices = malloc((count + 1) * sizeof *indices);
        if (!ids || !indices) error = VDB_ERROR_OUT_OF_MEMORY;
    }
    vdb_leave_read(&db->lock);
    Py_END_ALLOW_THREADS
    leave(self);
    PyObject *list = error ? PyErr_NoMemory() : PyList_New((Py_ssize_t)count), *result = NULL;
    const char *id = ids;
    for (size_t i = 0; list && i < count; i++, id += strlen(id) + 1) {
        PyObject *object = id_object(*id ? id : NULL);
        if (!object || PyList_SetItem(list, (Py_ssize_t)i, object)) Py_CLEAR(list);
    }
    if (list) result = Py_BuildValue("(y#O)", (const char *)indices, (Py_ssize_t)(count * sizeof *indices), list);
    Py_XDECREF(list);
    free(ids);
    free(indices);
    return result;
}

/* Vectors of all indices as float32 bytes [slots][D], decoded; zeros where there is no row. */
static PyObject *database_vectors(Database *self, PyObject *unused) {
    (void)unused;
    vdb_database *db = enter(self);
    if (!db) return NULL;
    PyObject *bytes = NULL;
    size_t slots = 0;
    for (bool done = false; !done;) { /* rows may come while there is no lock */
        vdb_information facts;
        vdb_error error = information(db, &facts);
        Py_XDECREF(bytes);
        bytes = error ? NULL : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(facts.slots * self->dimensions * sizeof(float)));
        if (!bytes) break;
        float *out = (float *)(void *)PyBytes_AsString(bytes);
        Py_BEGIN_ALLOW_THREADS
        vdb_enter_read(&db->lock);
        slots = db->slots;
        done = slots == facts.slots;
        for (size_t row = 0; done && row < slots; row++) {
            if (vdb_is_live(db, row)) vdb_decode_row(db, row, out + row * self->dimensions);
            else memset(out + row * self->dimensions, 0, self->dimensions * sizeof(float));
        }
        vdb_leave_read(&db->lock);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (!bytes && !PyErr_Occurred()) PyErr_NoMemory();
    return bytes;
}

/* The vectors of a mapped file, [slots, D] float32, where they lie: nobody writes there. */
static int database_getbuffer(Database *self, Py_buffer *view, int flags) {
    view->obj = NULL;
    vdb_database *db = enter(self);
    if (!db) return -1;
    if (!db->mapping.base || !db->slots || vdb_element_of(db->options.storage) != VDB_F32 ||
        db->slots != db->mapping.slots || flags & PyBUF_WRITABLE) { /* rows that a journal adds lie elsewhere */
        leave(self);
        PyErr_SetString(PyExc_BufferError, "only a mapped file of float32 vectors lends them; see vectors()");
        return -1;
    }
    self->shape[0] = (Py_ssize_t)db->slots; /* which no mapped database changes */
    self->shape[1] = (Py_ssize_t)self->dimensions;
    self->strides[0] = (Py_ssize_t)(self->dimensions * sizeof(float));
    self->strides[1] = sizeof(float);
    Py_INCREF((PyObject *)self);
    view->obj = (PyObject *)self;
    view->buf = db->blocks[0].vectors;
    view->itemsize = sizeof(float);
    view->len = self->shape[0] * self->strides[0];
    view->readonly = 1;
    view->format = flags & PyBUF_FORMAT ? (char *)(uintptr_t)"f" : NULL;
    view->ndim = 2;
    view->shape = flags & PyBUF_ND ? self->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL;
    view->suboffsets = NULL;
    view->internal = NULL;
    return 0; /* still inside: close() waits for database_releasebuffer */
}

static void database_releasebuffer(Database *self, Py_buffer *view) {
    (void)view;
    leave(self);
}

static PyObject *database_dimensions(Database *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(self->dimensions);
}

static PyObject *database_metric(Database *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(self->metric);
}

static PyObject *database_closed(Database *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(atomic_load(&self->users) & 1 || !atomic_load(&self->db));
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function))
enum { FAST_NAMED = METH_FASTCALL | METH_KEYWORDS };

static PyMethodDef database_methods[] = {
    {"add", FAST(database_add), FAST_NAMED, add_doc},
    {"add_vector", FAST(database_add_vector), FAST_NAMED, add_vector_doc},
    {"search", FAST(database_search), FAST_NAMED, search_doc},
    {"find", FAST(database_find), FAST_NAMED, find_doc},
    {"remove", FAST(database_remove), FAST_NAMED, remove_doc},
    {"set_metadata", FAST(database_set_metadata), FAST_NAMED, set_metadata_doc},
    {"remove_vector", FAST(database_remove_vector), FAST_NAMED, remove_vector_doc},
    {"compact", FAST(database_compact), METH_NOARGS, compact_doc},
    {"reserve", FAST(database_reserve), FAST_NAMED, reserve_doc},
    {"set_threads", FAST(database_set_threads), FAST_NAMED, set_threads_doc},
    {"keep_on_disk", FAST(database_keep_on_disk), METH_O, keep_on_disk_doc},
    {"limit_resident", FAST(database_limit_resident), METH_FASTCALL, limit_resident_doc},
    {"count", FAST(database_count), METH_NOARGS, "count($self, /)\n--\n\nHow many rows there are."},
    {"save", FAST(database_save), FAST_NAMED, save_doc},
    {"_save_changes", FAST(database_save_changes), METH_O, save_changes_doc},
    {"open", FAST(database_open), FAST_NAMED | METH_CLASS, open_doc},
    {"close", FAST(database_close), METH_NOARGS,
     "close($self, /)\n--\n\nFree everything; calls of other threads that are inside end first. May be called again."},
    {"_row", FAST(database_row), FAST_NAMED, "(index, vector as float32 bytes, id, metadata) of one row."},
    {"_listing", FAST(database_listing), METH_NOARGS, "(indices of rows as int64 bytes, their ids)."},
    {"_vectors", FAST(database_vectors), METH_NOARGS, "Vectors of all indices as float32 bytes, zeros for none."},
    {"__bytes__", FAST(database_bytes), METH_NOARGS, "The content of the file that `save` would write."},
    {"from_bytes", FAST(database_from_bytes), METH_O | METH_CLASS, from_bytes_doc},
    {"_facts", FAST(database_facts), METH_NOARGS, "The fields of `Information`."},
    {"__enter__", FAST(database_enter), METH_NOARGS, NULL},
    {"__exit__", FAST(database_exit), METH_VARARGS, "Close the database."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef database_fields[] = {
    {"dimensions", (getter)database_dimensions, NULL, "Numbers in every vector.", NULL},
    {"_metric", (getter)database_metric, NULL, "The metric's number.", NULL},
    {"closed", (getter)database_closed, NULL, "Whether the database was closed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot database_slots[] = {
    {Py_tp_doc, "The core of octavo.vdb.VectorDatabase."},
    {Py_tp_new, database_new},
    {Py_tp_init, database_init},
    {Py_tp_dealloc, database_dealloc},
    {Py_tp_methods, database_methods},
    {Py_tp_getset, database_fields},
    {Py_sq_length, database_length},
    {Py_sq_contains, database_contains},
    {Py_bf_getbuffer, database_getbuffer},
    {Py_bf_releasebuffer, database_releasebuffer},
    {0, NULL},
};
static PyType_Spec database_spec = {
    "octavo.vdb._vdb.Database", sizeof(Database), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE, database_slots,
};

/* ---- the module ---- */

PyDoc_STRVAR(verify_doc, "verify($module, path, /)\n--\n\n"
"Read a whole saved database, every checksum too. Raises DatabaseFileError saying what is wrong with it.");

static PyObject *module_verify(PyObject *module, PyObject *path) {
    PyObject *name;
    if (!PyUnicode_FSConverter(path, &name)) return NULL;
    FileFault fault;
    Py_BEGIN_ALLOW_THREADS
    fault = verify_file(PyBytes_AsString(name));
    Py_END_ALLOW_THREADS
    Py_DECREF(name);
    if (fault.error) return raise_file(state_of(module), "verify", path, fault.error, fault.number, fault.message);
    Py_RETURN_NONE;
}

static PyObject *module_kernels(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(vdb_kernels());
}

PyDoc_STRVAR(set_kernels_doc, "set_kernels($module, name, /)\n--\n\n"
"Use these kernels in the whole process: \"plain\", \"avx2\", \"avx512\", \"amx\", \"neon\", or None for the best.\n\n"
"Must not run beside other calls. Answers do not depend on it. Raises ConfigError if this machine lacks them.");

static PyObject *module_set_kernels(PyObject *module, PyObject *name) {
    const char *text = NULL;
    if (name != Py_None) {
        text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : "";
        if (!text) return NULL;
    }
    if (vdb_set_kernels(text))
        return raise_error(state_of(module), CONFIG_ERROR, "this machine has no kernels %R; None chooses the best", name);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"verify", module_verify, METH_O, verify_doc},
    {"kernels", module_kernels, METH_NOARGS,
     "kernels($module, /)\n--\n\nThe kernels in use: \"plain\", \"avx2\", \"avx512\", \"amx\" or \"neon\"."},
    {"set_kernels", module_set_kernels, METH_O, set_kernels_doc},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec, PyTypeObject *base, const char *name) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, (PyObject *)base);
    if (type && name && PyModule_AddObjectRef(module, name, type)) {
        Py_DECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type;
}

/* The bytes of a list object, a multiple of a pointer's; -1 with an error set. */
static Py_ssize_t size_of_list(void) {
    PyObject *size = PyObject_GetAttrString((PyObject *)&PyList_Type, "__basicsize__");
    Py_ssize_t bytes = size ? PyLong_AsSsize_t(size) : -1;
    Py_XDECREF(size);
    return bytes;
}

static int module_prepare(PyObject *module) {
    State *state = state_of(module);
    PyObject *errors = PyImport_ImportModule("octavo.errors");
    if (!errors) return -1;
    bool good = true;
    for (int i = 0; good && i < ERRORS; i++)
        good = (state->errors[i] = PyObject_GetAttrString(errors, ERROR_NAMES[i])) != NULL;
    Py_DECREF(errors);
    for (int i = 0; good && i < WORD_COUNT; i++)
        good = (state->words[i] = PyUnicode_InternFromString(WORD_TEXTS[i])) != NULL;
    state->nothing = PyTuple_New(0);
    state->list_bytes = size_of_list();
    state->list_new = (newfunc)PyType_GetSlot(&PyList_Type, Py_tp_new);
    state->list_repeat = (ssizeargfunc)PyType_GetSlot(&PyList_Type, Py_sq_inplace_repeat);
    state->list_dealloc = (destructor)PyType_GetSlot(&PyList_Type, Py_tp_dealloc);
    PyType_Spec single = single_spec;
    single.basicsize = (int)(state->list_bytes + (Py_ssize_t)sizeof(Single));
    PyTypeObject *stand_in = good ? add_type(module, &stand_in_spec, NULL, NULL) : NULL;
    state->stand_in = stand_in ? PyObject_CallObject((PyObject *)stand_in, NULL) : NULL;
    Py_XDECREF((PyObject *)stand_in);
    good = good && state->stand_in && state->nothing && state->list_bytes > 0 &&
           (state->database = add_type(module, &database_spec, NULL, "Database")) &&
           (state->hits = add_type(module, &single, &PyList_Type, "Hits")) &&
           (state->batch = add_type(module, &hits_spec, NULL, "HitsBatch")) &&
           (state->column = add_type(module, &column_spec, NULL, NULL));
    return good ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    State *state = state_of(module);
    if (!state) return 0;
    for (int i = 0; i < ERRORS; i++) Py_VISIT(state->errors[i]);
    Py_VISIT((PyObject *)state->database);
    Py_VISIT((PyObject *)state->hits);
    Py_VISIT((PyObject *)state->batch);
    Py_VISIT((PyObject *)state->column);
    return 0;
}

/* Words and errors stay until the module is freed: objects of its types may still ask for them. */
static int module_clear(PyObject *module) {
    State *state = state_of(module);
    if (!state) return 0;
    Py_CLEAR(state->database);
    return 0;
}

static void module_free(void *module) {
    State *state = state_of(module);
    if (!state) return;
    module_clear(module);
    for (int i = 0; i < ERRORS; i++) Py_CLEAR(state->errors[i]);
    for (int i = 0; i < WORD_COUNT; i++) Py_CLEAR(state->words[i]);
    Py_CLEAR(state->hits);
    Py_CLEAR(state->batch);
    Py_CLEAR(state->column);
    Py_CLEAR(state->nothing);
    Py_CLEAR(state->stand_in);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_prepare},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_vdb",
    .m_doc = "vdb.h for Python; octavo.vdb is the public side.",
    .m_size = sizeof(State),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__vdb(void) { return PyModuleDef_Init(&definition); }
