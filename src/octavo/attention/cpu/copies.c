/* Slots between pages and flat memory, where they are ordered by row and position: what is stored of a sequence, and
   what a sequence is made of again. Rows are shared among threads; no two of them write to the same place. */
#define _GNU_SOURCE 1 /* RTLD_DEFAULT */
#include "copies.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

enum { LITTLE = 1 << 16 }; /* bytes or slots for which waking threads costs more than they save */

typedef struct {
    const Copies *asked;
    atomic_llong next;
    atomic_bool failed;
    void (*row)(const Copies *asked, int64_t row, int32_t *scratch);
    size_t scratch;
} Job;

static char *slot_in_page(const Copies *a, int field, int64_t row, int64_t slot) {
    const int32_t *table = (const int32_t *)(intptr_t)a->table + row * a->table_step;
    int64_t page = table[slot / a->page_size];
    return (char *)(intptr_t)a->page[field] + page * a->page_step + slot % a->page_size * a->size[field];
}

static char *slot_in_flat(const Copies *a, int field, int64_t at) {
    return a->flat[field] ? (char *)(intptr_t)a->flat[field] + at * a->size[field] : NULL;
}

static int64_t number(int64_t address, int64_t i) { return ((const int64_t *)(intptr_t)address)[i]; }

static void fill_row(const Copies *a, int64_t row, int32_t *scratch) {
    (void)scratch;
    int64_t from = number(a->first, row), slot = number(a->slot, row), left = number(a->count, row);
    while (left > 0) {
        int64_t n = a->page_size - slot % a->page_size;
        if (n > left) n = left;
        for (int f = 0; f < EXPIRY; f++)
            if (a->page[f]) memcpy(slot_in_page(a, f, row, slot), slot_in_flat(a, f, from), (size_t)(n * a->size[f]));
        int32_t *expiry = (int32_t *)slot_in_page(a, EXPIRY, row, slot);
        const int32_t *position = (const int32_t *)slot_in_flat(a, POSITION, from);
        const int32_t *given = (const int32_t *)slot_in_flat(a, EXPIRY, from);
        for (int64_t i = 0; i < n; i++)
            expiry[i] = given ? given[i] : a->window < 0 ? INT32_MAX : position[i] + (int32_t)a->window;
        from += n, slot += n, left -= n;
    }
}

/* The slots of a row that are wanted, in the order of their positions, of which a row has each once. */
static void choose_row(const Copies *a, int64_t row, int32_t *scratch) {
    int64_t length = ((const int32_t *)(intptr_t)a->length)[row], span = a->last - a->from;
    int64_t newest = a->newest ? ((const int32_t *)(intptr_t)a->newest)[row] : -1;
    memset(scratch, 0xff, (size_t)span * sizeof *scratch); /* slot by position, -1: none */
    for (int64_t slot = 0; slot < length;) {
        const int32_t *position = (const int32_t *)slot_in_page(a, POSITION, row, slot);
        const int32_t *expiry = (const int32_t *)slot_in_page(a, EXPIRY, row, slot);
        int64_t n = a->page_size - slot % a->page_size;
        if (n > length - slot) n = length - slot;
        for (int64_t i = 0; i < n; i++) {
            bool wanted = (expiry[i] >= a->low && expiry[i] <= a->high) || slot + i == newest;
            if (wanted && position[i] >= a->from && position[i] < a->last)
                scratch[position[i] - a->from] = (int32_t)(slot + i);
        }
        slot += n;
    }
    int64_t *order = (int64_t *)(intptr_t)a->order + number(a->first, row), count = 0;
    for (int64_t i = 0; i < span && count < length; i++)
        if (scratch[i] >= 0) order[count++] = scratch[i];
    ((int64_t *)(intptr_t)a->count)[row] = count;
}

static void take_row(const Copies *a, int64_t row, int32_t *scratch) {
    (void)scratch;
    const int64_t *order = (const int64_t *)(intptr_t)a->order + number(a->slot, row);
    int64_t to = number(a->first, row), count = number(a->count, row);
    for (int64_t i = 0, n; i < count; i += n) {
        for (n = 1; i + n < count && order[i + n] == order[i] + n && order[i + n] % a->page_size;) n++;
        for (int f = 0; f < FIELDS; f++)
            if (a->flat[f])
                memcpy(slot_in_flat(a, f, to + i), slot_in_page(a, f, row, order[i]), (size_t)(n * a->size[f]));
    }
}

/* How many slots of a row have expired, and the first of them, in the order of slots. */
static void expired_row(const Copies *a, int64_t row, int32_t *scratch) {
    (void)scratch;
    int64_t length = ((const int32_t *)(intptr_t)a->length)[row], count = 0, first = row * a->most;
    int32_t limit = ((const int32_t *)(intptr_t)a->limit)[row];
    int64_t *order = (int64_t *)(intptr_t)a->order + first;
    int32_t *when = (int32_t *)(intptr_t)a->flat[EXPIRY] + first;
    for (int64_t slot = 0, n; slot < length; slot += n) {
        const int32_t *expiry = (const int32_t *)slot_in_page(a, EXPIRY, row, slot);
        n = a->page_size < length - slot ? a->page_size : length - slot;
        int32_t least = INT32_MAX;
        for (int64_t i = 0; i < n; i++) least = expiry[i] < least ? expiry[i] : least;
        if (least >= limit) continue; /* most pages have none */
        for (int64_t i = 0; i < n; i++)
            if (expiry[i] < limit) {
                if (count < a->most) order[count] = slot + i, when[count] = expiry[i];
                count++;
            }
    }
    ((int64_t *)(intptr_t)a->count)[row] = count;
}

static void clear_row(const Copies *a, int64_t row, int32_t *scratch) {
    (void)scratch;
    int64_t page = number(a->order, row);
    memset((char *)(intptr_t)a->page[0] + page * a->page_step, 0, (size_t)a->page_step);
}

static void work(void *data) {
    Job *job = data;
    int32_t *scratch = job->scratch ? malloc(job->scratch) : NULL;
    if (job->scratch && !scratch) {
        atomic_store(&job->failed, true);
        return;
    }
    for (int64_t row; (row = atomic_fetch_add(&job->next, 1)) < job->asked->rows;) job->row(job->asked, row, scratch);
    free(scratch);
}

bool copies_run(const Copies *asked, int what) {
    static void (*const ROW[])(const Copies *, int64_t, int32_t *) = {fill_row, choose_row, take_row, clear_row,
                                                                        expired_row};
    Job job = {.asked = asked, .row = ROW[what]};
    if (what == CHOOSE) job.scratch = (size_t)(asked->last - asked->from + 1) * sizeof(int32_t);
    on_threads(work, &job, asked->work < LITTLE ? 1 : (int)asked->threads);
    return !atomic_load(&job.failed);
}

void copies_prepare(void) { find_threads(); }
