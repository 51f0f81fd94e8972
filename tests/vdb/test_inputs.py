"""Every form of vectors means the same, and what cannot be read says so."""

import array
import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import VectorError
from octavo.vdb import VectorDatabase

D = 4
ROWS = np.arange(12, dtype=np.float32).reshape(3, D)

ONE: dict[str, Callable[[np.ndarray], Any]] = {
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(x.tolist()),
    "ints": lambda x: [int(v) for v in x],
    "numpy scalars": list,
    "tensor scalars": lambda x: list(torch.from_numpy(x.copy())),
    "generator": lambda x: (v for v in x.tolist()),
    "range": lambda x: range(int(x[0]), int(x[0]) + D),
    "numpy": lambda x: x,
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32),
    "explicit byte order": lambda x: x.astype("<f4"),
    "torch": lambda x: torch.from_numpy(x.copy()),
    "torch with grad": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
    "bytes": lambda x: x.tobytes(),
    "bytearray": lambda x: bytearray(x.tobytes()),
    "memoryview of bytes": lambda x: memoryview(x.tobytes()),
    "unaligned bytes": lambda x: memoryview(b"." + x.tobytes())[1:],
    "memoryview": lambda x: memoryview(x),
    "array": lambda x: array.array("f", x),
    "ctypes": lambda x: (ctypes.c_float * D)(*x),
}
MANY: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda x: x.tolist(),
    "tuple of lists": lambda x: tuple(x.tolist()),
    "rows": list,
    "tensors": lambda x: list(torch.from_numpy(x.copy())),
    "arrays": lambda x: [array.array("f", row) for row in x],
    "bytes rows": lambda x: [row.tobytes() for row in x],
    "generator": lambda x: (row for row in x),
    "numpy": lambda x: x,
    "torch": lambda x: torch.from_numpy(x.copy()),
    "bytes": lambda x: x.tobytes(),
    "memoryview": lambda x: memoryview(x),
}


OTHER: dict[str, Callable[[np.ndarray], Any]] = {  # numbers that are not float32, or not side by side: rounded, copied
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "big-endian": lambda x: x.astype(">f4"),
    "objects": lambda x: x.astype(object),
    "strided": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "transposed": lambda x: np.asfortranarray(x),
    "unaligned": lambda x: (
        np.frombuffer(b"." + x.astype(np.float64).tobytes(), np.uint8)[1:].view(np.float64).reshape(x.shape)
    ),
    **{str(t): lambda x, t=t: x.astype(t) for t in "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()},
    **{
        f"torch {t}": lambda x, t=t: torch.from_numpy(x.copy()).to(getattr(torch, t))
        for t in "float64 float16 bfloat16 uint8 int8 int16 int32 int64".split()
    },
    "torch strided": lambda x: torch.from_numpy(np.repeat(x, 2, axis=-1))[..., ::2],
    "torch float64 with grad": lambda x: torch.from_numpy(x.astype(np.float64)).requires_grad_(),
}


@pytest.mark.parametrize("form", OTHER)
def test_other_numbers(form: str) -> None:
    db = VectorDatabase(D, metric="euclidean")
    db.add_vector(OTHER[form](ROWS[1]))
    assert db.add(OTHER[form](ROWS)) == [1, 2, 3]
    assert db.add(list(OTHER[form](ROWS[:2]))) == [4, 5]
    assert [db.get(index=i).vector.tolist() for i in range(6)] == ROWS[[1, 0, 1, 2, 0, 1]].tolist()
    assert db.search(OTHER[form](ROWS), k=1).distances.tolist() == [[0], [0], [0]]
    assert db.search(OTHER[form](ROWS[2]), k=1).distances.tolist() == [0]


def test_rounding_is_that_of_float32() -> None:
    numbers = np.array([1 / 3, -1e-50, 16777217, 3.4e38])
    for form in (numbers, numbers.tolist(), array.array("d", numbers), torch.from_numpy(numbers)):
        db = VectorDatabase(D)
        db.add_vector(form)
        assert db.get(index=0).vector.tolist() == numbers.astype(np.float32).tolist()
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    db = VectorDatabase(1)
    db.add(finite[:, None])
    assert [db.get(index=i).vector[0] for i in range(len(finite))] == finite.astype(np.float64).tolist()
    for value in (1e39, math.inf, math.nan):
        with pytest.raises(VectorError, match=r"vectors\[0\] is (inf|nan) as float32"):
            db.add(np.array([value]))
    with pytest.raises(VectorError, match=r"\[0\] is nan"):
        db.add(np.array([math.nan], np.float16))


@pytest.mark.parametrize("form", ONE)
def test_one_vector(form: str) -> None:
    db = VectorDatabase(D, metric="euclidean")
    assert db.add(ONE[form](ROWS[1])) == 0
    assert db.get(index=0).vector.tolist() == ROWS[1].tolist()
    hits = db.search(ONE[form](ROWS[1]))
    assert hits.distances.tolist() == [0]
    assert hits.distances.ndim == 1
    db.add_vector(ONE[form](ROWS[1]))
    assert db.count() == 2


@pytest.mark.parametrize("form", MANY)
def test_many_vectors(form: str) -> None:
    db = VectorDatabase(D, metric="euclidean")
    assert db.add(MANY[form](ROWS)) == [0, 1, 2]
    hits = db.search(MANY[form](ROWS), k=1)
    assert hits.indices.tolist() == [[0], [1], [2]]
    assert hits.distances.tolist() == [[0], [0], [0]]
    if form != "bytes":  # bytes of one row are one vector
        assert db.search(MANY[form](ROWS[:1]), k=1).indices.tolist() == [[0]]
    assert db.add(MANY[form](ROWS[:0])) == []


class Elsewhere(torch.Tensor):
    """A tensor on a device that this machine may lack."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


WRONG: dict[str, tuple[Any, str]] = {
    "too short": (ROWS[0, :3].copy(), "a vector of 3 numbers, but this database has 4 dimensions"),
    "short rows": (ROWS[:, :3].copy(), "a vector of 3 numbers"),
    "short list": ([1, 2, 3], "a vector of 3 numbers"),
    "short row": ([[1, 2, 3, 4], [1, 2, 3]], r"\[1\]: a vector of 3 numbers"),
    "odd bytes": (bytes(15), "15 bytes are no multiple of 16"),
    "odd row bytes": ([bytes(16), bytes(15)], r"\[1\]: 15 bytes"),
    "uint8": (np.zeros(16, np.uint8), "a vector of 16 numbers"),
    "bools": (np.zeros(4, bool), r'dtype bool holds no real numbers.*x\.astype\("float32"\)'),
    "complex": (np.zeros(4, complex), r"\[0\] is .*, not a number"),
    "texts in objects": (np.array([1, "b", 3, 4], object), r"\[1\] is 'b', not a number"),
    "dates": (np.zeros(4, "datetime64[s]"), "float32"),
    "gaps in bytes": (memoryview(bytes(32))[::2], "bytes are not contiguous"),
    "three axes": (np.zeros((1, 1, 4), np.float32), "3 dimensions of shape"),
    "no axis": (np.float32(1), "0 dimensions of shape"),
    "torch bools": (torch.zeros(4, dtype=torch.bool), r"dtype torch\.bool.*x\.float\(\)"),
    "torch complex": (torch.zeros(4, dtype=torch.complex64), r"dtype torch\.complex64.*x\.float\(\)"),
    "torch three axes": (torch.zeros(1, 1, 4), "3 dimensions"),
    "torch short": (torch.zeros(3), "3 numbers"),
    "torch meta": (torch.zeros(4, device="meta"), "device"),
    "torch elsewhere": (torch.zeros(4).as_subclass(Elsewhere), r"cuda.*pass x\.cpu\(\)"),
    "torch sparse": (torch.zeros(4).to_sparse(), "tensor cannot be read"),
    "text": ("abcd", "cannot read vectors from <class 'str'>"),
    "texts": (["a", "b", "c", "d"], r"\[0\]: cannot read"),
    "text in numbers": ([1, "b", 3, 4], r"\[1\] is 'b', not a number"),
    "none in numbers": ([1, None, 3, 4], r"\[1\] is None, not a number"),
    "huge int": ([1, 10**400, 3, 4], "beyond float32"),
    "nothing": (None, "cannot read vectors"),
    "number": (3.5, "cannot read vectors"),
    "dict": ({1: 2}, "cannot read vectors"),
    "set": ({1.0, 2.0, 3.0, 4.0}, "cannot read vectors"),
    "mixed": ([[1, 2, 3, 4], 5], r"\[1\]: cannot read"),
    "too deep": ([[[1, 2, 3, 4]]], "a vector of 1 numbers"),
    "rows in rows": ([np.zeros((2, 4), np.float32)], "must be one vector"),
}


@pytest.mark.parametrize("form", WRONG)
def test_what_cannot_be_read(form: str) -> None:
    db = VectorDatabase(D)
    db.add([1, 2, 3, 4])
    value, message = WRONG[form]
    for call in (db.add, db.add_vector, db.search):
        with pytest.raises(VectorError, match=message):
            call(value)
    assert db.count() == 1


def test_errors_of_iterators_pass() -> None:
    def broken() -> Any:
        yield 1.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        VectorDatabase(2).add(broken())


def test_a_list_that_changes_while_it_is_read() -> None:
    numbers: list[Any] = [1.0, 2.0, 3.0, 4.0]

    class Shrinks:
        def __float__(self) -> float:
            numbers.clear()
            return 1.0

    numbers[1] = Shrinks()
    db = VectorDatabase(D)
    db.add(numbers)
    assert db.get(index=0).vector.tolist() == [1, 1, 3, 4]


def test_memory_is_given_back() -> None:
    data = bytearray(ROWS.tobytes())
    db = VectorDatabase(D)
    db.add(data)
    db.search(data)
    with pytest.raises(VectorError):
        db.add_vector(data)
    data.extend(b"not locked by a view")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)))
def test_floats_are_kept_as_they_are(rows: list[list[float]]) -> None:
    db = VectorDatabase(3, metric="euclidean")
    db.add(rows)
    stored = [db.get(index=i).vector.tolist() for i in range(len(rows))]
    assert stored == rows
    again = VectorDatabase(3, metric="euclidean")
    again.add(np.array(rows, np.float32).reshape(len(rows), 3))
    assert [again.get(index=i).vector.tolist() for i in range(len(rows))] == rows
