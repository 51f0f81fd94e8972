"""Joins the parts of the C library, `parts/*.h`, into the one header that is shipped: `python src/octavo/vdb/join.py`.

The parts are pieces of one text, not headers: each leans on those before it. Who changes one runs this and builds
again; a test fails while `vdb.h` is not what its parts say. Needs nothing but the standard library.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
HEADER = FOLDER / "vdb.h"

PARTS = (  # in the order of the header
    "manual",
    "declarations",
    "platform",
    "numbers",
    "kernels",
    "kernels_plain",
    "kernels_avx512",
    "kernels_amx",
    "kernels_avx2",
    "kernels_x86",
    "kernels_neon",
    "kernels_choice",
    "threads",
    "rows",
    "paging",
    "marks",
    "values",
    "records",
    "passing",
    "columns",
    "database",
    "conditions",
    "bounds",
    "exact_search",
    "graph",
    "graph_build",
    "files",
    "files_posix",
    "files_windows",
    "files_write",
    "files_read",
    "journal",
    "journal_mapped",
    "journal_read",
    "journal_write",
    "functions",
    "changing",
    "searching",
)


def joined() -> str:
    """The text of the header, from its parts."""
    return "".join((FOLDER / "parts" / f"{name}.h").read_text() for name in PARTS)


if __name__ == "__main__":
    HEADER.write_text(joined())
