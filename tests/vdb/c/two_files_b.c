/* A program of two files: this one holds the code. */
#define VDB_IMPLEMENTATION
#include "vdb.h"
