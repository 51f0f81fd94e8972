/* Which rows a search may answer with: a bitset, made of what users pass. */
static vdb_error information(const vdb_database *db, vdb_information *out) {
    vdb_error error;
    Py_BEGIN_ALLOW_THREADS
    error = vdb_info(db, out);
    Py_END_ALLOW_THREADS
    return error;
}

typedef struct {
    const char *id; /* NULL if the item is an index */
    uint64_t index;
} FilterItem;

/* A bitset over indices, or the items that it is to be made of when the search has begun, so that no other thread can
   give an id's row to another id in between. */
typedef struct {
    uint64_t *words;
    size_t count;
    FilterItem *items;
    PyObject *source; /* a tuple that keeps the ids alive */
    Py_ssize_t item_count, unknown;
    bool has_where;
    vdb_condition where;
    Arena arena; /* of the condition */
} Filter;

static void filter_close(Filter *filter) {
    free(filter->words);
    free(filter->items);
    Py_XDECREF(filter->source);
    arena_close(&filter->arena);
}

/* Needs no GIL. */
static bool filter_make(Filter *filter, size_t bits) {
    filter->count = bits / 64 + 1;
    filter->words = calloc(filter->count, sizeof *filter->words);
    return filter->words != NULL;
}

static bool filter_allocate(Filter *filter, size_t bits) { return filter_make(filter, bits) || no_memory(); }

static void filter_set(Filter *filter, uint64_t index) {
    if (index / 64 < filter->count) filter->words[index / 64] |= (uint64_t)1 << index % 64;
}

static void raise_index(const State *state, long long index, size_t slots) {
    raise_error(state, UNKNOWN_ID, "filter: index %lld; indices of this database are from 0 to %zd", index,
                (Py_ssize_t)slots - 1);
}

static long long integer_at(const View *view, Py_ssize_t i) {
    const char *from = (const char *)view->data + i * view->item;
    bool is_signed = view->kind >= 'a';
    int64_t wide = 0;
    memcpy(&wide, from, (size_t)view->item);
    if (view->item < 8 && is_signed) { /* the sign moves up */
        unsigned shift = 64 - 8 * (unsigned)view->item;
        wide = (int64_t)((uint64_t)wide << shift) >> shift;
    }
    return wide;
}

/* 1 if the array was understood, 0 if its items must be asked one by one, -1 with an error set. */
static int filter_from_view(const State *state, PyObject *source, const View *view, size_t slots, Filter *out) {
    bool integers = view->kind && strchr("bhilqnHILQN", view->kind);
    if (!integers && view->kind != '?' && view->kind != 'B') return 0;
    if (view->dimensions != 1 || !view->contiguous) {
        raise_error(state, CONFIG_ERROR, "filter: an array must have one dimension and be contiguous");
        return -1;
    }
    size_t size = (size_t)view->shape[0];
    if (view->kind == '?' && size != slots) {
        raise_error(state, CONFIG_ERROR,
                    "filter: %zu bools, but one for each of the %zu indices (info().slots) is needed", size, slots);
        return -1;
    }
    /* An array of uint8 may be meant as indices. What packbits made has a byte for every eight rows, and no more bits. */
    const unsigned char *bits = view->data;
    if (view->kind == 'B' && !is_raw(source) &&
        (size != (slots + 7) / 8 || (slots % 8 && bits[size - 1] >> slots % 8))) {
        raise_error(state, CONFIG_ERROR,
                    "filter: an array of %zu uint8 is no bitset of the %zu indices (info().slots), which has %zu bytes and "
                    "no bit past the last index; pass indices as wider integers, e.g. x.astype(\"int64\")",
                    size, slots, (slots + 7) / 8);
        return -1;
    }
    if (!filter_allocate(out, view->kind == 'B' ? 8 * size : slots)) return -1;
    if (view->kind == 'B') memcpy(out->words, view->data, size);
    for (size_t i = 0; view->kind == '?' && i < size; i++)
        if (((const char *)view->data)[i]) filter_set(out, i);
    for (size_t i = 0; integers && i < size; i++) {
        long long index = integer_at(view, (Py_ssize_t)i);
        if (index < 0 || (uint64_t)index >= slots) {
            raise_index(state, index, slots);
            return -1;
        }
        filter_set(out, (uint64_t)index);
    }
    return 1;
}

/* Asks the function about every row, before the search and under the GIL. */
static bool filter_from_function(const vdb_database *db, PyObject *function, size_t slots, Filter *out) {
    Filter live = {0};
    if (!filter_allocate(&live, slots)) return false;
    bool good = filter_allocate(out, slots);
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; good && i < slots; i++)
        if (vdb_get_vector(db, i, NULL, NULL, NULL) == VDB_OK) filter_set(&live, i);
    Py_END_ALLOW_THREADS
    for (size_t i = 0; good && i < slots; i++) {
        if (!(live.words[i / 64] >> i % 64 & 1)) continue;
        PyObject *index = PyLong_FromSize_t(i);
        PyObject *answer = index ? PyObject_CallFunctionObjArgs(function, index, NULL) : NULL;
        int keep = answer ? PyObject_IsTrue(answer) : -1;
        Py_XDECREF(index);
        Py_XDECREF(answer);
        good = keep >= 0;
        if (keep > 0) filter_set(out, i);
    }
    free(live.words);
    return good;
}

static bool read_filter_items(const State *state, PyObject *items, size_t slots, FilterItem *out) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(items); i++) {
        PyObject *item = PyTuple_GetItem(items, i);
        char place[32];
        snprintf(place, sizeof place, "filter[%zd]", i);
        if (PyUnicode_Check(item)) {
            if (!(out[i].id = read_id(state, item, place, NULL))) return false;
            continue;
        }
        if (PyBool_Check(item)) {
            raise_error(state, CONFIG_ERROR, "%s is a bool; pass indices, or one bool per index as a numpy array",
                        place);
            return false;
        }
        PyObject *number = PyNumber_Index(item);
        if (!number) {
            PyErr_Clear();
            raise_error(state, CONFIG_ERROR, "%s is %R, neither an id (str) nor an index (int)", place, item);
            return false;
        }
        int overflow;
        long long index = PyLong_AsLongLongAndOverflow(number, &overflow); /* -1 if it overflows */
        Py_DECREF(number);
        if (index < 0 || (uint64_t)index >= slots) {
            raise_index(state, index, slots);
            return false;
        }
        out[i].id = NULL;
        out[i].index = (uint64_t)index;
    }
    return true;
}

static bool filter_from_items(const State *state, PyObject *source, size_t slots, Filter *out) {
    if (!PyUnicode_Check(source)) out->source = PySequence_Tuple(source);
    if (!out->source) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return false;
        PyErr_Clear();
        raise_error(state, CONFIG_ERROR,
                    "filter is %R; pass ids, indices, a bitset, a function or a dict of conditions, and one id as a list", source);
        return false;
    }
    out->item_count = PyTuple_Size(out->source);
    out->items = malloc(sizeof *out->items * ((size_t)out->item_count + 1));
    return out->items ? read_filter_items(state, out->source, slots, out->items) : no_memory();
}

/* The bitset of a filter's items, under a lock that keeps writers out: hence vdb.h's own functions, which also name every
   row of an id, where vdb_find names one. VDB_ERROR_NOT_FOUND for an id that no row has and, if `strict`, for an index. */
static vdb_error filter_items(const vdb_database *db, Filter *filter, bool strict) {
    free(filter->words);
    if (!filter_make(filter, db->slots)) return VDB_ERROR_OUT_OF_MEMORY;
    for (Py_ssize_t i = 0; i < filter->item_count; i++) {
        const FilterItem *item = &filter->items[i];
        size_t found = 0, place = 0, size = item->id ? strlen(item->id) : 0;
        uint32_t row;
        if (!item->id) found = !strict || vdb_is_row(db, item->index);
        if (!item->id) filter_set(filter, item->index);
        for (; size && (row = vdb_table_next(db, item->id, size, &place)) != VDB_NO_ROW; found++) filter_set(filter, row);
        if (found) continue;
        filter->unknown = i;
        return VDB_ERROR_NOT_FOUND;
    }
    return VDB_OK;
}

static void raise_unknown_item(const State *state, const char *name, const Filter *filter) {
    PyObject *item = PyTuple_GetItem(filter->source, filter->unknown);
    raise_error(state, UNKNOWN_ID, filter->items[filter->unknown].id ? "%s: no row has the id %R" : "%s: no row has the index %R",
                name, item);
}

/* How far a search goes: to the k nearest, or to all rows within a radius, or both. */
typedef struct {
    bool within;
    float radius;
} Reach;

/* vdb_query or vdb_query_within, with the items of a filter at one moment. */
static vdb_error query_rows(vdb_database *db, const float *queries, size_t count, vdb_query_options *options, Reach reach,
                            Filter *filter, vdb_answer **out) {
    if (!filter->items && !reach.within) return vdb_query(db, queries, count, options, out);
    if (!filter->items) return vdb_query_within(db, queries, count, reach.radius, options, out);
    if (!vdb_all_finite(queries, count * db->dimensions)) return VDB_ERROR_NOT_FINITE;
    vdb_enter_read(&db->lock);
    vdb_error error = filter_items(db, filter, false);
    options->bitset = filter->words;
    options->bitset_words = filter->count;
    if (!error && options->k) error = vdb_query_locked(db, queries, count, options, out);
    else if (!error) error = vdb_range_locked(db, queries, count, reach.radius, options, out);
    vdb_leave_read(&db->lock);
    for (size_t q = 0; !error && reach.within && q < count; q++) vdb_cut_answer(*out, q, reach.radius);
    return error;
}

/* Removes the rows of a filter, all or none of them. */
static vdb_error remove_filtered(vdb_database *db, Filter *filter, size_t *removed) {
    vdb_query_options options = vdb_default_query_options(1);
    *removed = 0;
    if (!filter->items) {
        options.bitset = filter->words;
        options.bitset_words = filter->count;
        options.where = filter->has_where ? &filter->where : NULL;
        return vdb_remove_where(db, &options, removed);
    }
    if (db->mapping.base) return VDB_ERROR_READ_ONLY;
    vdb_enter_write(&db->lock);
    vdb_error error = filter_items(db, filter, true);
    options.bitset = filter->words;
    options.bitset_words = filter->count;
    if (!error) *removed = vdb_drop_passing(db, &options);
    vdb_leave_write(&db->lock);
    return error;
}

static bool read_filter(const State *state, const vdb_database *db, PyObject *source, Filter *out) {
    vdb_information facts;
    if (PyDict_Check(source)) {
        out->has_where = true;
        return read_condition(state, source, 0, &out->arena, &out->where);
    }
    vdb_error error = information(db, &facts);
    if (error) {
        raise_failure(state, error, "filter");
        return false;
    }
    View view;
    int array = view_open(state, source, &view);
    if (array < 0) PyErr_Clear(); /* arrays of text, say: their items are asked */
    if (array > 0) {
        int done = filter_from_view(state, source, &view, facts.slots, out);
        view_close(&view);
        if (done) return done > 0;
    }
    if (PyCallable_Check(source)) return filter_from_function(db, source, facts.slots, out);
    return filter_from_items(state, source, facts.slots, out);
}
