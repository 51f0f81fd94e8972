"""Imports point one way: every import in the package, lazy and TYPE_CHECKING ones too, is an allowed arrow."""

import ast
import subprocess
import sys
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).parent
EVERYONE = {"config", "errors"}
ARROWS = {
    "__init__": {"attachment", "dms", "finding", "joining", "models", "retrofit", "swiftkv"},
    "attention": set(),
    "dms": {"adapter_file"},
    "kv": {"attention"},
    "support": set(),
    "vdb": set(),
    "swiftkv": {"adapter_file"},
    "adapter_file": set(),
    "finding": {"adapter_file", "dms", "support", "swiftkv"},
    "seams": {"attention", "dms", "kv", "support", "swiftkv"},
    "chunks": set(),
    "modes": {"dms", "kv", "support", "swiftkv"},
    "attachment": {"attention", "chunks", "dms", "kv", "modes", "seams", "support", "swiftkv"},
    "joining": {"adapter_file", "attachment", "chunks", "dms", "finding", "seams", "support", "swiftkv"},
    "models": {"adapter_file", "dms", "finding", "joining", "support", "swiftkv"},
    "chat": {"attachment"},
    "retrofit": {"adapter_file", "attachment", "dms", "joining", "plots", "support", "swiftkv"},
    "plots": {"retrofit"},
    "demo": {"attachment", "chat", "joining", "plots"},
    "terminal": {"models"},
    "cli_retrofit": {"retrofit", "terminal"},
    "cli": {"chat", "cli_retrofit", "demo", "finding", "models", "plots", "retrofit", "swiftkv", "terminal", "vdb"},
    "errors": set(),
    "config": set(),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_new_arrow_between_rooms() -> None:
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "octavo" or len(parts) < 2:
                continue
            target = parts[1]
            known = target in ARROWS
            assert known or room == "cli", f"{path.name} imports unknown {name}"
            if known:
                assert target in ARROWS[room] | EVERYONE | {room}, f"{room} -> {target} ({path.name}: {name})"


def test_every_room_is_listed() -> None:
    rooms = {room_of(p) for p in ROOT.rglob("*.py")}
    assert rooms <= set(ARROWS)
    assert set(ARROWS) <= rooms


def test_attention_knows_tensors_only() -> None:
    for path in (ROOT / "attention").glob("*.py"):
        outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "octavo"}, f"{path.name} imports {outside}"


def test_import_is_cheap_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import octavo; took = time.perf_counter() - began;"
        "print(took, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    fields = [o.stdout.split() for o in out]
    assert min(float(f[0]) for f in fields) < 0.3
    assert all(f[1:] == ["False", "False"] for f in fields)


def test_vector_database_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, octavo.vdb; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False False"


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['octavo', '--help']\nimport octavo.cli\nprint('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_public_names_resolve() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert callable(octavo.attach), "the function, not a module of the same name"
    assert set(octavo.__all__) <= set(dir(octavo))


def test_errors_are_one_tree_and_all_are_drawn() -> None:
    import octavo.errors as errors

    classes = {n: c for n, c in vars(errors).items() if isinstance(c, type)}
    assert all(issubclass(c, errors.OctavoError) for c in classes.values())
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in classes)
