"""Every module, function, class and file that docs/tour.md names in backticks is there."""

import ast
import re
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
REPOSITORY = Path(__file__).parents[1]
NAMED = re.findall(r"`([^`\n]+)`", (REPOSITORY / "docs" / "tour.md").read_text())
FILE = re.compile(r"[\w/]*\w\.(py|c|h|md)")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def attributes(node: ast.ClassDef) -> set[str]:
    """Methods, annotated fields and what methods assign to `self`."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef):
            found.add(each.name)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            found.add(each.target.id)
        elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            found.add(each.attr)
    return found


def names() -> set[str]:
    """`module.name` with every longer path to the module, and `Class.attribute`, of all of the package."""
    found = set()
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        tops = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                tops.add(node.name)
            elif isinstance(node, ast.Assign):
                tops |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{attribute}" for attribute in attributes(node)}
        found |= {".".join((*parts[i:], top)) for i in range(len(parts)) for top in tops}
    return found


@pytest.mark.parametrize("named", sorted({name for name in NAMED if FILE.fullmatch(name)}))
def test_every_named_file_exists(named: str) -> None:
    places = [REPOSITORY / named, *ROOT.rglob(Path(named).name)]
    assert any(place.is_file() for place in places)


def test_every_named_function_and_class_exists() -> None:
    dotted = {name for name in NAMED if DOTTED.fullmatch(name) and not FILE.fullmatch(name)}
    assert len(dotted) > 40
    assert not sorted(dotted - names())


def test_the_tour_has_at_most_ten_steps() -> None:
    first = (REPOSITORY / "docs" / "tour.md").read_text().split("\n## ")[0]
    steps = re.findall(r"^(\d+)\. ", first, re.M)
    assert steps == [str(i) for i in range(1, len(steps) + 1)]
    assert len(steps) <= 10
