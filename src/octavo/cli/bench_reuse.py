"""`octavo bench reuse`: the options, the parts in turn, the table and the JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from octavo.bench.source import surroundings
from octavo.cli.terminal import AdapterName, Device, Dtype, Model, check_writable, console, dtype_of
from octavo.errors import ConfigError

PARTS = ("first", "bytes", "traces", "similar", "embeddings", "policies")


def reuse(
    part: Annotated[str, typer.Option(help=f"What to measure: {', '.join(PARTS)}.")] = ",".join(PARTS),
    text: Annotated[Path | None, typer.Option(help="Text to build prompts of; the demo's if left out.")] = None,
    document: Annotated[int, typer.Option(min=64, help="Tokens of a long document.")] = 6000,
    questions: Annotated[int, typer.Option(min=2, help="Requests of a trace.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Of first tokens, of which the median counts.")] = 5,
    model: Model = None,
    shape: Annotated[
        str, typer.Option(help="Of first tokens: 'llama8b' for Llama-3.1-8B's shape, random weights and gates.")
    ] = "default",
    adapter: AdapterName = "auto",
    dtype: Dtype = None,
    device: Device = None,
    clock: Annotated[str, typer.Option(help="Of first tokens: wall, or cpu for the process's own seconds.")] = "wall",
    remote: Annotated[str | None, typer.Option(help="Of first tokens: a server's URL, to measure it as well.")] = None,
    peer: Annotated[bool, typer.Option(help="Replay traces with transformers' generate_batch too.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures; a plot of traces lies beside.")] = None,
) -> None:
    """First tokens of prompts seen before, what a miss costs, bytes, traces with and without a store, similar prompts,
    what finds them, policies."""
    parts = part.split(",")
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"--part takes {', '.join(PARTS)}, separated by commas, not {part!r}")
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"--clock takes wall or cpu, not {clock!r}")
    if out is not None:
        check_writable(out)
    found: dict[str, Any] = {}
    if shape != "default":
        if parts != ["first"] or remote is not None or model is not None or adapter != "auto":
            raise ConfigError(
                "--shape makes up a model and its gates, which no other process can load: it takes --part first alone, "
                "and no --model, --adapter or --remote"
            )
        found |= _of_shape(shape, text, document, rounds, clock, (dtype, device))
    elif set(parts) != {"policies"}:
        found |= _with_model(
            parts, text, document, questions, rounds, peer, (clock, remote), (model, adapter, dtype, device)
        )
    else:
        found |= surroundings()
    if "policies" in parts:
        from octavo.bench.reuse.policies import compared

        found["policies"] = [asdict(each) for each in compared()]
    _show(found)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
        if "traces" in found:
            from octavo.bench.reuse.plot import plot

            plot(found, out.with_suffix(".png"))
    print(json.dumps({name: found[name] for name in ("first", "bytes") if name in found}))


def _of_shape(
    shape: str, text: Path | None, document: int, rounds: int, clock: str, chosen: tuple[Any, ...]
) -> dict[str, Any]:
    import octavo
    from octavo.bench.engine.subjects import subject
    from octavo.bench.reuse.measure import first_tokens
    from octavo.bench.reuse.traces import Cuts
    from octavo.cli.demo import TEXT
    from octavo.retrofit.data import read_text

    dtype, device = chosen
    made = subject(shape, read_text(text or TEXT), device, dtype_of(dtype))
    octavo.attach(made.model, made.gates, cuda_graphs=True, reuse=octavo.ReuseStore("4GiB"))
    measured = first_tokens(made.model, Cuts(made.text.tolist(), 0), document, rounds, None, clock)
    return {**_told(made.model, made.name, made.gates.name), "clock": clock, "first": measured.figures}


def _told(model: Any, name: str, adapter: str) -> dict[str, Any]:
    """What a record says of the machine and of what was measured."""
    kind = str(model.dtype).removeprefix("torch.")
    subject = f"{name}, {kind}, adapter {adapter}"
    return surroundings(model.device) | {
        "dtype": kind, "adapter": adapter, "device": str(model.device), "subject": subject,
    }  # fmt: skip


def _with_model(
    parts: list[str],
    text: Path | None,
    document: int,
    questions: int,
    rounds: int,
    peer: bool,
    timing: tuple[str, str | None],
    chosen: tuple[Any, ...],
) -> dict[str, Any]:
    import octavo
    from octavo.bench.reuse.measure import first_tokens, stored_bytes, timed
    from octavo.bench.reuse.traces import Cuts, traces
    from octavo.cli.demo import TEXT
    from octavo.retrofit.data import read_text

    name, adapter, dtype, device = chosen
    named: dict[str, Any] = {
        "model": name, "adapter": None if adapter == "none" else adapter, "device": device,
        "cuda_graphs": True,
    }  # fmt: skip
    model, tokenizer = octavo.load(**named, dtype=dtype_of(dtype), reuse=octavo.ReuseStore("4GiB"))
    ids = tokenizer(read_text(text or TEXT), verbose=False)["input_ids"]
    cuts = Cuts(ids, 0)
    found = _told(model, name or "the default model", adapter)
    timed(model, cuts.piece(600))
    if "first" in parts:
        measured = first_tokens(model, cuts, document, rounds, {**named, "dtype": found["dtype"]}, *timing)
        found["first"], found["clock"] = measured.figures, timing[0]
    if "bytes" in parts:
        found["bytes"] = stored_bytes(model, cuts)
    if "similar" in parts:
        from octavo.bench.reuse.similar import alike

        found["similar"] = [asdict(each) for each in alike(model, tokenizer, cuts, min(document, 3000), rounds)]
    if "embeddings" in parts:
        from octavo.bench.reuse.embeddings import nominating

        plain, _ = octavo.load(**{**named, "adapter": None}, dtype=dtype_of(dtype))
        octavo.detach(plain)
        found["embeddings"] = [
            asdict(each) for each in nominating(model, plain, tokenizer, ids, min(document, 1000), 12 * rounds)
        ]
    if "traces" in parts:  # the last, since it leaves the model unattached
        found["traces"] = _traces(model, traces(ids, min(document, 3000), questions), peer)
    return found


def _traces(model: Any, chosen: list[Any], peer: bool) -> list[dict[str, Any]]:
    """All traces in all ways: with `generate`, and where there is a `peer` with transformers' continuous batching."""
    import octavo
    from octavo.bench.reuse.replay import Generate, batched, replay

    rows = []
    for trace in chosen:
        similar = octavo.ReuseStore("4GiB", similar=octavo.SimilarSettings(audit=0.0))
        for name, store in (
            ("no reuse", None), ("reuse store", octavo.ReuseStore("4GiB")), ("reuse store, similar prompts", similar)
        ):  # fmt: skip
            rows.append(asdict(replay(trace, Generate(name, model, store))))
    if peer:
        octavo.detach(model)
        room = max(sum(len(ask.tokens) for ask in trace.asks) for trace in chosen) + 8192
        for trace in chosen:
            with batched(model, room) as way:
                rows.append(asdict(replay(trace, way)))
    return rows


def _show(found: dict[str, Any]) -> None:
    if "first" in found:
        first = found["first"]
        table = Table(
            "first token", "seconds", "cold / this", title=f"{first['document']:,} tokens and a question of 30"
        )
        for name, key in (
            ("nothing known, no store", "cold_s"), ("nothing known, with a store", "miss_s"),
            ("document in memory", "memory_s"), ("the same until all is stored", "memory_call_s"),
            ("document on disk, fresh process", "disk_s"), ("document on the server, fresh process", "remote_s"),
        ):  # fmt: skip
            if key not in first:
                continue
            table.add_row(name, f"{first[key]:.3f}", f"{first['cold_s'] / first[key]:.1f}")
        console.print(table)
    if "bytes" in found:
        b = found["bytes"]
        console.print(f"{b['tokens']:,} tokens: {b['stored']:,} B stored, dense {b['dense']:,} B, 1/{b['ratio']:.2f}")
    if "traces" in found:
        table = Table("trace", "way", "prompt tokens", "computed", "reused", "first tokens, s", "bytes")
        for row in found["traces"]:
            held = "" if row["nbytes"] is None else f"{row['nbytes']:,}"
            table.add_row(
                row["trace"], row["way"], f"{row['prompt_tokens']:,}", f"{row['computed']:,}",
                f"{row['hit_rate']:.1%}", f"{row['first_s']:.2f}", held,
            )  # fmt: skip
        console.print(table)
    if "similar" in found:
        table = Table("changed", "tokens", "computed", "mean KL", "same top token", "seconds", "in full")
        for row in found["similar"]:
            table.add_row(
                row["change"], f"{row['tokens']:,}", f"{row['computed']:.1%}" if row["used"] else "all",
                f"{row['kl']:.5f}", f"{row['top1']:.0%}", f"{row['similar_s']:.2f}", f"{row['full_s']:.2f}",
            )  # fmt: skip
        console.print(table)
    if "embeddings" in found:
        rows = found["embeddings"]
        table = Table("embedding", "ms", title="Stored prompts found by changed ones: nearest / among 4, %")
        table.columns[0].no_wrap = True
        for change in rows[0]["first"]:
            table.add_column(change, justify="right")
        console.print(f"{rows[0]['stored']} stored prompts of {rows[0]['tokens']:,} tokens")
        for row in rows:
            shares = [f"{100 * share:.0f}/{100 * row['among'][change]:.0f}" for change, share in row["first"].items()]
            table.add_row(row["embedding"], f"{row['ms']:.1f}", *shares)
        console.print(table)
    if "policies" in found:
        table = Table("policy", "prompts that come once", "hits of prompts that came before", "hits of all")
        for row in found["policies"]:
            table.add_row(row["policy"], f"{row['once']:.0%}", f"{row['again_hit']:.1%}", f"{row['hit']:.1%}")
        console.print(table)
