"""What the command line says about rows that cannot be added."""

import numpy as np
import pytest

from octavo.errors import DuplicateIdError
from octavo.vdb import VectorDatabase
from octavo.vdb.ingest import fill
from octavo.vdb.sources import Batch


def batch(*ids: str | None) -> Batch:
    return Batch("rows.npy, rows from 0", np.ones((len(ids), 2), np.float32), list(ids), [None] * len(ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("new", "old"), "the id 'old' is in the database already"),
        (("new", "new"), "the id 'new' is given twice"),
    ],
)
def test_ids_that_are_there_name_the_option(ids: tuple[str, ...], message: str) -> None:
    db = VectorDatabase(2)
    db.add([1, 0], ids="old")
    with pytest.raises(DuplicateIdError, match=rf"^rows\.npy, rows from 0: {message}.*`octavo vdb add --replace`") as e:
        fill(db, [batch(*ids)], replace=False)
    assert "replace=True" not in str(e.value)
    assert db.count() == 1
    assert fill(db, [batch(None, *ids)], replace=True) == 3
    assert "old" in db
