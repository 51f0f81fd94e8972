"""Lays exercises out as tokens: items and questions with other text between them, as a chat or as plain text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.retrofit.data import Source, encode
from octavo.retrofit.exercises import copying, lookup, scattered
from octavo.retrofit.exercises.item import Item, pick
from octavo.retrofit.exercises.reader import Ids, Reader
from octavo.retrofit.recall import chat_frame

Maker = Callable[[Reader, np.random.Generator], Item]

# How often each kind is drawn. Copying is what gates forget first, and a user what he notices first.
KINDS: dict[Maker, float] = {
    copying.repeat: 0.22,
    copying.repeat_plainly: 0.1,
    copying.quote: 0.12,
    copying.go_on: 0.1,
    copying.edit: 0.13,
    lookup.table: 0.09,
    lookup.records: 0.06,
    lookup.listing: 0.05,
    scattered.facts: 0.05,
    scattered.several: 0.04,
    scattered.variables: 0.04,
}
SMALLEST = 300  # tokens of a session; less is filled with text
WHOLE = 0.4  # share of sessions that take all room there is, so that questions lie far from what they ask for
AT_END, AT_ONCE = 0.6, 0.2  # shares of turns that come after all text, and right after what they ask for

_INSTRUCTIONS = (
    "Here is some material. I will ask about it.",
    "Read what follows.",
    "Below are several texts; keep them in mind.",
    "Please work with this document.",
    "",
)
_SEPARATORS = (("\n\n", "\n"), ("\n\nQ: ", "\nA: "), ("\n\nQuestion: ", "\nAnswer: "), ("\n\n# ", "\n\n"))


@dataclass(frozen=True)
class _Event:
    at: float  # in [0, 1] among the text, past 1 after it
    body: str | None = None
    question: str = ""
    answer: str = ""


def exercise_sequence(
    tokenizer: Any, sources: Sequence[Source], rng: np.random.Generator, length: int
) -> npt.NDArray[np.int64]:
    """Sessions of exercises on text of `sources`, one after another, of exactly `length` tokens: [length] int64."""
    reader = Reader(tokenizer, sources)
    pieces: list[Ids] = []
    left = length
    while left:
        if left < SMALLEST and pieces:
            size = left
            pieces.append(reader.running(rng, size))
        else:
            size = left
            if left >= 3 * SMALLEST and rng.random() >= WHOLE:
                size = int(np.exp(rng.uniform(np.log(2 * SMALLEST), np.log(left))))
            size = left if left - size < SMALLEST else size
            pieces.append(_session(reader, rng, size))
        left -= size
    return np.concatenate(pieces)


def _session(reader: Reader, rng: np.random.Generator, length: int) -> Ids:
    """One conversation or text of exactly `length` tokens; plain text where no item fits."""
    makers = list(KINDS)
    shares = np.array(list(KINDS.values()))
    count = 1 + length // 3000 + int(rng.integers(0, 2 + length // 1000))
    chosen = rng.choice(len(makers), size=count, p=shares / shares.sum())
    chat = reader.tokenizer.chat_template is not None and rng.random() < 0.5
    items = [_made(makers[int(which)], reader, rng, chat) for which in chosen]
    while items:
        events = _scheduled(items, rng)
        fixed = _chat(reader, events, rng) if chat else _plain(reader, events, rng)
        room = length - sum(len(ids) for pieces in fixed for ids in pieces)
        if room >= 0:
            return _filled(reader, rng, events, fixed, room)
        items.pop()
    return reader.running(rng, length)


def _made(maker: Maker, reader: Reader, rng: np.random.Generator, chat: bool) -> Item:
    """An item; in a chat every answer has a question."""
    return copying.repeat(reader, rng) if chat and maker is copying.repeat_plainly else maker(reader, rng)


def _scheduled(items: list[Item], rng: np.random.Generator) -> list[_Event]:
    """Bodies and turns in the order in which they come; a turn comes last."""
    events: list[_Event] = []
    for item in items:
        placed = np.sort(rng.uniform(0, 0.9, len(item.bodies)))
        if len(item.bodies) == 1 and rng.random() < 0.3:
            placed[0] = 0.02 * rng.random()  # right at the beginning: what is asked for is as far back as it can be
        events += [_Event(float(at), body=body) for at, body in zip(placed, item.bodies, strict=True)]
        last = float(placed[-1])
        for turn in item.turns:
            chance = rng.random()
            if chance < AT_END:
                at = 1 + float(rng.random())
            else:
                at = last + 1e-9 if chance < AT_END + AT_ONCE else float(rng.uniform(last, 1)) + 1e-9
            events.append(_Event(at, question=turn.question, answer=turn.answer))
    events.sort(key=lambda event: event.at)
    if events[-1].body is not None:
        turn_at = max(i for i, event in enumerate(events) if event.body is None)
        events.append(replace(events.pop(turn_at), at=2.0))
    return events


def _plain(reader: Reader, events: list[_Event], rng: np.random.Generator) -> list[list[Ids]]:
    """Token ids of every event."""
    before, between = _SEPARATORS[int(rng.integers(len(_SEPARATORS)))]
    texts = []
    for event in events:
        if event.body is not None:
            texts.append(f"\n\n{event.body}\n\n" if len(event.body) > 60 else f" {event.body} ")
        elif event.question:
            texts.append(f"{before}{event.question}{between}{event.answer}\n\n")
        else:
            texts.append(f"\n\n{event.answer}\n\n")
    return [[_ids(reader, text)] for text in texts]


def _chat(reader: Reader, events: list[_Event], rng: np.random.Generator) -> list[list[Ids]]:
    """Token ids of every event, with what opens and closes messages around it; filler goes into the user's."""
    opening, between, closing = chat_frame(reader.tokenizer, pick(rng, _INSTRUCTIONS))
    pieces: list[list[Ids]] = []
    asked = max((i for i, event in enumerate(events) if event.body is None), default=-1)
    for i, event in enumerate(events):
        made: list[Ids] = [np.array(opening, dtype=np.int64)] if i == 0 else []
        if event.body is not None:
            made.append(_ids(reader, f"\n\n{event.body}\n\n" if len(event.body) > 60 else f" {event.body} "))
        else:
            made.append(_ids(reader, f"\n\n{event.question}"))
            made.append(np.array(between, dtype=np.int64))
            made.append(_ids(reader, event.answer))
            made.append(np.array(closing[:1] if i == asked else closing, dtype=np.int64))
        pieces.append(made)
    return pieces


def _filled(reader: Reader, rng: np.random.Generator, events: list[_Event], fixed: list[list[Ids]], room: int) -> Ids:
    """The events with `room` tokens of one running text between them, most where most time passes."""
    times = np.array([0.0, *(min(event.at, 1.0) for event in events)])
    gaps = np.diff(times) + 1e-9
    sizes = np.floor(gaps / gaps.sum() * room).astype(int)
    sizes[int(gaps.argmax())] += room - int(sizes.sum())
    text = reader.running(rng, room) if room else np.zeros(0, dtype=np.int64)
    out: list[Ids] = []
    at = 0
    for i, (size, pieces) in enumerate(zip(sizes, fixed, strict=True)):
        # What opens a chat comes before all text.
        opens = pieces[:1] if i == 0 and len(pieces) > 1 else []
        out += [*opens, text[at : at + size], *pieces[len(opens) :]]
        at += size
    return np.concatenate(out)


def _ids(reader: Reader, text: str) -> Ids:
    return np.array(encode(reader.tokenizer, text), dtype=np.int64)
