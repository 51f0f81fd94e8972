"""Where a database is saved: links, modes, owners, what is no file, and what somebody else has changed."""

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ConfigError, DatabaseFileError, OutputFileError
from octavo.vdb import VectorDatabase
from octavo.vdb.export import write
from octavo.vdb.locks import locked
from octavo.vdb.sources import Batch

NOBODY = 65534


def filled(rows: int = 3) -> VectorDatabase:
    db = VectorDatabase(2)
    db.add(np.ones((rows, 2), np.float32))
    return db


def rows_of(path: Path) -> int:
    with VectorDatabase.open(path) as db:
        return len(db)


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights, which no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that everybody reaches and may write into; pytest's own are private."""
    if os.geteuid() != 0:
        return tmp_path
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and stat.S_IMODE(folder.stat().st_mode) & 0o011 != 0o011:
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o011)
    tmp_path.chmod(0o777)
    return tmp_path


def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    filled(1).save(folder / "file.vdb")
    (tmp_path / "relative").symlink_to("folder/file.vdb")
    (tmp_path / "absolute").symlink_to(tmp_path / "relative")
    filled(2).save(tmp_path / "absolute")
    assert (tmp_path / "absolute").is_symlink()
    assert (tmp_path / "relative").is_symlink()
    assert rows_of(folder / "file.vdb") == 2
    assert sorted(p.name for p in folder.iterdir()) == ["file.vdb"]
    (folder / "file.vdb").unlink()
    filled(4).save(tmp_path / "absolute")  # the links dangle
    assert rows_of(folder / "file.vdb") == 4
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DatabaseFileError, match="symbolic links"):
        filled().save(tmp_path / "a")


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o444, 0o2664])
def test_the_mode_is_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file.vdb"
    filled(1).save(path)
    path.chmod(mode)
    filled(2).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert rows_of(path) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_and_group_are_kept(open_folder: Path) -> None:
    path = open_folder / "file.vdb"
    filled(1).save(path)
    os.chown(path, 1234, 4321)
    path.chmod(0o666)
    filled(2).save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)
    with nobody(), pytest.raises(DatabaseFileError, match="belongs to another user"):
        filled(3).save(path)
    assert rows_of(path) == 2
    assert sorted(p.name for p in open_folder.iterdir()) == ["file.vdb"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DatabaseFileError, match=r"pipe: it is a folder, a pipe or a device"):
        filled().save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    device = tmp_path / "device"
    device.symlink_to(os.devnull)
    for path in (device, Path(os.devnull), tmp_path):
        with pytest.raises(DatabaseFileError, match="it is a folder, a pipe or a device"):
            filled().save(path)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert device.is_symlink()


def test_hard_links_are_not_parted(tmp_path: Path) -> None:
    path, other = tmp_path / "file.vdb", tmp_path / "other.vdb"
    filled(1).save(path)
    other.hardlink_to(path)
    with pytest.raises(DatabaseFileError, match="hard links"):
        filled(2).save(path)
    assert os.path.samefile(path, other)
    assert rows_of(path) == 1


def test_a_folder_that_takes_no_new_file(open_folder: Path) -> None:
    folder = open_folder / "closed"
    folder.mkdir()
    path = folder / "file.vdb"
    filled(1).save(path)
    path.chmod(0o666)
    folder.chmod(0o555)
    with nobody(), pytest.raises(DatabaseFileError, match=r"folder does not let a new file take its place.*writable"):
        filled(2).save(path)
    with nobody(), pytest.raises(DatabaseFileError, match="Permission denied"):
        filled(2).save(folder / "new.vdb")
    folder.chmod(0o777 | stat.S_ISVTX)
    if os.geteuid() == 0:
        with nobody(), pytest.raises(DatabaseFileError, match="another user"):
            filled(2).save(path)
    folder.chmod(0o777)
    assert rows_of(path) == 1
    assert [p.name for p in folder.iterdir()] == ["file.vdb"]


@pytest.mark.parametrize("name", ["x" * 251 + ".vdb", "é" * 127, "日" * 85])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    filled(1).save(path)
    filled(2).save(path)
    assert rows_of(path) == 2
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(DatabaseFileError, match="too long"):
        filled().save(tmp_path / (name + "xx"))


def test_only_the_file_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    filled(1).save(path, mode="new")
    with pytest.raises(DatabaseFileError, match="exists"):
        filled(2).save(path, mode="new")
    with pytest.raises(DatabaseFileError, match="not the one that this database was read from"):
        filled(2).save(path, "same")
    mine, theirs = VectorDatabase.open(path), VectorDatabase.open(path)
    for db in (mine, theirs):
        db.add([1, 0])
    theirs.save(path, mode="same")
    with pytest.raises(DatabaseFileError, match=r"another program has changed it.*Open it again"):
        mine.save(path, mode="same")
    assert rows_of(path) == 2
    theirs.add([1, 0])
    theirs.save(path, mode="same")  # what it saved last is its own
    path.write_bytes(path.read_bytes())  # the same bytes are the same file
    theirs.save(path, mode="same")
    path.unlink()
    with pytest.raises(DatabaseFileError, match="not the one"):
        theirs.save(path, mode="same")
    theirs.save(path, mode="new")
    mine.save(path)
    assert rows_of(path) == 2
    with pytest.raises(ConfigError, match="mode 'old' is unknown"):
        mine.save(path, mode="old")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["file.vdb"]


def test_the_lock_follows_the_path(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    filled(0).save(path)
    waited: list[int] = []

    def grow() -> None:
        for _ in range(20):
            with locked(path, lambda: waited.append(1)), VectorDatabase.open(path) as db:
                db.add([1, 0])
                time.sleep(0.001)
                db.save(path, mode="same")

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows_of(path) == 80
    assert waited
    with pytest.raises(DatabaseFileError, match="No such file"), locked(tmp_path / "nowhere"):
        pass


def test_two_commands_add_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    VectorDatabase(8).save(path)
    command = [sys.executable, "-c", "from octavo.cli.main import main; main()", "vdb", "add", str(path)]
    running = []
    for i in range(2):
        vectors = tmp_path / f"{i}.npy"
        np.save(vectors, np.random.default_rng(i).standard_normal((500, 8), dtype=np.float32))
        running.append(subprocess.Popen([*command, str(vectors)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=120)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert rows_of(path) == 1000


def test_exported_files_follow_links_and_keep_their_mode(tmp_path: Path) -> None:
    batches = [Batch("", np.ones((2, 3), np.float32), [None] * 2, [None] * 2)]
    path, link = tmp_path / "file.npy", tmp_path / "link.npy"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    assert write(link, batches, 3) == 2
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert np.load(path).shape == (2, 3)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(OutputFileError, match="not a regular file"):
        write(tmp_path / "pipe.npy", batches, 3)
