/* What is asked of copies.c. `copies.py` checks the tensors and packs this struct, field by field, in this order. */
#ifndef OCTAVO_COPIES_H
#define OCTAVO_COPIES_H

#include <stdbool.h>
#include <stdint.h>

enum { KEY, VALUE, KEY_SCALE, VALUE_SCALE, POSITION, EXPIRY, FIELDS }; /* the parts of a page */
enum { FILL, CHOOSE, TAKE, CLEAR, EXPIRED };

/* Pointers are numbers here; 0 is NULL. A row is one (layer, KV head) of a sequence. */
typedef struct {
    int64_t page[FIELDS];            /* where the first page has each part */
    int64_t flat[FIELDS];            /* [n] slots one after another, of each part */
    int64_t size[FIELDS];            /* bytes of a slot in each part */
    int64_t page_size, page_step;    /* slots of a page, bytes to the next one */
    int64_t table, table_step, rows; /* int32 [rows, columns], numbers to the next row */
    int64_t length, newest;          /* int32 [rows]: slots in use; one that is wanted in any case, or NULL */
    int64_t first, slot, count;      /* int64 [rows]: where a row begins in flat memory, in its pages (in `order`, where
                                        slots are taken), and how many slots */
    int64_t order;                   /* int64: slots; what is chosen of a row begins at `first`. CLEAR: pages [rows] */
    int64_t low, high, from, last;   /* expiries, both included, and positions, the last not, of what is chosen */
    int64_t window;                  /* what is filled expires a window after its position; -1: never */
    int64_t limit, most;             /* EXPIRED: int32 [rows], above the expiries that are wanted, and how many of a row
                                        are told at most: slots in `order`, expiries in flat memory */
    int64_t work, threads;           /* bytes or slots in all */
} Copies;

/* Whether there was memory enough. */
bool copies_run(const Copies *asked, int what);
void copies_prepare(void);

#endif
