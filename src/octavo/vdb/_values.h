/* What the parts of _vdb.c share: module state and errors, arguments, arrays and vectors. */
#define ID_BYTES ((Py_ssize_t)1 << 20) /* the most that vdb_record allows */
#define METADATA_BYTES ((Py_ssize_t)INT32_MAX)

enum { BASE_ERROR, VECTOR_ERROR, UNKNOWN_ID, DUPLICATE_ID, CLOSED, READ_ONLY, FILE_ERROR, CONFIG_ERROR, ERRORS };
static const char *const ERROR_NAMES[ERRORS] = {
    "VectorDatabaseError",   "VectorError",       "UnknownIdError", "DuplicateIdError", "DatabaseClosedError",
    "ReadOnlyDatabaseError", "DatabaseFileError", "ConfigError",
};

/* Every argument name and every attribute that is looked up, made once and interned. */
#define WORDS(X)                                                                                            \
    X(query) X(k) X(filter) X(exact) X(effort) X(with_metadata) X(vectors) X(ids) X(metadata) X(replace)    \
    X(vector) X(vector_id) X(id) X(index) X(path) X(mode) X(threads) X(data_ptr) X(device) X(type) X(dtype) \
    X(shape) X(is_contiguous) X(distance) X(rows) X(detach) X(contiguous) X(float) X(radius) X(progress)
#define AS_ENUM(word) WORD_##word,
#define AS_TEXT(word) #word,
enum { WORDS(AS_ENUM) WORD_COUNT };
static const char *const WORD_TEXTS[] = {WORDS(AS_TEXT)};

typedef struct {
    PyObject *errors[ERRORS];
    PyObject *words[WORD_COUNT];
    PyTypeObject *database, *hits, *batch, *column;
    PyObject *nothing;     /* an empty tuple */
    PyObject *stand_in;    /* see _hits.h */
    Py_ssize_t list_bytes; /* of a list object */
    newfunc list_new;      /* list's own, for every search */
    ssizeargfunc list_repeat;
    destructor list_dealloc;
} State;

static State *state_of(PyObject *module) { return PyModule_GetState(module); }

/* Raises the error of that kind; always NULL. */
static PyObject *raise_error(const State *state, int kind, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyErr_FormatV(state->errors[kind], format, values);
    va_end(values);
    return NULL;
}

static bool no_memory(void) {
    PyErr_NoMemory();
    return false;
}

static PyObject *raise_failure(const State *state, vdb_error error, const char *doing) {
    if (error == VDB_ERROR_OUT_OF_MEMORY) return PyErr_NoMemory();
    if (error == VDB_ERROR_READ_ONLY)
        return raise_error(state, READ_ONLY,
                           "cannot %s: the database is a read-only view of a file; open it with mode=\"read\" to "
                           "change it in memory, and save it",
                           doing);
    return raise_error(state, BASE_ERROR, "cannot %s: %s", doing, vdb_error_text(error));
}

/* A new reference to the text of the error that is set, which is cleared. */
static PyObject *take_error_text(void) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    if (!text) {
        PyErr_Clear();
        text = PyUnicode_FromString("unknown error");
    }
    return text;
}

/* ---- arguments ---- */

typedef struct {
    const char *name;
    int required, positional, count;
    int words[8];
} Signature;

static int find_word(const State *state, const Signature *signature, PyObject *name) {
    for (int i = 0; i < signature->count; i++)
        if (state->words[signature->words[i]] == name) return i;
    for (int i = 0; i < signature->count; i++)
        if (PyUnicode_Compare(state->words[signature->words[i]], name) == 0) return i;
    return -1;
}

/* Fills out[signature->count] with borrowed references, NULL where an argument is absent or None. */
static bool parse(const State *state, const Signature *signature, PyObject *const *args, Py_ssize_t count,
                  PyObject *names, PyObject **out) {
    memset(out, 0, sizeof *out * (size_t)signature->count);
    if (count > signature->positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments, not %zd", signature->name,
                     signature->positional, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) out[i] = args[i];
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        int at = find_word(state, signature, name);
        if (at < 0 || out[at]) {
            PyErr_Format(PyExc_TypeError, "%s() got %s argument '%U'", signature->name,
                         at < 0 ? "an unexpected keyword" : "multiple values for", name);
            return false;
        }
        out[at] = args[count + i];
    }
    for (int i = 0; i < signature->count; i++) {
        if (i < signature->required && !out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() needs the argument '%s'", signature->name,
                         WORD_TEXTS[signature->words[i]]);
            return false;
        }
        if (out[i] == Py_None && i >= signature->required) out[i] = NULL;
    }
    return true;
}

/* An int in [least, most]. */
static bool read_integer(const State *state, PyObject *object, const char *name, long long least, long long most,
                         long long *out) {
    PyObject *number = PyNumber_Index(object);
    if (!number) {
        PyErr_Clear();
        raise_error(state, CONFIG_ERROR, "%s must be an int, not %R", name, object);
        return false;
    }
    int overflow;
    *out = PyLong_AsLongLongAndOverflow(number, &overflow);
    bool good = !overflow && *out >= least && *out <= most;
    if (!good) {
        if (most == INT64_MAX)
            raise_error(state, CONFIG_ERROR, "%s must be at least %lld, not %S", name, least, number);
        else raise_error(state, CONFIG_ERROR, "%s must be from %lld to %lld, not %S", name, least, most, number);
    }
    Py_DECREF(number);
    return good;
}

static bool read_threads(const State *state, PyObject *object, uint32_t *out) {
    long long threads = 0;
    if (object && !read_integer(state, object, "threads", 1, 256, &threads)) return false;
    *out = (uint32_t)threads;
    return true;
}

/* An id as UTF-8 that lives as long as `object`. */
#define NUMBER_ROOM 24 /* of an int of 64 bits as text */

/* An int is the id that it reads as, written into `room`. */
static const char *read_number_id(const State *state, PyObject *object, const char *name, char *room) {
    int overflow = 1;
    PyObject *number = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    long long value = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : 0;
    Py_XDECREF(number);
    PyErr_Clear();
    if (overflow) {
        raise_error(state, CONFIG_ERROR, "%s is %R, but an id is text (str) or an int of 64 bits", name, object);
        return NULL;
    }
    snprintf(room, NUMBER_ROOM, "%lld", value);
    return room;
}

/* `room`: NUMBER_ROOM bytes, which an int needs. */
static const char *read_id(const State *state, PyObject *object, const char *name, char *room) {
    if (!PyUnicode_Check(object)) return read_number_id(state, object, name, room);
    Py_ssize_t size;
    const char *text = PyUnicode_AsUTF8AndSize(object, &size);
    if (!text) {
        PyErr_Clear();
        raise_error(state, CONFIG_ERROR, "%s %R cannot be written as UTF-8 (it holds a lone surrogate)", name, object);
    } else if (strlen(text) != (size_t)size) {
        raise_error(state, CONFIG_ERROR, "%s %R holds a NUL character, which ends an id", name, object);
        text = NULL;
    } else if (size > ID_BYTES) {
        raise_error(state, CONFIG_ERROR, "%s has %zd bytes; an id has at most %zd", name, size, ID_BYTES);
        text = NULL;
    }
    return text;
}

/* Files of other programs may hold any bytes as an id. */
static PyObject *id_object(const char *id) {
    if (!id) Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(id, (Py_ssize_t)strlen(id), "surrogateescape");
}

/* ---- arrays: objects with the buffer protocol, and torch tensors without importing torch ---- */

typedef struct {
    const void *data;
    char kind; /* as in the struct module; 0 if it is none of those */
    int dimensions;
    bool contiguous;
    Py_ssize_t item, shape[2], strides[2]; /* item, strides: bytes */
    Py_buffer buffer;
    bool held;
    PyObject *owner; /* a tensor that was made of another */
} View;

static void view_close(View *view) {
    if (view->held) PyBuffer_Release(&view->buffer);
    view->held = false;
    Py_CLEAR(view->owner);
}

/* Those open_* return 1 for an array, 0 for something else, -1 with an error set. */
static int open_buffer(const State *state, PyObject *object, View *view) {
    if (PyObject_GetBuffer(object, &view->buffer, PyBUF_RECORDS_RO)) {
        PyObject *why = take_error_text();
        raise_error(state, VECTOR_ERROR,
                    "the array cannot be read (%U); pass float32, e.g. x.astype(\"float32\")", why);
        Py_XDECREF(why);
        return -1;
    }
    view->held = true;
    const Py_buffer *buffer = &view->buffer;
    const char *format = buffer->format ? buffer->format : "B";
    if (*format == '<' || *format == '=' || *format == '@') format++;
    view->kind = *format && !format[1] ? *format : 0;
    view->data = buffer->buf;
    view->item = buffer->itemsize;
    view->dimensions = buffer->ndim;
    for (int i = 0; i < 2 && i < buffer->ndim; i++) {
        view->shape[i] = buffer->shape[i];
        bool rows = i == 0 && buffer->ndim > 1; /* arrays of ctypes name no strides */
        view->strides[i] = buffer->strides ? buffer->strides[i] : rows ? buffer->itemsize * buffer->shape[1] : buffer->itemsize;
    }
    view->contiguous = PyBuffer_IsContiguous(buffer, 'C');
    return 1;
}

static char tensor_kind(PyObject *dtype, Py_ssize_t *item) {
    static const struct {
        const char *name;
        char kind;
        int item;
    } KINDS[] = {{"torch.float32", 'f', 4}, {"torch.bool", '?', 1},  {"torch.uint8", 'B', 1},
                 {"torch.int64", 'q', 8},   {"torch.int32", 'i', 4}, {"torch.int16", 'h', 2}};
    PyObject *text = PyObject_Str(dtype);
    char kind = 0;
    for (size_t i = 0; text && i < sizeof KINDS / sizeof *KINDS; i++)
        if (PyUnicode_CompareWithASCIIString(text, KINDS[i].name) == 0) {
            kind = KINDS[i].kind;
            *item = KINDS[i].item;
        }
    Py_XDECREF(text);
    PyErr_Clear();
    return kind;
}

/* False with an error set, or none if the tensor lives on another device. */
static bool read_tensor(const State *state, PyObject *tensor, View *view, PyObject **found) {
    PyObject *const *words = state->words;
    PyObject *device = found[0] = PyObject_GetAttr(tensor, words[WORD_device]);
    PyObject *place = found[1] = device ? PyObject_GetAttr(device, words[WORD_type]) : NULL;
    if (!place || !PyUnicode_Check(place)) return false;
    if (PyUnicode_CompareWithASCIIString(place, "cpu") != 0) {
        raise_error(state, VECTOR_ERROR, "the tensor is on device %R; pass x.cpu()", device);
        return false;
    }
    PyObject *dtype = found[2] = PyObject_GetAttr(tensor, words[WORD_dtype]);
    PyObject *size = dtype ? PyObject_GetAttr(tensor, words[WORD_shape]) : NULL;
    found[3] = size;
    Py_ssize_t dimensions = size ? PyTuple_Size(size) : -1;
    if (dimensions < 0) return false;
    view->kind = tensor_kind(dtype, &view->item);
    view->dimensions = (int)dimensions;
    for (int i = 0; i < 2 && i < dimensions; i++) view->shape[i] = PyLong_AsSsize_t(PyTuple_GetItem(size, i));
    PyObject *contiguous = found[4] = PyObject_CallMethodObjArgs(tensor, words[WORD_is_contiguous], NULL);
    if (!contiguous) return false;
    PyObject *address = found[5] = PyObject_CallMethodObjArgs(tensor, words[WORD_data_ptr], NULL);
    if (!address) return false;
    view->contiguous = PyObject_IsTrue(contiguous) == 1;
    view->data = PyLong_AsVoidPtr(address);
    return !PyErr_Occurred();
}

/* The names of dtypes whose numbers may be taken for float32. */
static bool is_numeric_dtype(PyObject *dtype) {
    static const char *const NAMES[] = {"torch.float64", "torch.float16", "torch.bfloat16", "torch.uint8", "torch.int8",
                                        "torch.int16",   "torch.int32",   "torch.int64"};
    PyObject *text = PyObject_Str(dtype);
    bool found = false;
    for (size_t i = 0; text && i < sizeof NAMES / sizeof *NAMES; i++)
        found |= PyUnicode_CompareWithASCIIString(text, NAMES[i]) == 0;
    Py_XDECREF(text);
    PyErr_Clear();
    return found;
}

/* A dense float32 tensor of the same numbers; NULL if there is none, or the tensor is one already. */
static PyObject *float_tensor(const State *state, PyObject *tensor, const View *view) {
    if (view->kind == 'f' && view->contiguous) return NULL;
    PyObject *dtype = PyObject_GetAttr(tensor, state->words[WORD_dtype]), *made = NULL;
    if (dtype && (view->kind == 'f' || is_numeric_dtype(dtype))) {
        PyObject *detached = PyObject_CallMethodObjArgs(tensor, state->words[WORD_detach], NULL);
        PyObject *floats = detached ? PyObject_CallMethodObjArgs(detached, state->words[WORD_float], NULL) : NULL;
        made = floats ? PyObject_CallMethodObjArgs(floats, state->words[WORD_contiguous], NULL) : NULL;
        Py_XDECREF(detached);
        Py_XDECREF(floats);
    }
    Py_XDECREF(dtype);
    PyErr_Clear(); /* what it is then, is said by those who look at its dtype */
    return made;
}

static int open_tensor(const State *state, PyObject *object, View *view) {
    PyObject *probe = PyObject_GetAttr(object, state->words[WORD_data_ptr]);
    if (!probe) {
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(probe);
    PyObject *found[6] = {0};
    bool good = read_tensor(state, object, view, found);
    for (int i = 0; i < 6; i++) Py_XDECREF(found[i]);
    if (good) {
        PyObject *floats = float_tensor(state, object, view);
        if (!floats) return 1;
        int array = open_tensor(state, floats, view); /* which has to be made no more */
        if (array > 0) view->owner = floats;
        else Py_DECREF(floats);
        return array;
    }
    if (!PyErr_Occurred() || !PyErr_ExceptionMatches(state->errors[VECTOR_ERROR])) {
        PyObject *why = take_error_text();
        raise_error(state, VECTOR_ERROR, "the tensor cannot be read (%U); pass a dense one on the CPU", why);
        Py_XDECREF(why);
    }
    return -1;
}

static int view_open(const State *state, PyObject *object, View *view) {
    memset(view, 0, offsetof(View, buffer));
    view->held = false;
    view->owner = NULL;
    if (PyObject_CheckBuffer(object)) return open_buffer(state, object, view);
    if (PyList_Check(object) || PyTuple_Check(object)) return 0;
    return open_tensor(state, object, view);
}

static bool is_raw(PyObject *object) {
    return PyBytes_Check(object) || PyByteArray_Check(object) ||
           PyObject_TypeCheck(object, &PyMemoryView_Type);
}

/* ---- vectors ---- */

typedef struct {
    const float *values; /* [count][dimensions] */
    size_t count;
    bool single; /* given as one vector, not as one row of many */
    View view;
    float *copy;
} Vectors;

static void vectors_close(Vectors *vectors) {
    view_close(&vectors->view);
    free(vectors->copy);
    vectors->copy = NULL;
}

static bool raise_dtype(const State *state, const char *name, PyObject *source) {
    PyObject *dtype = PyObject_GetAttr(source, state->words[WORD_dtype]);
    PyErr_Clear();
    raise_error(state, VECTOR_ERROR,
                "%s: dtype %S holds no real numbers; pass float32, e.g. x.astype(\"float32\") (numpy), x.float() (torch) "
                "or raw float32 bytes",
                name, dtype ? dtype : (PyObject *)Py_TYPE(source));
    Py_XDECREF(dtype);
    return false;
}

static bool raise_size(const State *state, const char *name, Py_ssize_t size, size_t dimensions) {
    raise_error(state, VECTOR_ERROR, "%s: a vector of %zd numbers, but this database has %zu dimensions", name, size,
                dimensions);
    return false;
}

/* Whether view_fill reads this kind of number. */
static bool is_number(const View *view) {
    return view->kind && strchr("fdebhilqnBHILQN", view->kind) &&
           (view->kind != 'e' || view->item == 2) && view->item <= 8;
}

/* Checks an array and says how many vectors it holds; 0 if its items must be asked one by one, -1 with an error set. */
static int check_view(const State *state, size_t dimensions, PyObject *source, const char *name, const View *view,
                      size_t *count, bool *single) {
    Py_ssize_t row = (Py_ssize_t)dimensions;
    bool raw = view->kind == 'B' && is_raw(source);
    if (!raw && view->kind == '?') return raise_dtype(state, name, source) - 1;
    if (view->dimensions < 1 || view->dimensions > 2) {
        raise_error(state, VECTOR_ERROR, "%s: %d dimensions of shape; pass one vector [%zu] or many [n, %zu]", name,
                    view->dimensions, dimensions, dimensions);
        return -1;
    }
    if (raw) {
        if (!view->contiguous) {
            raise_error(state, VECTOR_ERROR, "%s: these bytes are not contiguous; pass bytes(x)", name);
            return -1;
        }
        Py_ssize_t bytes = view->buffer.len;
        if (bytes % (4 * row)) {
            raise_error(state, VECTOR_ERROR, "%s: %zd bytes are no multiple of %zd, the bytes of %zd float32", name,
                        bytes, 4 * row, row);
            return -1;
        }
        *count = (size_t)(bytes / (4 * row));
        *single = *count == 1;
        return 1;
    }
    if (!is_number(view)) return view->held ? 0 : raise_dtype(state, name, source) - 1;
    *single = view->dimensions == 1;
    *count = *single ? 1 : (size_t)view->shape[0];
    Py_ssize_t size = view->shape[view->dimensions - 1];
    return size == row || raise_size(state, name, size, dimensions) ? 1 : -1;
}

/* Whether the memory of an array is its vectors as they are wanted. */
static bool is_ready(const View *view, bool raw) { return raw || (view->kind == 'f' && view->item == 4 && view->contiguous); }

#define COPY_AS(type)                                                                                 \
    for (size_t j = 0; j < dimensions; j++, from += step) {                                           \
        type value;                                                                                   \
        memcpy(&value, from, sizeof value);                                                           \
        out[j] = (float)value;                                                                        \
    }

/* One vector of an array of other numbers, or with gaps, as float32. */
static void copy_numbers(const View *view, size_t row, size_t dimensions, float *out) {
    Py_ssize_t step = view->strides[view->dimensions - 1];
    const char *from = (const char *)view->data + (view->dimensions == 2 ? (Py_ssize_t)row * view->strides[0] : 0);
    bool is_signed = view->kind >= 'a';
    if (view->kind == 'f') COPY_AS(float)
    else if (view->kind == 'd') COPY_AS(double)
    else if (view->kind == 'e') {
        for (size_t j = 0; j < dimensions; j++, from += step) {
            uint16_t half;
            memcpy(&half, from, sizeof half);
            out[j] = vdb_from_f16(half);
            if ((half & 0x7c00u) == 0x7c00u) out[j] = half & 0x3ffu ? NAN : half & 0x8000u ? -INFINITY : INFINITY;
        }
    } else if (view->item == 1 && is_signed) COPY_AS(int8_t)
    else if (view->item == 1) COPY_AS(uint8_t)
    else if (view->item == 2 && is_signed) COPY_AS(int16_t)
    else if (view->item == 2) COPY_AS(uint16_t)
    else if (view->item == 4 && is_signed) COPY_AS(int32_t)
    else if (view->item == 4) COPY_AS(uint32_t)
    else if (is_signed) COPY_AS(int64_t)
    else COPY_AS(uint64_t)
}

static bool fill_numbers(const State *state, PyObject *numbers, const char *name, float *out) {
    Py_ssize_t count = PyTuple_Size(numbers);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(numbers, i);
        double value = PyFloat_AsDouble(item);
        if (value == -1 && PyErr_Occurred()) {
            bool huge = PyErr_ExceptionMatches(PyExc_OverflowError);
            PyErr_Clear();
            raise_error(state, VECTOR_ERROR, "%s[%zd] is %R, %s", name, i, item,
                        huge ? "beyond float32" : "not a number");
            return false;
        }
        out[i] = (float)value;
    }
    return true;
}

static PyObject *tuple_of(const State *state, PyObject *source, const char *name) {
    PyObject *tuple = NULL;
    if (!PyUnicode_Check(source) && !PyDict_Check(source) && !PyAnySet_Check(source))
        tuple = PySequence_Tuple(source);
    if (tuple) return tuple;
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return NULL;
    PyErr_Clear();
    return raise_error(state, VECTOR_ERROR,
                       "%s: cannot read vectors from %R; pass float32 arrays, tensors, bytes or lists of numbers", name,
                       (PyObject *)Py_TYPE(source));
}

static bool fill_row(const State *state, size_t dimensions, PyObject *row, const char *name, float *out) {
    View view;
    int array = view_open(state, row, &view);
    if (array < 0) return false;
    if (array) {
        size_t count;
        bool single;
        int good = check_view(state, dimensions, row, name, &view, &count, &single);
        if (good > 0 && !single) {
            raise_error(state, VECTOR_ERROR, "%s: must be one vector of %zu numbers", name, dimensions);
            good = -1;
        }
        if (good > 0 && is_ready(&view, view.kind == 'B' && is_raw(row))) memcpy(out, view.data, 4 * dimensions);
        else if (good > 0) copy_numbers(&view, 0, dimensions, out);
        view_close(&view);
        if (good) return good > 0;
    }
    PyObject *numbers = tuple_of(state, row, name);
    if (!numbers) return false;
    Py_ssize_t size = PyTuple_Size(numbers);
    bool good = size == (Py_ssize_t)dimensions ? fill_numbers(state, numbers, name, out)
                                               : raise_size(state, name, size, dimensions);
    Py_DECREF(numbers);
    return good;
}

/* Numbers may be objects with a length of their own class, but no scalar of Python, numpy or torch has one. */
static bool is_row(PyObject *item) {
    if (PyFloat_Check(item) || PyLong_Check(item)) return false;
    bool sized = PyObject_Size(item) >= 0;
    PyErr_Clear();
    return sized;
}

static bool read_sequence(const State *state, size_t dimensions, PyObject *source, const char *name, Vectors *out) {
    PyObject *items = tuple_of(state, source, name);
    if (!items) return false;
    Py_ssize_t count = PyTuple_Size(items);
    bool rows = count > 0 && is_row(PyTuple_GetItem(items, 0)), good = true;
    out->single = count > 0 && !rows;
    out->count = out->single ? 1 : (size_t)count;
    if (out->single && count != (Py_ssize_t)dimensions) good = raise_size(state, name, count, dimensions);
    if (good && (size_t)count > SIZE_MAX / 4 / dimensions) good = no_memory();
    if (good && !(out->copy = malloc(4 * dimensions * (out->count + 1)))) good = no_memory();
    if (good && out->single) good = fill_numbers(state, items, name, out->copy);
    for (Py_ssize_t i = 0; good && rows && i < count; i++) {
        char place[64];
        snprintf(place, sizeof place, "%s[%zd]", name, i);
        good = fill_row(state, dimensions, PyTuple_GetItem(items, i), place, out->copy + (size_t)i * dimensions);
    }
    Py_DECREF(items);
    out->values = out->copy;
    return good;
}

/* Vectors from any of the forms that are documented in __init__.py; the caller closes them, after a failure too. */
static bool read_vectors(const State *state, size_t dimensions, PyObject *source, const char *name, Vectors *out) {
    out->copy = NULL;
    out->view.held = false;
    out->view.owner = NULL;
    if (!dimensions) {
        raise_error(state, CLOSED, "the database was never made: __init__ was not called");
        return false;
    }
    int array = view_open(state, source, &out->view);
    if (array <= 0) return array == 0 && read_sequence(state, dimensions, source, name, out);
    int good = check_view(state, dimensions, source, name, &out->view, &out->count, &out->single);
    if (good <= 0) return good == 0 && read_sequence(state, dimensions, source, name, out);
    out->values = out->view.data;
    if (!is_ready(&out->view, out->view.kind == 'B' && is_raw(source))) {
        if (!(out->copy = malloc(4 * dimensions * (out->count + 1)))) return no_memory();
        for (size_t i = 0; i < out->count; i++) copy_numbers(&out->view, i, dimensions, out->copy + i * dimensions);
        out->values = out->copy;
    } else if ((uintptr_t)out->values % sizeof(float)) { /* a slice of bytes may begin anywhere */
        size_t bytes = 4 * dimensions * out->count;
        if (!(out->copy = malloc(bytes))) return no_memory();
        memcpy(out->copy, out->view.data, bytes);
        out->values = out->copy;
    }
    return true;
}

static PyObject *raise_not_finite(const State *state, size_t dimensions, const Vectors *vectors, const char *name) {
    for (size_t i = 0; i < vectors->count * dimensions; i++) {
        float value = vectors->values[i];
        if (isfinite(value)) continue;
        char place[64];
        if (vectors->single) snprintf(place, sizeof place, "%s[%zu]", name, i);
        else snprintf(place, sizeof place, "%s[%zu][%zu]", name, i / dimensions, i % dimensions);
        return raise_error(state, VECTOR_ERROR, "%s is %s as float32; every number of a vector must be finite", place,
                           isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
    }
    return raise_error(state, VECTOR_ERROR,
                       "%s: a number is beyond what the storage holds: at most 65504 for f16, 3.38e38 for bf16", name);
}
