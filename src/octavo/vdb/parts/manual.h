/* vdb.h 2.0 - a vector database in one header.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * OVERVIEW
 *
 * A database holds rows. A row is a vector of `dimensions` floats, and may have an id (text) and metadata: bytes, or
 * values with names, which searches can filter by. Asked with a vector, the database answers with the k nearest rows:
 * exactly, by reading every row, or through an HNSW graph, by reading few. One file, C11 or C++11, gcc or clang, no
 * dependency but libm and, with -DVDB_MULTITHREADED, pthreads. POSIX systems; it is tested on Linux, and compiles for
 * macOS. For Windows (x86-64, clang) it compiles; it has not been run there, so nothing of it is tested:
 *
 *     #include "vdb.h"
 *
 *     vdb_database *db = vdb_create(384, VDB_METRIC_COSINE);
 *     vdb_add_vector(db, vector, "first", NULL);
 *     vdb_result_set *found = vdb_search(db, query, 5);       // nearest first; found->results[0].id, .distance
 *     vdb_free_result_set(found);
 *     vdb_save(db, "rows.vdb");
 *     vdb_destroy(db);
 *
 *     cc -std=c11 -O2 app.c -lm                               // or: cc -O2 -DVDB_MULTITHREADED app.c -lm -pthread
 *
 * Every function is `static inline`, so a program of one file needs nothing else. A program of several files defines
 * VDB_DECLARATIONS_ONLY before each #include but one, and VDB_IMPLEMENTATION before that one; where both are defined,
 * in one file, VDB_IMPLEMENTATION counts. The code takes a compiler some seconds at -O2, the declarations nothing:
 * while a program is being written, give the code a file of its own, or define VDB_PLAIN, which leaves out the kernels
 * for particular processors and takes two thirds of the time; answers are the same. The header is joined from parts by
 * topic, which Octavo's repository holds (src/octavo/vdb/parts); docs/tour.md says what is in which. VDB_MALLOC and
 * VDB_FREE replace the allocator; VDB_REALLOC is theirs too, and may be left out.
 *
 * MANUAL, in the order of the code
 *
 *   1 Declarations     what a program calls
 *   2 Platform         what is asked of the compiler and the operating system; memory
 *   3 Numbers          16-bit floats, exact distances, checksums
 *   4 Kernels          scans for plain C, AVX2, AVX-512 (VNNI, BF16), AMX and NEON, chosen when first used
 *   5 Threads          many readers or one writer; a pool made once
 *   6 Rows             blocks of vectors, codes and norms, on disk too; ids and metadata; columns of values, conditions
 *   7 Exact search     bounds, shortlists, exact distances
 *   8 HNSW             graph search, parallel insertion, removal
 *   9 Files            formats 2 and 3, their checks, the mapped view, the loader of the first format, the journal
 *  10 Functions        the declared ones, each a short use of the above
 *
 * DISTANCES, ascending: cosine 1 - cos(q, x), where a zero vector is at distance 1 from everything; Euclidean with the
 * root; dot product negated.
 *
 * FILTERS BY VALUE. A condition (vdb_condition) is a comparison of a named value with others, or all or any of several:
 *
 *     vdb_value year = {NULL, VDB_VALUE_INT, 2020, 0, NULL, 0};
 *     vdb_condition since = {VDB_AT_LEAST, "year", &year, NULL, 1};
 *     vdb_query_options options = vdb_default_query_options(10);
 *     options.where = &since;                                 // vdb_query(db, query, 1, &options, &answer)
 *
 * It becomes a bitset over all rows, once for a call however many questions it asks: scans skip what is not in it, a
 * graph answers with nothing else. The first search that asks for a name reads it from the records of all rows into a
 * column of 9 bytes a row, with the least and greatest value of every 1024 rows; later searches read again only what
 * has changed, and a condition that is asked again finds its bitset (the last 8 are kept) until a record changes.
 * A column of ints alone, or floats alone, is sorted when it has been asked for eight times since a row changed (4 bytes
 * a row): from then on a range that few rows are in is looked up. Columns are no part of the file; vdb_compact and vdb_remove_vector, which renumber rows, make them forgotten.
 *
 * CHANGES IN PLACE. vdb_save writes a whole file. vdb_save_changes appends what has changed since the database was
 * opened or saved to that file, so that one row more in a file of a gigabyte writes about a kilobyte. What is appended
 * is the file's journal: behind the file's end as its header says it (bytes 16 to 23), a batch for each save, each at
 * a multiple of 64, little-endian, with CRC-32C checksums:
 *
 *     head, 64 bytes  0 u8[8] "VDBJ" 0d 0a 1a 0a;  8 u64 its place in the file;  16 u64 n, bytes from there to the
 *                     end mark;  24 u64 slots;  32 u64 live rows;  40 u64 free rows that stay as they were;  48 u32
 *                     row where graph searches begin;  52 u32 rows inserted since all were made reachable;  56 u32
 *                     checksum of the end mark before, or of the header;  60 u32 checksum of bytes 0 to 59
 *     content         u32 e, number of entries; u32 f, number of rows that have become free; u32[f]; zeros to a
 *                     multiple of 8; e entries; zeros to a multiple of 64
 *     entry           u32 row; u32 flags (1: it is there, 2: it comes whole); if whole f32 norm, scale, residual, u32
 *                     bytes of id, u32 bytes of metadata (plus 2^31: values); HNSW: u32[1 + 2 links], u32 levels, for
 *                     each level u32[1 + links]; if whole vector, codes, id, 0, metadata; zeros to a multiple of 8
 *     end mark, 64    0 u8[8] "VDBE" 0d 0a 1a 0a;  8 u64 place of the head;  16 u64 n;  24 u32 checksum of the n
 *                     bytes;  28 zeros;  60 u32 checksum of bytes 0 to 59
 *
 * A batch is synced before its end mark is written, and the end mark is synced before vdb_save_changes returns. So a
 * process that is killed, or a machine that stops, leaves the file as it was or as it should be: a batch without an
 * end mark is as if it were not there, and the next save cuts it off. Everything else that does not match is damage,
 * and refused. The save takes a lock of the file (fcntl), and refuses with VDB_ERROR_CHANGED a file that another
 * program has changed or is changing. A whole file is written in place of a batch where that is as good: once the
 * journal is longer than an eighth of the file and 65,536 bytes, where rows have new numbers (vdb_compact,
 * vdb_remove_vector), where a vector was lent (vdb_get_vector), where the file may not be written to, and on Windows.
 * Readers before 2.0's journal refuse a file that has one; vdb_save writes one without.
 *
 * VDB_OPEN_MAP shows a file as its journal says it is. The journal is read, with its checksums; what it changes in
 * rows of the file lies in private copies of their pages, what it adds in memory. So such a view takes memory for its
 * journal, with a graph also 8.5 bytes a row or so for the upper levels, and never changes the file.
 *
 * MORE ROWS THAN MEMORY. With VDB_STORAGE_F32_I8 a search reads the codes of all rows, or of those that it walks by,
 * and then few vectors. vdb_keep_on_disk keeps the vectors of a database that is being made on disk and all else in
 * memory; opened with VDB_OPEN_MAP, vectors stay in the file. vdb_set_resident bounds how much of what lies on disk
 * counts as the process's memory: ten million rows of 256 numbers are 13 GB of file and 2.7 GB of memory.
 *
 * GUARANTEES
 *
 *   - Exact search returns the rows of smallest distance, ties by index. A distance is computed in double precision in
 *     one fixed order, differences too, and rounded once to float (too great ones to infinity, too small ones to 0);
 *     scans only decide, by rigorous bounds, which rows cannot be in the answer. So answers are the same, bit for bit,
 *     for every kernel, every number of threads, every batch size and for VDB_STORAGE_F32 and VDB_STORAGE_F32_I8.
 *   - HNSW answers do not depend on the number of threads, neither in building nor in searching; their distances are
 *     the exact ones. Fewer than k rows come back only if fewer than k are there to be found.
 *   - A vector with NaN or infinity is refused, as a row and as a query. Any finite float is allowed; none overflows.
 *   - A failed call changes nothing. A failed save leaves the old file. A file is checked before it is believed.
 *   - A save replaces the file in one step: it writes a new one beside it, syncs it and renames it. Symbolic links are
 *     followed, mode, owner and group are kept; access control lists and other attributes are not. Where that is not
 *     possible it is refused by name, and nothing is written in place: what is no regular file, a file with hard links,
 *     an owner that cannot be kept, a folder that takes no new file.
 *   - What removed and replaced rows had in ids and metadata is given back: dead bytes are never more than half of the
 *     text that a file brought (all of it, if vdb_get_vector or vdb_search pointed into it), without renumbering.
 *   - With VDB_MULTITHREADED any number of threads may read while one writes; calls wait for each other as needed.
 *     Answers own their memory. Pointers from vdb_get_vector are the exception: they live until the row is removed,
 *     replaced or moved by vdb_compact or vdb_remove_vector.
 *   - A child of fork() may go on with a database that no thread was inside of, from several threads at once.
 *
 * PROGRAMS WRITTEN FOR 0.1 compile and behave as before: ids live as long as their row, after vdb_free_result_set too,
 * and what is written through the pointer of vdb_get_vector counts. What cannot be as before:
 *
 *   - NaN and infinity are refused: they have no place in an order of distances. 0.1 lost neighbours of such rows.
 *   - Dimensions end at 65536, ids at 2^20 bytes.
 *   - Numbers other than the three metrics, and files that are damaged, are refused. 0.1 does not read what this saves.
 *   - A save to a pipe, a device, a hard link, or a file whose folder takes no other, is refused (0.1 wrote in place).
 *   - Distances differ in their last digits: 0.1 added in float.
 *   - Windows: 0.1 was built by any compiler; this needs gcc (which takes the plain kernels only) or clang.
 *   - C++: the code needs gcc or clang, and casts between pointers and numbers that -Wold-style-cast reports.
 */
