"""The README's Python runs verbatim and prints what the README says; its numbers agree with the shipped cards."""

import contextlib
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attachment.adapters import load_adapter, resolve
from octavo.models import default_dtype
from octavo.retrofit.suite import results

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
OUTPUT = re.findall(r"```\n\n```\n(.*?)```", README, re.S)[0]


def test_the_first_block_prints_what_it_says() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(BLOCKS[0], "README.md", "exec"), {})
    got, said = out.getvalue().splitlines(), OUTPUT.splitlines()
    assert got[0] == said[0]
    if default_dtype(torch.device("cpu")) == torch.bfloat16:  # in float32 both figures double
        numbers = [[float(x) for x in re.findall(r"[\d.]+(?= MB)", lines[1])] for lines in (got, said)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


ADAPTERS = json.loads((Path(__file__).parents[1] / "bench" / "results" / "adapters-h200.json").read_text())
Policies = dict[str, dict[str, Any]]
POLICIES: Policies = {row["policy"]: row for row in ADAPTERS["policies"]}
ROWS = {  # a line's beginning, and the sets of cases in it
    "books": "books", "code": "code", "its own chats": "chats", "repeat prose": "repeat prose",
    "repeat code": "repeat code", "quote": "quote", "edit": "edit", "look up a row": "table",
    "several needles": "several needles", "facts": "facts",
}  # fmt: skip


def case_set(policy: str, name: str, length: int, policies: Policies = POLICIES) -> dict[str, Any]:
    """What was measured of one policy on one set of cases."""
    return next(each for each in policies[policy]["sets"] if (each["name"], each["length"]) == (name, length))


def shown(policy: str, name: str, length: int, policies: Policies = POLICIES) -> str:
    """As the tables show it."""
    measured = case_set(policy, name, length, policies)
    if measured["metric"] == "exact":
        return f"{100 * measured['exact']:.1f}%"
    if policy == "dense":
        return f"{measured['nll']:.3f}"
    if name == "chats" and policy.startswith("swiftkv") and policies is POLICIES:
        # It read others, and so did the dense model beside it.
        suite = load_adapter("swiftkv").card["suite"]
        (row,) = (row for row in suite["rows"] if row[0].startswith("chats"))
        return f"{float(row[suite['columns'].index(policy)].split()[0]):+.3f}"
    return f"{measured['nll'] - case_set('dense', name, length, policies)['nll']:+.3f}"


def share(policy: dict[str, Any]) -> str:
    """Bytes held, as the tables show them."""
    held = policy["nbytes"] / policy["dense_nbytes"]
    return f"{held:.2f}x" if held > 1 else f"1/{1 / held:.2f}"


def check_rows(lines: list[str], columns: Sequence[str], policies: Policies = POLICIES) -> None:
    """The lines of a table are `ROWS`, as measured of the policies in `columns`."""
    for line, (begins, name) in zip(lines, ROWS.items(), strict=True):
        label, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        assert label.startswith(begins)
        lengths = [int(n.replace(",", "")) for n in re.findall(r"\d,\d{3}", label.replace("past 1,024", ""))]
        assert cells == [" / ".join(shown(column, name, n, policies) for n in lengths) for column in columns]


def test_the_table_of_adapters_is_the_record() -> None:
    header, _, held, *lines = re.findall(r"^\|.*\|$", README[README.index("| | dense | dms-8x |") :], re.M)[
        : 3 + len(ROWS)
    ]
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    for column, cell in zip(columns[1:], held.split("|")[3:-1], strict=True):
        assert cell.strip() == share(POLICIES[column])
    check_rows(lines, columns)


def test_the_cards_of_what_ships_are_of_the_record() -> None:
    for name in ("dms-8x", "dms-5x", "dms-16x", "swiftkv"):
        suite = load_adapter(name).card["suite"]
        column = suite["columns"].index(name)
        cells = {row[0]: float(row[column].split()[0]) for row in suite["rows"] if row[0].endswith("NLL")}
        for kind, length in (("books", 8192), ("code", 8192), ("repeat prose", 4096), ("repeat code", 2048)):
            lost = case_set(name, kind, length)["nll"] - case_set("dense", kind, length)["nll"]
            assert cells[f"{kind} {length:,}, NLL"] == pytest.approx(lost, abs=6e-5)


def test_the_speed_table_is_the_measured_file() -> None:
    measured = json.loads((Path(__file__).parents[1] / "bench" / "results-cpu.json").read_text())["rows"]
    table = re.findall(r"^\| (bf16|fp32) \| ([\d,]+) \| (.*) \|$", README, re.M)
    assert len(table) == len(measured) == 6
    for (dtype, size, cells), row in zip(table, measured, strict=True):
        assert (dtype, int(size.replace(",", ""))) == (row["dtype"], row["tokens"])
        said = [float(x) for x in re.findall(r"[\d.]+", cells)]
        prefill, decode = row["prefill"], row["decode"]
        expected = [prefill["unattached_s"], prefill["octavo_s"], prefill["speedup_median"]]
        expected += [decode["unattached_s"] * 1e3, decode["octavo_s"] * 1e3, decode["speedup_median"]]
        assert said == pytest.approx(expected, rel=1e-3, abs=0.051)


def test_the_headline_is_the_record_s() -> None:
    dense, ours = POLICIES["dense"], POLICIES["dms-8x"]
    said = re.search(
        r"\*\*([\d.]+) MB instead of ([\d.]+) MB\*\*.*?\+([\d.]+) nats.*?with ([\d.]+) of.*?against ([\d.]+)",
        README,
        re.S,
    )
    assert said is not None
    found = [
        statistics.fmean(case_set(policy, "facts", n)["exact"] for n in (2048, 4096, 8192))
        for policy in ("dms-8x", "dense")
    ]
    measured = [ours["nbytes"] / 1e6, dense["dense_nbytes"] / 1e6, float(shown("dms-8x", "books", 8192)), *found]
    assert [float(x) for x in said.groups()] == pytest.approx(measured, abs=0.06, rel=1e-3)
    assert [float(x) for x in said.groups()[2:]] == pytest.approx(measured[2:], abs=6e-4)


def test_the_vector_database_s_block_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, said = re.findall(r"```python\n(from octavo.vdb .*?)```\n\n```\n(.*?)```", README, re.S)[0]
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), {})
    assert out.getvalue() == said


VDB_TABLE = {  # a line's beginning, and what its figures are called in the record; {t} is the column's threads
    "one query, times faiss": ["{s}, times faiss: single query, 100,000 x 384, {t}"],
    "100 queries at once": ["{s}, times faiss, BLAS: batch of 100, 100,000 x 384, {t}"],
    "one query of 1,000,000 rows": ["f32, share of the streaming read: single query, 1,000,000 x 384, {t}"],
    "HNSW at recall 0.95": ["HNSW {s}, times the better of hnswlib and usearch at recall 0.95: {e}"],
    "HNSW at recall 0.99": ["HNSW {s}, times the better of hnswlib and usearch at recall 0.99: {e}"],
    "HNSW build": ["HNSW {s}, build, times hnswlib: {e}, {t}"],
    "a call from Python": ["call of octavo f32, us: 10 x 64", "call of octavo f32, us: 10 x 384"],
    "bytes a vector": ["{s}, bytes per vector beyond the vectors: 100,000 x 384"],
    "save / load": [
        "save, times copying the same bytes: 1,000,000 x 128",
        "load, times copying the same bytes: 1,000,000 x 128",
    ],
    "opening that file": ["mmap open, ms: 1,000,000 x 128"],
}


def test_the_vector_database_s_table_is_the_measured_file() -> None:
    record = json.loads((Path(__file__).parents[1] / "bench" / "results-vdb.json").read_text())
    measured = {judged["what"]: judged["median"] for judged in record["judgements"]}
    section = README[README.index("## The vector database") :]
    lines = re.findall(r"^\| ([^|]+) \| ([^|]*) \| ([^|]*) \|$", section, re.M)[1:]
    assert len(lines) == len(VDB_TABLE)
    for (what, *columns), (begins, names) in zip(lines, VDB_TABLE.items(), strict=True):
        assert what.startswith(begins)
        for cell, threads in zip(columns, ("1 thread", "2 threads"), strict=True):
            figures = [float(x) for x in re.findall(r"[\d.]+", cell)]
            if not figures:
                continue
            storages = ("f32", "f32+i8") if "{s}" in names[0] else ("",)
            wanted = [
                name.format(s=storage, t=threads, e="100,000 x 256, embeddings.npy")
                for name in names
                for storage in storages
            ]
            assert figures == pytest.approx(
                [measured[name] for name in wanted], abs=0.0501 if "bytes" in what else 0.00501
            )


def test_the_swiftkv_table_is_the_record() -> None:
    path = Path(__file__).parents[1] / "bench" / "results" / "swiftkv-half-h200.json"
    record = json.loads(path.read_text())
    policies = {row["policy"]: row for row in record["policies"]}
    columns = ("dense", "swiftkv", "swiftkv-half", "swiftkv-half + dms-8x")
    held, *lines = re.findall(r"^\|.*\|$", README[README.index("| | layers skipped: none |") :], re.M)[
        2 : 3 + len(ROWS)
    ]
    assert [cell.strip() for cell in held.split("|")[2:-1]] == [share(policies[p]) for p in columns]
    check_rows(lines, columns, policies)
    words = re.findall(r"([\d.]+)%(?: of the tokens are the same)? with `swiftkv(-half)?`", README)
    assert len(words) == 2
    for said, half in words:
        assert said == f"{100 * case_set(f'swiftkv{half}', 'greedy answers', 2048, policies)['same']:.1f}"
    for adapter, policy in zip(resolve("swiftkv-half+dms-8x"), columns[2:], strict=True):
        alone = {**record, "notes": [], "policies": [policies["dense"], policies[policy]]}
        measured = results.cells(results.LongEvaluation.from_json(alone, str(path)))
        assert adapter.card["suite"]["rows"] == measured[1:], "the card is the record's"


def test_the_swiftkv_speeds_are_the_measured_file() -> None:
    measured = json.loads((Path(__file__).parents[1] / "bench" / "results-swiftkv.json").read_text())["rows"]
    prefill = re.findall(r"^\| prefill, (\w+), ([\d,]+) tokens \| .*? \| .*? \| ([\d.]+)x \|", README, re.M)
    decode = re.findall(r"^\| per token, (\w+), at ([\d,]+) \| .*? \| .*? \| ([\d.]+)x \|", README, re.M)
    sizes = [(r["dtype"], r["tokens"]) for r in measured]
    assert [(d, int(n.replace(",", ""))) for d, n, _ in prefill] == sizes
    speedups = [r["speedup_to_attached"][0] for r in measured]
    assert [float(x) for _, _, x in prefill] == pytest.approx(speedups, abs=0.0051)
    steps = [r for r in measured if "decode_ratio" in r]
    assert [(d, int(n.replace(",", ""))) for d, n, _ in decode] == [(r["dtype"], r["tokens"]) for r in steps]
    assert [float(x) for _, _, x in decode] == pytest.approx([1 / r["decode_ratio"] for r in steps], abs=0.0051)


def test_the_shipped_adapters_speeds_are_the_record() -> None:
    record = Path(__file__).parents[1] / "bench" / "results" / "swiftkv-shipped-cpu.json"
    runs = json.loads(record.read_text())["runs"]
    assert [run["adapter"] for run in runs] == ["swiftkv", "swiftkv-half"]
    lines = re.findall(r"^\| ([\d,]+) tokens \| (.*) \|$", README[README.index("| a prompt of |") :], re.M)[:3]
    for n, cells in lines:
        rows = [next(r for r in run["rows"] if r["tokens"] == int(n.replace(",", ""))) for run in runs]
        ratios = [row[f"speedup_to_{mode}"][0] for row in rows for mode in ("attached", "unattached")]
        assert [float(x) for x in re.findall(r"([\d.]+)x", cells)] == pytest.approx(ratios, abs=0.0051)
    assert len(lines) == 3


def test_the_swiftkv_speeds_on_a_gpu_are_the_measured_file() -> None:
    measured = json.loads((Path(__file__).parents[1] / "bench" / "results-swiftkv-cuda.json").read_text())["rows"]
    line = r"\| ([\d,]+) ms \| ([\d,]+) ms \| ([\d.]+)x \| ([\d,]+) ms \|$"
    prefill = re.findall(r"^\| prefill in chunks of ([\d,]+) " + line, README, re.M)
    assert [int(chunk.replace(",", "")) for chunk, *_ in prefill] == [row["chunk"] for row in measured]
    (decode,) = re.findall(r"^\| per token, at 8,192 " + line, README, re.M)
    last = measured[-1]
    modes = ("swiftkv", "attached", "unattached")
    for phase, ratio, figures, row in [
        *(
            ("prefill", row["speedup_to_attached"][0], figures, row)
            for (_, *figures), row in zip(prefill, measured, strict=True)
        ),
        ("decode", 1 / last["decode_ratio"], decode, last),
    ]:
        with_, without, shown, plain = (float(x.replace(",", "")) for x in figures)
        assert [with_, without, plain] == pytest.approx([1e3 * row[f"{phase}_{mode}_s"] for mode in modes], abs=0.51)
        assert shown == pytest.approx(ratio, abs=0.0051)


def test_the_swiftkv_speeds_of_today_are_the_record() -> None:
    record = Path(__file__).parents[1] / "bench" / "results" / "swiftkv-cuda-h200.json"
    plain, handing = (run["rows"][0] for run in json.loads(record.read_text())["runs"])
    begins = README.index("Newer, on one H200")
    said = re.findall(r"([\d.]+) (?:ms|times as)", README[begins : README.index("(`--chunk 8192", begins)])
    expected = [1e3 * plain[f"prefill_{mode}_s"] for mode in ("swiftkv", "attached", "unattached")]
    expected += [plain["speedup_to_attached"][0], 1e3 * handing["prefill_swiftkv_s"]]
    expected += [handing["speedup_to_attached"][0]]
    assert [float(x) for x in said] == [pytest.approx(x, abs=0.5 if x > 2 else 0.0051) for x in expected]


def test_the_gpu_tables_are_the_records() -> None:
    results = Path(__file__).parents[1] / "bench" / "results"
    rows = {
        (row["model"], row["batch"]): row
        for row in json.loads((results / "gpu-h200.json").read_text())["rows"]
        if row["tokens"] == 8000
    }
    names = ("unattached", "dms-8x", "dms-8x, CUDA graphs", "dms-8x, CUDA graphs, compiled")
    begins = README.index("| | prefill, batch 1 | prefill, batch 8 |")
    lines = re.findall(r"^\|.*\|$", README[begins:], re.M)[2:6]
    for name, line in zip(names, lines, strict=True):
        cells = [rows[name, batch][phase] for phase in ("prefill", "decode") for batch in (1, 8)]
        expected = [each[n] for each in cells for n in ("ms", "of_unattached_median")]
        expected = expected[::2] if name == "unattached" else expected
        said = [float(x) for cell in line.split("|")[2:-1] for x in re.findall(r"[\d.]+", cell)]
        assert said == pytest.approx(expected, abs=0.051)


def engine_record(name: str) -> tuple[dict[tuple[str, int, int], float], dict[tuple[str, str, int, int], float]]:
    """(milliseconds of a step by model, batch and context; a peer's by what, KV, batch and context)."""
    found = json.loads((Path(__file__).parents[1] / "bench" / "results" / f"engine-h200-{name}.json").read_text())
    ours = {(s["name"].partition(", ")[2], s["batch"], s["context"]): s["decode_ms"] for s in found["steps"]}
    ours |= {("prefill of " + s["name"].partition(", ")[2], 1, s["context"]): s["prefill_ms"] for s in found["steps"]}
    peers = [p for p in found["peers"] if p["what"] != "end"]
    return ours, {(p["what"], p["kv"], p["B"], p["T"]): p[p["what"] + "_ms"] for p in peers}


def test_the_engine_s_tables_are_the_records() -> None:
    lines = re.findall(r"^\| (8B|SmolLM2), (\d+) x ([\d,]+) \| (.*) \| \d+% \|$", README, re.M)
    assert len(lines) == 6
    for subject, batch, context, cells in lines:
        B, T = int(batch), int(context.replace(",", ""))
        gates = "made-up" if subject == "8B" else "dms-8x-v1"
        ours, peers = engine_record("smollm2" if subject == "SmolLM2" else "llama8b" if T == 32768 else "llama8b-8k")
        kinds = ("nothing evicted", gates, f"{gates}, int8", f"{gates}, fp8")
        expected = [peers["decode", kv, B, T] for kv in ("auto", "fp8") if ("decode", kv, B, T) in peers]
        expected += [ours[kind, B, T] for kind in kinds]
        assert [float(x) for x in re.findall(r"[\d.]+", cells)] == pytest.approx(expected, abs=0.0051)
    ours, peers = engine_record("smollm2")
    table = re.findall(r"^\| ([\d,]+) \| (.*) \|$", README[README.index("| tokens | vLLM |") :], re.M)[:3]
    for size, cells in table:
        n = int(size.replace(",", ""))
        kinds = ("prefill of nothing evicted", "prefill of dms-8x-v1")
        expected = [peers["prefill", "auto", 1, n], *(ours[kind, 1, n] for kind in kinds)]
        assert [float(x) for x in re.findall(r"[\d.]+", cells)] == pytest.approx(expected, abs=0.051)


def test_what_memory_buys_and_long_prompts_are_the_records() -> None:
    ours, peers = engine_record("llama8b-equal-memory")
    second = [1000 * 12 / peers["decode", "auto", 12, 32768], 2000 * 12 / peers["decode", "fp8", 12, 32768]]
    said = re.search(r"12 x 32,768 in bf16 \(52 GB\) \| (\d+) / at most ([\d,]+) \| \*\*([\d,]+)\*\*", README)
    assert said is not None
    found = [float(x.replace(",", "")) for x in said.groups()]
    assert found == pytest.approx([*second, 1000 * 84 / ours["made-up", 84, 32768]], rel=1e-3)
    ours, peers = engine_record("llama8b-prefill")
    said = re.search(r"a prompt of 32,768 tokens \| ([\d,]+) / ([\d,]+) ms \| ([\d,]+) ms;.*?\*\*(\d+) ms", README)
    assert said is not None
    expected = [peers["prefill", kv, 1, 32768] for kv in ("auto", "fp8")]
    expected += [ours[f"prefill of {kind}", 1, 32768] for kind in ("made-up", "half + made-up")]
    assert [float(x.replace(",", "")) for x in said.groups()] == pytest.approx(expected, abs=0.51)


def test_the_table_beside_kvpress_is_the_records() -> None:
    theirs = json.loads((Path(__file__).parents[1] / "bench" / "results" / "kvpress-h200.json").read_text())
    policies = {row["policy"]: row for row in (*theirs["policies"], POLICIES["dms-8x"])}
    header, _, *lines = re.findall(r"^\|.*\|$", README[README.index("| | dense | dms-8x | TOVA |") :], re.M)[:6]
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    for line, name in zip(lines, ("facts", "several needles", "table", "edit"), strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        found = [s for c in columns for s in policies[c]["sets"] if (s["name"], s["length"]) == (name, 4096)]
        assert cells == [f"{100 * each['exact']:.1f}%" for each in found]
    for each in policies["dense"]["sets"]:
        ours = case_set("dense", each["name"], each["length"])
        assert each["nll"] == pytest.approx(ours["nll"], abs=1e-3), "both read the same cases"


def test_the_page_beside_kvpress_is_the_record() -> None:
    bench = Path(__file__).parents[1] / "bench"
    page, record = (bench / "kvpress" / "README.md").read_text(), bench / "results" / "kvpress-h200.json"
    theirs = json.loads(record.read_text())
    columns = [cell.strip() for cell in re.findall(r"^\|  \| dense \| .*$", page, re.M)[0].split("|")[2:-1]]
    sets = {(each["name"], each["length"]) for each in theirs["policies"][0]["sets"]}
    policies = {row["policy"]: row for row in theirs["policies"]}
    rows = []
    for name in columns:
        row = policies.get(name) or POLICIES[name]
        rows.append({**row, "sets": [each for each in row["sets"] if (each["name"], each["length"]) in sets]})
    _, *lines = results.cells(results.LongEvaluation.from_json({**theirs, "policies": rows}, str(record)))
    assert set(columns) >= set(policies), "all presses that were measured"
    assert len(lines) - 1 == len(sets)
    for title, *figures in lines[1:]:  # behind bytes
        task = title.removesuffix(", NLL").removesuffix(" 4,096")
        assert f"| {task} | {' | '.join(figures)} |" in page
