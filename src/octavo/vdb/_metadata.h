/* Metadata as values: dicts to vdb_value and back, and conditions on them. */

/* Memory and objects that last as long as a call. */
typedef struct {
    void **blocks;
    size_t count, capacity;
    PyObject *objects; /* a list that keeps texts alive; NULL until there is one */
} Arena;

static void arena_close(Arena *arena) {
    for (size_t i = 0; i < arena->count; i++) free(arena->blocks[i]);
    free(arena->blocks);
    Py_XDECREF(arena->objects);
    memset(arena, 0, sizeof *arena);
}

/* Zeros; NULL with an error set. */
static void *arena_take(Arena *arena, size_t count, size_t item) {
    if (arena->count == arena->capacity) {
        size_t capacity = 2 * arena->capacity + 8;
        void **blocks = realloc(arena->blocks, capacity * sizeof *blocks);
        if (!blocks) return no_memory(), NULL;
        arena->blocks = blocks;
        arena->capacity = capacity;
    }
    void *block = calloc(count + 1, item);
    if (!block) return no_memory(), NULL;
    return arena->blocks[arena->count++] = block;
}

/* Takes over the reference. */
static bool arena_keep(Arena *arena, PyObject *object) {
    if (object && !arena->objects) arena->objects = PyList_New(0);
    bool good = object && arena->objects && PyList_Append(arena->objects, object) == 0;
    Py_XDECREF(object);
    return good;
}

static bool read_number_value(const State *state, PyObject *object, const char *place, vdb_value *out) {
    PyObject *whole = PyFloat_Check(object) ? NULL : PyNumber_Index(object);
    if (whole) {
        int overflow;
        out->type = VDB_VALUE_INT;
        out->integer = PyLong_AsLongLongAndOverflow(whole, &overflow);
        Py_DECREF(whole);
        if (!overflow) return true;
        raise_error(state, CONFIG_ERROR, "%s: %R is beyond an int of 64 bits; keep it as a float or as text", place, object);
        return false;
    }
    PyErr_Clear();
    out->type = VDB_VALUE_FLOAT;
    out->number = PyFloat_AsDouble(object); /* neither bytes nor a list has one */
    if (PyErr_Occurred()) {
        PyErr_Clear();
        raise_error(state, CONFIG_ERROR, "%s: %R is %R; values are str, int, float, bool or None", place, object,
                    (PyObject *)Py_TYPE(object));
        return false;
    }
    if (!isnan(out->number)) return true;
    raise_error(state, CONFIG_ERROR, "%s is nan, which is equal to nothing; use None, or leave the key out", place);
    return false;
}

/* A value, whose text lives as long as the object. */
static bool read_value(const State *state, PyObject *object, const char *place, vdb_value *out) {
    if (object == Py_None) return out->type = VDB_VALUE_NONE, true;
    if (PyBool_Check(object)) return out->type = VDB_VALUE_BOOL, out->integer = object == Py_True, true;
    if (!PyUnicode_Check(object)) return read_number_value(state, object, place, out);
    Py_ssize_t size;
    out->type = VDB_VALUE_TEXT;
    out->text = PyUnicode_AsUTF8AndSize(object, &size);
    out->text_size = (size_t)size;
    if (out->text && size <= METADATA_BYTES) return true;
    PyErr_Clear();
    raise_error(state, CONFIG_ERROR, "%s: this text cannot be kept as UTF-8 of less than 2 GiB", place);
    return false;
}

/* The name of a value: text of 1 to 255 bytes. */
static bool read_value_name(const State *state, PyObject *object, const char *place, const char **out) {
    Py_ssize_t size = 0;
    *out = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : NULL;
    PyErr_Clear();
    if (*out && size >= 1 && size <= 255 && !memchr(*out, 0, (size_t)size)) return true;
    raise_error(state, CONFIG_ERROR, "%s: the key %R is no text of 1 to 255 bytes", place, object);
    return false;
}

/* The values of a dict. */
static bool read_values(const State *state, PyObject *dict, const char *place, Arena *arena, const vdb_value **out,
                        size_t *count) {
    PyObject *items = PyDict_Items(dict);
    if (!arena_keep(arena, items)) return false;
    *count = (size_t)PyList_Size(items);
    vdb_value *values = arena_take(arena, *count, sizeof *values);
    if (!values) return false;
    *out = values;
    for (size_t i = 0; i < *count; i++) {
        PyObject *item = PyList_GetItem(items, (Py_ssize_t)i);
        char where[400];
        if (!read_value_name(state, PyTuple_GetItem(item, 0), place, &values[i].name)) return false;
        snprintf(where, sizeof where, "%s[\"%s\"]", place, values[i].name);
        if (!read_value(state, PyTuple_GetItem(item, 1), where, &values[i])) return false;
    }
    return true;
}

/* What a row or an answer has: a dict, bytes, or None. */
static PyObject *metadata_object(const void *metadata, size_t size, bool has_values) {
    vdb_value value;
    size_t place = 0;
    if (!size) Py_RETURN_NONE;
    if (!has_values) return PyBytes_FromStringAndSize(metadata, (Py_ssize_t)size);
    PyObject *dict = PyDict_New();
    while (dict && vdb_next_value(metadata, size, &place, &value)) {
        PyObject *object = NULL, *name = PyUnicode_DecodeUTF8(value.name, (Py_ssize_t)strlen(value.name), "replace");
        if (value.type == VDB_VALUE_NONE) object = Py_NewRef(Py_None);
        else if (value.type == VDB_VALUE_BOOL) object = PyBool_FromLong((long)value.integer);
        else if (value.type == VDB_VALUE_INT) object = PyLong_FromLongLong(value.integer);
        else if (value.type == VDB_VALUE_FLOAT) object = PyFloat_FromDouble(value.number);
        else object = PyUnicode_DecodeUTF8(value.text, (Py_ssize_t)value.text_size, "replace");
        if (!name || !object || PyDict_SetItem(dict, name, object)) {
            Py_DECREF(dict);
            dict = NULL;
        }
        Py_XDECREF(name);
        Py_XDECREF(object);
    }
    return dict;
}

/* Bytes, a dict or None, as the metadata of a record. */
static bool read_metadata_item(const State *state, PyObject *item, const char *place, Arena *arena, vdb_record *out) {
    if (item == Py_None) return true;
    if (PyDict_Check(item)) {
        if (!read_values(state, item, place, arena, &out->values, &out->value_count)) return false;
        if (vdb_values_size(out->values, out->value_count) != SIZE_MAX) return true;
        raise_error(state, CONFIG_ERROR, "%s is too long: at most 2 GiB fit", place);
        return false;
    }
    if (!PyObject_CheckBuffer(item)) {
        raise_error(state, CONFIG_ERROR,
                    "%s is %R; metadata is bytes, or a dict of str, int, float, bool and None", place,
                    (PyObject *)Py_TYPE(item));
        return false;
    }
    PyObject *bytes = PyBytes_FromObject(item); /* which nobody can change under us */
    if (!arena_keep(arena, bytes)) return false;
    out->metadata = PyBytes_AsString(bytes);
    out->metadata_size = (size_t)PyBytes_Size(bytes);
    if (PyBytes_Size(bytes) <= METADATA_BYTES) return true;
    raise_error(state, CONFIG_ERROR, "%s has %zd bytes; at most %zd fit", place, PyBytes_Size(bytes), METADATA_BYTES);
    return false;
}

/* ---- conditions, in chroma's words ---- */

#define CONDITION_DEPTH 30

static bool read_condition(const State *state, PyObject *dict, int depth, Arena *arena, vdb_condition *out);

/* A list or tuple of a condition, kept in the arena; NULL with an error set. */
static PyObject *condition_list(const State *state, PyObject *source, const char *operator, Arena *arena) {
    bool listed = PyList_Check(source) || PyTuple_Check(source) || PyAnySet_Check(source);
    PyObject *items = listed ? PySequence_Tuple(source) : NULL;
    if (!items) {
        if (PyErr_Occurred()) return NULL;
        return raise_error(state, CONFIG_ERROR, "filter: %s takes a list, not %R", operator, source);
    }
    return arena_keep(arena, items) ? items : NULL;
}

/* {"$and": [...]}, {"$or": [...]} */
static bool read_joined(const State *state, const char *operator, PyObject *source, int depth, Arena *arena,
                        vdb_condition *out) {
    PyObject *items = condition_list(state, source, operator, arena);
    if (!items) return false;
    out->operation = strcmp(operator, "$and") == 0 ? VDB_ALL_OF : VDB_ANY_OF;
    out->count = (size_t)PyTuple_Size(items);
    vdb_condition *parts = arena_take(arena, out->count, sizeof *parts);
    if (!parts) return false;
    out->parts = parts;
    if (!out->count) raise_error(state, CONFIG_ERROR, "filter: %s takes at least one condition", operator);
    for (size_t i = 0; i < out->count; i++) {
        PyObject *item = PyTuple_GetItem(items, (Py_ssize_t)i);
        if (PyDict_Check(item) && read_condition(state, item, depth + 1, arena, &parts[i])) continue;
        if (!PyErr_Occurred())
            raise_error(state, CONFIG_ERROR, "filter: %s joins dicts, such as {\"year\": 2020}, not %R", operator, item);
        return false;
    }
    return out->count > 0;
}

/* One operator of {"year": {"$gte": 2020, "$lt": 2024}}. */
static bool read_comparison(const State *state, const char *name, const char *operator, PyObject *operand, Arena *arena,
                            vdb_condition *out) {
    static const struct {
        const char *word;
        vdb_operator operation;
        bool list;
    } OPERATORS[] = {{"$eq", VDB_IS_IN, false},  {"$ne", VDB_NOT_IN, false},  {"$in", VDB_IS_IN, true},
                     {"$nin", VDB_NOT_IN, true}, {"$lt", VDB_LESS, false},    {"$lte", VDB_AT_MOST, false},
                     {"$gt", VDB_GREATER, false}, {"$gte", VDB_AT_LEAST, false}};
    size_t which = 0, all = sizeof OPERATORS / sizeof *OPERATORS;
    while (which < all && (!operator || strcmp(OPERATORS[which].word, operator))) which++;
    if (which == all) {
        raise_error(state, CONFIG_ERROR,
                    "filter[\"%s\"]: there are $eq, $ne, $gt, $gte, $lt, $lte, $in and $nin, and no %s", name,
                    operator ? operator : "other keys");
        return false;
    }
    PyObject *items = OPERATORS[which].list ? condition_list(state, operand, operator, arena) : NULL;
    if (OPERATORS[which].list && !items) return false;
    out->operation = OPERATORS[which].operation;
    out->name = name;
    out->count = items ? (size_t)PyTuple_Size(items) : 1;
    vdb_value *values = arena_take(arena, out->count, sizeof *values);
    if (!values) return false;
    out->values = values;
    char place[400];
    snprintf(place, sizeof place, "filter[\"%s\"]", name);
    for (size_t i = 0; i < out->count; i++)
        if (!read_value(state, items ? PyTuple_GetItem(items, (Py_ssize_t)i) : operand, place, &values[i])) return false;
    bool number = out->count == 1 && (values->type == VDB_VALUE_INT || values->type == VDB_VALUE_FLOAT);
    if (out->operation <= VDB_NOT_IN || number) return true;
    raise_error(state, CONFIG_ERROR, "%s: %s compares numbers, not %R", place, operator, operand);
    return false;
}

/* One key of a condition and what belongs to it. */
static bool read_key(const State *state, PyObject *key, PyObject *value, int depth, Arena *arena, vdb_condition *out) {
    const char *name;
    if (!read_value_name(state, key, "filter", &name)) return false;
    if (strcmp(name, "$and") == 0 || strcmp(name, "$or") == 0) return read_joined(state, name, value, depth, arena, out);
    if (*name == '$') {
        raise_error(state, CONFIG_ERROR, "filter: %s is no key; $and and $or join conditions, other operators belong "
                                         "inside one, as {\"year\": {\"$gte\": 2020}}", name);
        return false;
    }
    if (!PyDict_Check(value)) return read_comparison(state, name, "$eq", value, arena, out);
    PyObject *items = PyDict_Items(value);
    if (!arena_keep(arena, items)) return false;
    out->operation = VDB_ALL_OF;
    out->count = (size_t)PyList_Size(items);
    vdb_condition *parts = arena_take(arena, out->count, sizeof *parts);
    if (!parts) return false;
    out->parts = parts;
    if (!out->count) return read_comparison(state, name, NULL, value, arena, out);
    for (size_t i = 0; i < out->count; i++) {
        PyObject *item = PyList_GetItem(items, (Py_ssize_t)i), *operator= PyTuple_GetItem(item, 0);
        const char *word = PyUnicode_Check(operator) ? PyUnicode_AsUTF8AndSize(operator, NULL) : NULL;
        PyErr_Clear();
        if (!read_comparison(state, name, word, PyTuple_GetItem(item, 1), arena, &parts[i])) return false;
    }
    return true;
}

/* A dict of conditions that must all hold. */
static bool read_condition(const State *state, PyObject *dict, int depth, Arena *arena, vdb_condition *out) {
    if (depth > CONDITION_DEPTH) {
        raise_error(state, CONFIG_ERROR, "filter: conditions are nested more than %d deep", CONDITION_DEPTH);
        return false;
    }
    PyObject *items = PyDict_Items(dict);
    if (!arena_keep(arena, items)) return false;
    size_t count = (size_t)PyList_Size(items);
    vdb_condition *parts = count == 1 ? out : arena_take(arena, count, sizeof *parts);
    if (!parts) return false;
    for (size_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(items, (Py_ssize_t)i);
        if (!read_key(state, PyTuple_GetItem(item, 0), PyTuple_GetItem(item, 1), depth, arena, &parts[i])) return false;
    }
    if (count == 1) return true;
    out->operation = VDB_ALL_OF;
    out->count = count;
    out->parts = parts;
    return true;
}
