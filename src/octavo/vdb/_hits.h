/* The answer of a search, as a sequence and as arrays that are lent. */
/* The answers to a batch, to one query given alone, or (with a parent, which owns them) to one query of a batch. */
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
    Hits *hits = PyObject_New(Hits, state->hits);
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

static size_t hits_count(const Hits *self, size_t query) { return self->answer->counts[self->first + query]; }

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
    if (!answer->metadata[at]) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(answer->metadata[at], (Py_ssize_t)answer->metadata_sizes[at]);
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
    int fields = self->answer->metadata ? 4 : 3;
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

static Py_ssize_t hits_length(Hits *self) {
    return (Py_ssize_t)(self->single ? hits_count(self, 0) : self->queries);
}

static PyObject *hits_item(Hits *self, Py_ssize_t i) {
    if (i < 0 || i >= hits_length(self)) {
        PyErr_SetString(PyExc_IndexError, "hits index out of range");
        return NULL;
    }
    if (self->single) return dictionary_at(self, 0, (size_t)i);
    Hits *one = hits_new(self->state, self->answer, self->parent ? self->parent : self);
    if (!one) return NULL;
    one->first = self->first + (size_t)i;
    one->queries = 1;
    one->single = true;
    return (PyObject *)one;
}

static PyObject *hits_list(Hits *self) {
    if (self->single) return list_of_query(self, dictionary_at, 0);
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
    bool same_type = Py_TYPE(other) == self->state->hits;
    if ((operation != Py_EQ && operation != Py_NE) || !(same_type || PyList_Check(other)))
        Py_RETURN_NOTIMPLEMENTED;
    PyObject *mine = hits_list(self), *theirs = same_type ? hits_list((Hits *)other) : Py_NewRef(other);
    PyObject *result = mine && theirs ? PyObject_RichCompare(mine, theirs, operation) : NULL;
    Py_XDECREF(mine);
    Py_XDECREF(theirs);
    return result;
}

static PyObject *hits_repr(Hits *self) {
    if (!self->single) return PyUnicode_FromFormat("<Hits of %zu queries, k=%zu>", self->queries, self->k);
    PyObject *list = hits_list(self), *text = list ? PyUnicode_FromFormat("Hits(%R)", list) : NULL;
    Py_XDECREF(list);
    return text;
}

static PyGetSetDef hits_fields[] = {
    {"distances", (getter)hits_distances, NULL,
     "float32, ascending: [found] for one query, [n, k] for a batch, inf where fewer were found. A memoryview.", NULL},
    {"indices", (getter)hits_indices, NULL,
     "int64: [found] for one query, [n, k] for a batch, -1 where fewer were found. A memoryview.", NULL},
    {"ids", (getter)hits_ids, NULL,
     "The ids, None for a row without: a list for one query, for a batch a list of lists as long as `counts` says.",
     NULL},
    {"metadata", (getter)hits_metadata, NULL,
     "The metadata (bytes, or None), in lists like `ids`; only if the search was asked with_metadata.", NULL},
    {"counts", (getter)hits_counts, NULL, "How many rows were found for each query.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(hits_doc, "The rows nearest to one query or to a batch of queries, nearest first.\n\n"
"To one query, given as [D]: a sequence of {'index', 'distance', 'id'} (and 'metadata', if it was asked for), equal\n"
"to a list of the same. To a batch, given as [n, D]: a sequence of n of these; k is then the number asked for or the\n"
"number of rows, if that is less. The arrays are lent, not copied: numpy.asarray(hits.distances).");

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
    "octavo.vdb.Hits", sizeof(Hits), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, hits_slots,
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
