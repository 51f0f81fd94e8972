/* The answer of a search, as a list or a sequence of lists, and as arrays that are lent. */

/* The answers to a batch (the Python type HitsBatch), to one query given alone, or (with a parent, which owns them) to one
 * query of a batch. Of the latter two the Python type is Hits, a list that has one of these beside its items. */
typedef struct Hits {
    PyObject_HEAD
    State *state;
    struct Hits *parent;
    vdb_answer *answer; /* NULL for a batch of no queries */
    size_t first, queries, k;
    bool single;
} Hits;

/* What memoryview needs to lend one array of a Hits. */
typedef struct {
    PyObject_HEAD
    Hits *hits;
    void *data;
    const char *format;
    Py_ssize_t item, shape[2], strides[2];
    int dimensions;
} Column;

static Hits *hits_new(State *state, vdb_answer *answer, Hits *parent) {
    Hits *hits = PyObject_New(Hits, state->batch);
    if (!hits) return NULL;
    hits->state = state;
    hits->parent = parent;
    hits->answer = answer;
    hits->first = 0;
    hits->queries = answer ? answer->queries : 0;
    hits->k = answer ? answer->k : 0;
    hits->single = false;
    Py_XINCREF((PyObject *)parent);
    return hits;
}

static void hits_dealloc(Hits *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->parent) Py_DECREF(self->parent);
    else if (self->answer) vdb_free_answer(self->answer);
    PyObject_Free(self);
    Py_DECREF(type);
}

static size_t hits_count(const Hits *self, size_t query) {
    return self->answer ? self->answer->counts[self->first + query] : 0;
}

static PyObject *column_new(Hits *self, void *data, const char *format, Py_ssize_t item) {
    Column *column = PyObject_New(Column, self->state->column);
    if (!column) return NULL;
    Py_INCREF((PyObject *)self);
    column->hits = self;
    column->data = data;
    column->format = format;
    column->item = item;
    column->dimensions = self->single ? 1 : 2;
    if (self->single) column->shape[0] = (Py_ssize_t)hits_count(self, 0);
    else column->shape[0] = (Py_ssize_t)self->queries, column->shape[1] = (Py_ssize_t)self->k;
    column->strides[0] = self->single ? item : item * column->shape[1];
    column->strides[1] = item;
    PyObject *view = PyMemoryView_FromObject((PyObject *)column);
    Py_DECREF(column);
    return view;
}

static int column_getbuffer(Column *self, Py_buffer *view, int flags) {
    view->obj = NULL;
    bool fortran = (flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS &&
                   (flags & PyBUF_ANY_CONTIGUOUS) != PyBUF_ANY_CONTIGUOUS;
    if (flags & PyBUF_WRITABLE || (fortran && self->dimensions == 2)) {
        PyErr_SetString(PyExc_BufferError, "the answer of a search is read-only, in rows");
        return -1;
    }
    Py_INCREF((PyObject *)self);
    view->obj = (PyObject *)self;
    view->buf = self->data;
    view->itemsize = self->item;
    view->len = self->item * self->shape[0] * (self->dimensions == 2 ? self->shape[1] : 1);
    view->readonly = 1;
    view->format = flags & PyBUF_FORMAT ? (char *)self->format : NULL;
    view->ndim = self->dimensions;
    view->shape = flags & PyBUF_ND ? self->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL;
    view->suboffsets = NULL;
    view->internal = NULL;
    return 0;
}

static void column_dealloc(Column *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_DECREF(self->hits);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *hits_distances(Hits *self, void *unused) {
    (void)unused;
    static float none;
    float *data = self->answer ? self->answer->distances + self->first * self->k : &none;
    return column_new(self, data, "f", sizeof *data);
}

static PyObject *hits_indices(Hits *self, void *unused) {
    (void)unused;
    static uint64_t none; /* VDB_NO_INDEX is -1 when read as int64 */
    uint64_t *data = self->answer ? self->answer->indices + self->first * self->k : &none;
    return column_new(self, data, "q", sizeof *data);
}

static PyObject *id_at(const Hits *self, size_t query, size_t place) {
    const vdb_answer *answer = self->answer;
    return id_object(answer->ids ? answer->ids[(self->first + query) * self->k + place] : NULL);
}

static PyObject *metadata_at(const Hits *self, size_t query, size_t place) {
    const vdb_answer *answer = self->answer;
    size_t at = (self->first + query) * self->k + place;
    return metadata_object(answer->metadata[at], answer->metadata_sizes[at], answer->has_values[at]);
}

static PyObject *distance_at(const Hits *self, size_t query, size_t place) {
    return PyFloat_FromDouble((double)self->answer->distances[(self->first + query) * self->k + place]);
}

static PyObject *index_at(const Hits *self, size_t query, size_t place) {
    return PyLong_FromUnsignedLongLong(self->answer->indices[(self->first + query) * self->k + place]);
}

typedef PyObject *Getter(const Hits *, size_t query, size_t place);

static PyObject *list_of_query(const Hits *self, Getter *get, size_t query) {
    size_t count = hits_count(self, query);
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        PyObject *item = get(self, query, i);
        if (!item || PyList_SetItem(list, (Py_ssize_t)i, item)) {
            Py_DECREF(list);
            list = NULL;
        }
    }
    return list;
}

/* For one query a list, for a batch a list of lists, each as long as its query's count. */
static PyObject *lists(const Hits *self, Getter *get) {
    if (self->single) return list_of_query(self, get, 0);
    PyObject *all = PyList_New((Py_ssize_t)self->queries);
    for (size_t i = 0; all && i < self->queries; i++) {
        PyObject *list = list_of_query(self, get, i);
        if (!list || PyList_SetItem(all, (Py_ssize_t)i, list)) {
            Py_DECREF(all);
            all = NULL;
        }
    }
    return all;
}

static PyObject *hits_ids(Hits *self, void *unused) {
    (void)unused;
    return lists(self, id_at);
}

static PyObject *hits_metadata(Hits *self, void *unused) {
    (void)unused;
    if (self->answer && !self->answer->metadata)
        return raise_error(self->state, CONFIG_ERROR, "no metadata was asked for; pass with_metadata=True to search()");
    return lists(self, metadata_at);
}

static PyObject *hits_counts(Hits *self, void *unused) {
    (void)unused;
    PyObject *list = PyList_New((Py_ssize_t)self->queries);
    for (size_t i = 0; list && i < self->queries; i++) {
        PyObject *count = PyLong_FromSize_t(hits_count(self, i));
        if (!count || PyList_SetItem(list, (Py_ssize_t)i, count)) {
            Py_DECREF(list);
            list = NULL;
        }
    }
    return list;
}

/* {'index', 'distance', 'id'}, as the first version answered. */
static PyObject *dictionary_at(const Hits *self, size_t query, size_t place) {
    static const struct {
        int word;
        Getter *get;
    } FIELDS[] = {{WORD_index, index_at}, {WORD_distance, distance_at}, {WORD_id, id_at}, {WORD_metadata, metadata_at}};
    int fields = self->answer && self->answer->metadata ? 4 : 3;
    PyObject *hit = PyDict_New();
    for (int i = 0; hit && i < fields; i++) {
        PyObject *value = FIELDS[i].get(self, query, place);
        if (!value || PyDict_SetItem(hit, self->state->words[FIELDS[i].word], value)) {
            Py_DECREF(hit);
            hit = NULL;
        }
        Py_XDECREF(value);
    }
    return hit;
}

/* ---- one query: a list ----
 *
 * Dictionaries of a thousand rows cost more than finding them, and who reads the arrays wants none. So the list is filled
 * when Python first looks into it: every slot and method of list does that first. Until then its items are one stand-in,
 * of the right number, which no serialiser takes: C code that reads lists by their memory fails with its name. */

typedef struct {
    Hits *arrays;
    bool filled;
} Single;

/* What a list is to the interpreter is not ours to know: ours comes after it. */
static Single *single_of(const State *state, PyObject *list) {
    return (Single *)(void *)((char *)list + state->list_bytes);
}

static State *state_of_single(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

#define LIST(type, slot) ((type)PyType_GetSlot(&PyList_Type, slot))

/* The list of a query's rows, which takes `arrays` over; NULL with an error set. */
static PyObject *single_new(State *state, Hits *arrays) {
    Py_ssize_t count = (Py_ssize_t)hits_count(arrays, 0);
    PyObject *list = state->list_new(state->hits, state->nothing, NULL);
    if (!list) {
        Py_DECREF((PyObject *)arrays);
        return NULL;
    }
    *single_of(state, list) = (Single){arrays, count == 0};
    PyObject *same = NULL;
    if (count && !PyList_Append(list, state->stand_in)) same = count > 1 ? state->list_repeat(list, count) : Py_NewRef(list);
    if (count && !same) Py_CLEAR(list);
    Py_XDECREF(same);
    return list;
}

static bool single_fill(PyObject *self) {
    const State *state = state_of_single(self);
    Single *single = single_of(state, self);
    if (single->filled) return true;
    PyObject *rows = list_of_query(single->arrays, dictionary_at, 0);
    bool good = rows != NULL;
    if (good && !single->filled) { /* another thread may have come first */
        single->filled = true;
        good = PyList_SetSlice(self, 0, PyList_Size(self), rows) == 0;
    }
    Py_XDECREF(rows);
    return good;
}

static void single_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    const State *state = state_of_single(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(single_of(state, self)->arrays);
    state->list_dealloc(self);
    Py_DECREF(type);
}

static int single_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    return LIST(traverseproc, Py_tp_traverse)(self, visit, arg);
}

static PyObject *single_get(PyObject *self, void *getter) {
    return ((PyObject * (*)(Hits *, void *)) getter)(single_of(state_of_single(self), self)->arrays, NULL);
}

static PyObject *single_iter(PyObject *self) { return single_fill(self) ? LIST(getiterfunc, Py_tp_iter)(self) : NULL; }

static PyObject *single_item(PyObject *self, Py_ssize_t i) {
    return single_fill(self) ? LIST(ssizeargfunc, Py_sq_item)(self, i) : NULL;
}

static int single_set_item(PyObject *self, Py_ssize_t i, PyObject *value) {
    return single_fill(self) ? LIST(ssizeobjargproc, Py_sq_ass_item)(self, i, value) : -1;
}

static PyObject *single_subscript(PyObject *self, PyObject *key) {
    return single_fill(self) ? LIST(binaryfunc, Py_mp_subscript)(self, key) : NULL;
}

static int single_set_subscript(PyObject *self, PyObject *key, PyObject *value) {
    return single_fill(self) ? LIST(objobjargproc, Py_mp_ass_subscript)(self, key, value) : -1;
}

static int single_contains(PyObject *self, PyObject *value) {
    return single_fill(self) ? LIST(objobjproc, Py_sq_contains)(self, value) : -1;
}

static PyObject *single_repeat(PyObject *self, Py_ssize_t count) {
    return single_fill(self) ? LIST(ssizeargfunc, Py_sq_repeat)(self, count) : NULL;
}

static PyObject *single_repeat_in_place(PyObject *self, Py_ssize_t count) {
    return single_fill(self) ? LIST(ssizeargfunc, Py_sq_inplace_repeat)(self, count) : NULL;
}

static bool fill_either(PyObject *object) {
    void *dealloc = PyType_GetFlags(Py_TYPE(object)) & Py_TPFLAGS_HEAPTYPE ? PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc)
                                                                           : NULL;
    return dealloc != (void *)single_dealloc || single_fill(object);
}

/* Of either order: list + hits must fill the right side before list's own code reads it. */
static PyObject *single_add(PyObject *left, PyObject *right) {
    if (!PyList_Check(left) || !PyList_Check(right)) Py_RETURN_NOTIMPLEMENTED;
    return fill_either(left) && fill_either(right) ? LIST(binaryfunc, Py_sq_concat)(left, right) : NULL;
}

static PyObject *single_concat(PyObject *self, PyObject *other) {
    return single_fill(self) ? LIST(binaryfunc, Py_sq_concat)(self, other) : NULL;
}

static PyObject *single_add_in_place(PyObject *self, PyObject *other) {
    return single_fill(self) ? LIST(binaryfunc, Py_sq_inplace_concat)(self, other) : NULL;
}

static PyObject *single_compare(PyObject *self, PyObject *other, int operation) {
    return single_fill(self) && fill_either(other) ? LIST(richcmpfunc, Py_tp_richcompare)(self, other, operation) : NULL;
}

static int single_init(PyObject *self, PyObject *args, PyObject *named) {
    return single_fill(self) ? LIST(initproc, Py_tp_init)(self, args, named) : -1;
}

static PyObject *single_plain(PyObject *self) {
    return single_fill(self) ? PyList_GetSlice(self, 0, PyList_Size(self)) : NULL;
}

static PyObject *single_repr(PyObject *self) {
    PyObject *list = single_plain(self), *text = list ? PyUnicode_FromFormat("Hits(%R)", list) : NULL;
    Py_XDECREF(list);
    return text;
}

/* Copied and pickled it is a plain list. */
static PyObject *single_reduce(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject *list = single_plain(self);
    return list ? Py_BuildValue("(O(N))", (PyObject *)&PyList_Type, list) : NULL;
}

/* A method of list, on the filled list. */
static PyObject *single_call(PyObject *self, const char *name, PyObject *args, PyObject *named) {
    if (!single_fill(self)) return NULL;
    PyObject *above = PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, (PyObject *)Py_TYPE(self), self, NULL);
    PyObject *method = above ? PyObject_GetAttrString(above, name) : NULL;
    PyObject *result = method ? PyObject_Call(method, args, named) : NULL;
    Py_XDECREF(method);
    Py_XDECREF(above);
    return result;
}

#define LIST_METHODS(X)                                                                                           \
    X(append) X(clear) X(copy) X(count) X(extend) X(index) X(insert) X(pop) X(remove) X(reverse) X(sort)          \
    X(__reversed__)
#define AS_FUNCTION(name)                                                                  \
    static PyObject *single_method_##name(PyObject *self, PyObject *args, PyObject *named) { \
        return single_call(self, #name, args, named);                                      \
    }
LIST_METHODS(AS_FUNCTION)
#undef AS_FUNCTION

/* ---- many queries: a sequence of such lists, made when asked for ---- */

static Py_ssize_t hits_length(Hits *self) { return (Py_ssize_t)self->queries; }

static PyObject *hits_item(Hits *self, Py_ssize_t i) {
    if (i < 0 || i >= hits_length(self)) {
        PyErr_SetString(PyExc_IndexError, "hits index out of range");
        return NULL;
    }
    Hits *one = hits_new(self->state, self->answer, self);
    if (!one) return NULL;
    one->first = (size_t)i;
    one->queries = 1;
    one->single = true;
    return single_new(self->state, one);
}

static PyObject *hits_list(Hits *self) {
    PyObject *list = PyList_New((Py_ssize_t)self->queries);
    for (Py_ssize_t i = 0; list && i < hits_length(self); i++) {
        PyObject *item = hits_item(self, i);
        if (!item || PyList_SetItem(list, i, item)) {
            Py_DECREF(list);
            list = NULL;
        }
    }
    return list;
}

static PyObject *hits_subscript(Hits *self, PyObject *key) {
    if (PyIndex_Check(key)) {
        Py_ssize_t i = PyNumber_AsSsize_t(key, PyExc_IndexError);
        if (i == -1 && PyErr_Occurred()) return NULL;
        return hits_item(self, i < 0 ? i + hits_length(self) : i);
    }
    PyObject *list = hits_list(self), *items = list ? PyObject_GetItem(list, key) : NULL;
    Py_XDECREF(list);
    return items;
}

static PyObject *hits_compare(Hits *self, PyObject *other, int operation) {
    bool same_type = Py_TYPE(other) == self->state->batch;
    if ((operation != Py_EQ && operation != Py_NE) || !(same_type || PyList_Check(other)))
        Py_RETURN_NOTIMPLEMENTED;
    PyObject *mine = hits_list(self), *theirs = same_type ? hits_list((Hits *)other) : Py_NewRef(other);
    PyObject *result = mine && theirs ? PyObject_RichCompare(mine, theirs, operation) : NULL;
    Py_XDECREF(mine);
    Py_XDECREF(theirs);
    return result;
}

static PyObject *hits_repr(Hits *self) {
    return PyUnicode_FromFormat("<Hits of %zu queries, k=%zu>", self->queries, self->k);
}

#define FIELD(name, single, batch)                                                    \
    static const char name##_doc[] = single, name##_batch_doc[] = batch;
FIELD(distances, "float32, ascending: [found]. A memoryview.",
      "float32, ascending: [n, k], inf where fewer were found. A memoryview.")
FIELD(indices, "int64: [found]. A memoryview.", "int64: [n, k], -1 where fewer were found. A memoryview.")
FIELD(ids, "The ids, None for a row without: a list.",
      "The ids, None for a row without: a list of lists as long as `counts` says.")
FIELD(metadata, "The metadata (bytes, dict or None), in a list; only if the search was asked with_metadata.",
      "The metadata (bytes, dict or None), in lists like `ids`; only if the search was asked with_metadata.")
FIELD(counts, "How many rows were found: a list of one number.", "How many rows were found for each query.")
#undef FIELD

static PyGetSetDef hits_fields[] = {
    {"distances", (getter)hits_distances, NULL, distances_batch_doc, NULL},
    {"indices", (getter)hits_indices, NULL, indices_batch_doc, NULL},
    {"ids", (getter)hits_ids, NULL, ids_batch_doc, NULL},
    {"metadata", (getter)hits_metadata, NULL, metadata_batch_doc, NULL},
    {"counts", (getter)hits_counts, NULL, counts_batch_doc, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyGetSetDef single_fields[] = {
    {"distances", single_get, NULL, distances_doc, (void *)hits_distances},
    {"indices", single_get, NULL, indices_doc, (void *)hits_indices},
    {"ids", single_get, NULL, ids_doc, (void *)hits_ids},
    {"metadata", single_get, NULL, metadata_doc, (void *)hits_metadata},
    {"counts", single_get, NULL, counts_doc, (void *)hits_counts},
    {NULL, NULL, NULL, NULL, NULL},
};

#define AS_METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))single_method_##name, METH_VARARGS | METH_KEYWORDS, "As list." #name "."},
static PyMethodDef single_methods[] = {
    {"__reduce__", single_reduce, METH_NOARGS, NULL},
    LIST_METHODS(AS_METHOD)
#undef AS_METHOD
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(single_doc, "The rows nearest to one query, nearest first: a list of {'index', 'distance', 'id'}, and\n"
"'metadata' if it was asked for.\n\n"
"The list is the caller's: it may be sorted, changed and written as JSON. The arrays are lent, not copied, and stay the\n"
"answer: numpy.asarray(hits.distances).");

PyDoc_STRVAR(hits_doc, "The rows nearest to each of a batch of queries, given as [n, D]: a sequence of n `Hits`.\n\n"
"k is the number asked for, or the number of rows if that is less. The arrays are lent, not copied:\n"
"numpy.asarray(hits.distances).");

static PyType_Slot single_slots[] = {
    {Py_tp_doc, (void *)single_doc},
    {Py_tp_dealloc, single_dealloc},
    {Py_tp_traverse, single_traverse},
    {Py_tp_getset, single_fields},
    {Py_tp_methods, single_methods},
    {Py_tp_repr, single_repr},
    {Py_tp_init, single_init},
    {Py_tp_iter, single_iter},
    {Py_tp_richcompare, single_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_nb_add, single_add},
    {Py_sq_concat, single_concat},
    {Py_sq_inplace_concat, single_add_in_place},
    {Py_sq_repeat, single_repeat},
    {Py_sq_inplace_repeat, single_repeat_in_place},
    {Py_sq_item, single_item},
    {Py_sq_ass_item, single_set_item},
    {Py_sq_contains, single_contains},
    {Py_mp_subscript, single_subscript},
    {Py_mp_ass_subscript, single_set_subscript},
    {0, NULL},
};
static PyType_Spec single_spec = { /* its size is filled in when the module is made */
    "octavo.vdb.Hits", 0, 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    single_slots,
};

static PyType_Slot hits_slots[] = {
    {Py_tp_doc, (void *)hits_doc},
    {Py_tp_dealloc, hits_dealloc},
    {Py_tp_getset, hits_fields},
    {Py_tp_repr, hits_repr},
    {Py_tp_richcompare, hits_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_tp_iter, PySeqIter_New},
    {Py_sq_length, hits_length},
    {Py_sq_item, hits_item},
    {Py_mp_length, hits_length},
    {Py_mp_subscript, hits_subscript},
    {0, NULL},
};
static PyType_Spec hits_spec = {
    "octavo.vdb.HitsBatch", sizeof(Hits), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, hits_slots,
};

static PyObject *stand_in_repr(PyObject *self) {
    (void)self;
    return PyUnicode_FromString("<a row of Hits that nobody has looked at; pass list(hits)>");
}

static PyType_Slot stand_in_slots[] = {
    {Py_tp_repr, stand_in_repr},
    {0, NULL},
};
static PyType_Spec stand_in_spec = {
    "octavo.vdb.a_row_of_Hits_pass_list_hits", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    stand_in_slots,
};

static PyType_Slot column_slots[] = {
    {Py_tp_dealloc, column_dealloc},
    {Py_bf_getbuffer, column_getbuffer},
    {0, NULL},
};
static PyType_Spec column_spec = {
    "octavo.vdb._vdb.Column", sizeof(Column), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, column_slots,
};
