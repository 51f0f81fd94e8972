"""Beginnings of texts of many kinds for a model to go on from, made from seeds: prose, code, data, lists, languages.

What a model writes without a question is text as it stood in its training, which answers to prompts hardly cover; and
where a tokenizer has no chat template it is all there is.
"""

from collections.abc import Callable

import numpy as np

from octavo.errors import ConfigError
from octavo.retrofit.prompts import Draw

_NAMES = "Anna|Mr Whitfield|The old captain|Li Wei|Doctor Okafor|Two sisters|The apprentice|Pavel|Nobody".split("|")
_HEADS = "Introduction|Background|Method|Results|Installation|Usage|Frequently asked questions|History|Recipe".split(
    "|"
)
_ABROAD = (
    "Es war einmal|Am nächsten Morgen ging sie|Die Stadt liegt am Ufer|Il était une fois|Le lendemain matin, il|"
    "La ville se trouve|Había una vez|A la mañana siguiente|C'era una volta|Era uma vez|Давным-давно|В городе было|"
    "昔々、|今日は天気が|从前有一座|在城市的中心|옛날 옛적에|كان يا ما كان"
).split("|")
_CODE = (
    'def {name}({one}, {two}):\n    """|class {Name}:\n    def __init__(self, {one}|import os\nimport sys\n\n\n|'
    "function {name}({one}, {two}) {{\n|#include <stdio.h>\n\nint {name}(int {one}) {{\n|public class {Name} {{\n|"
    "SELECT {one}, {two}\nFROM {name}\nWHERE |#!/bin/bash\n# {name}\nset -e\n|fn {name}({one}: &str) -> |"
    'package main\n\nimport "fmt"\n\nfunc {name}(|<html>\n<head>\n<title>{name}</title>\n|/* {name} */\n.{one} {{\n'
).split("|")
_IDENTIFIERS = "count|total|parse_line|find_user|orders|value|index|read_config|price|node|left|result|names".split("|")


def _code(d: Draw) -> str:
    name = d.one(_IDENTIFIERS)
    return d.one(_CODE).format(name=name, Name=name.title().replace("_", ""), one=d.one(_IDENTIFIERS), two="other")


def _data(d: Draw) -> str:
    forms = (
        f'{{\n  "title": "{d.topic()}",\n  "',
        f"| name | {d.topic()} | price |\n| --- | --- | --- |\n| ",
        f"id,name,amount\n1,{d.topic()},{d.number(10, 999)}\n2,",
        f"name: {d.topic()}\nversion: {d.number(1, 9)}\n",
        f"20{d.number(10, 30)}-0{d.number(1, 9)}-{d.number(10, 28)} 0{d.number(0, 9)}:{d.number(10, 59)} INFO ",
    )
    return d.one(forms)


_FORMS: tuple[Callable[[Draw], str], ...] = (
    lambda d: f"# {d.topic().capitalize()}\n\n## {d.one(_HEADS)}\n\n",
    lambda d: f"An introduction to {d.topic()}\n\n",
    lambda d: f"The history of {d.topic()} begins",
    lambda d: f"In {d.number(1700, 2020)}, {d.topic()}",
    lambda d: f"Chapter {d.number(1, 30)}\n\n{d.one(_NAMES)}",
    lambda d: f'"{d.one(("What", "Why", "Come", "Listen", "No"))}',
    lambda d: f"{d.one(_NAMES)} had lived {d.place()} for {d.number(2, 60)} years and",
    lambda d: f"Dear {d.one(_NAMES)},\n\n",
    lambda d: f"How to make {d.topic()} at home\n\nIngredients:\n-",
    lambda d: f"{d.number(3, 10)} reasons why {d.person()} should know about {d.topic()}:\n\n1.",
    lambda d: f"Q: What is {d.topic()}?\nA:",
    lambda d: f"{d.one(_NAMES)}: Have you heard about {d.topic()}?\n{d.one(_NAMES)}:",
    lambda d: f"Abstract. We study {d.topic()}",
    lambda d: f"Problem {d.number(1, 40)}. {d.one(_NAMES)} buys {d.number(3, 90)}",
    lambda d: d.one(_ABROAD),
    _code,
    _code,
    _code,
    _code,
    _data,
    _data,
)


def made_openings(count: int, seed: int = 0) -> list[str]:
    """`count` beginnings of texts, none of them empty. Raises ConfigError."""
    if count < 1:
        raise ConfigError(f"the number of openings must be at least 1, not {count}")
    draw = Draw(np.random.default_rng(seed))
    return [_FORMS[int(draw.rng.integers(len(_FORMS)))](draw) for _ in range(count)]
