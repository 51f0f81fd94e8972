"""Imports point one way: every import in the package, lazy and TYPE_CHECKING ones too, is an allowed arrow."""

import ast
import subprocess
import sys
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).parent
FLAT = {"config", "errors", "adapter_file"}  # all rooms may import these
ARROWS = {  # a room and those that it imports, the lowest first: an arrow points to a room above it in this list
    "attention": set(),
    "vdb": set(),
    "dms": set(),
    "swiftkv": set(),
    "kv": {"attention"},
    "attachment": {"attention", "dms", "kv", "swiftkv"},
    "models": {"attachment", "dms", "swiftkv"},
    "retrofit": {"attachment", "dms", "swiftkv"},
    "reuse": {"kv", "vdb"},
    "engine": {"attachment", "kv", "models"},
    "__init__": {"attachment", "dms", "engine", "models", "retrofit", "reuse", "swiftkv"},
    "bench": {"attachment", "reuse", "vdb"},
    "cli": {"attachment", "bench", "models", "retrofit", "vdb"},
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


def arrows() -> dict[str, set[str]]:
    """Which rooms each room really imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        targets = {name.split(".")[1] for name in imports(path) if name.startswith("octavo.")}
        found.setdefault(room, set()).update(targets - {room} - {"__version__"})
    return found


def test_imports_point_one_way_and_are_all_listed() -> None:
    found = arrows()
    print("\n".join(f"{room} -> {', '.join(sorted(to)) or '-'}" for room, to in found.items()))
    rooms = set(ARROWS) | FLAT
    assert set(found) == rooms, "a room that is not listed, or a listed one that is gone"
    assert all(found[room] <= FLAT for room in FLAT)
    assert {room: to - FLAT for room, to in found.items() if room in ARROWS} == ARROWS
    below: set[str] = set()
    for room, to in ARROWS.items():
        assert to <= below, f"{room} imports a room that stands above it"
        below.add(room)


def test_rooms_and_arrows_are_few() -> None:
    found = arrows()
    count = sum(map(len, found.values()))
    print(f"{len(found)} rooms, {count} arrows")
    assert len(found) <= 16
    assert count <= 55


def test_only_three_modules_lie_beside_the_rooms() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *FLAT}


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function runs on a GPU: kernels may be longer, since they cannot be cut without a cost."""
    return any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)


def test_files_and_functions_are_short() -> None:
    long = []
    for path in ROOT.rglob("*.py"):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (lines := len(text.splitlines())) > 350:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert not long, "files of more than 350 lines or functions of more than 60; split them by topic"


def test_attention_knows_tensors_only() -> None:
    for path in (ROOT / "attention").rglob("*.py"):
        outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        allowed = {"torch", "octavo", "triton"} if path.parent.name == "cuda" else {"torch", "octavo"}
        assert outside <= allowed, f"{path.name} imports {outside}"


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
    code = "import sys; sys.argv = ['octavo', '--help']\nimport octavo.cli.main\nprint('torch' in sys.modules)"
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
