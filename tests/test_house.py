"""The house rules that a machine can hold: who imports whom, how long a file is, how much a reader must read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "kiem"
FILES = sorted(SRC.rglob("*.py"))
# A room imports only itself and rooms before it.
ROOMS = [
    "errors",
    "format",
    "config",
    "runtime",
    "plan",
    "data",
    "ops",
    "model",
    "optim",
    "train",
    "infer",
    "interop",
    "grad",
    "report",
    "trace",
    "api",
    "console",
    "cli_inspect",
    "cli",
]
# Measures with real training steps, so it stands with the verbs (docs/architecture.md).
MEASURES = {"plan/predict.py", "plan/measure.py", "plan/budget.py"}
READING_ORDER = [
    "cli.py",
    "api.py",
    "config/presets.py",
    "data/prepare.py",
    "data/loader.py",
    "model/transformer.py",
    "model/attention.py",
    "ops/cross_entropy.py",
    "optim/muon.py",
    "train/step.py",
    "train/loop.py",
    "train/checkpoint.py",
]


def names(files):
    return [str(f.relative_to(SRC)) for f in files]


def imported_rooms(path):
    """Rooms of Kiem imported anywhere in the file, except for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for s in i.body
        for n in ast.walk(s)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{a.name}" if node.module == "kiem" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        found |= {m.split(".")[1] for m in modules if m.startswith("kiem.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_go_upwards(path):
    relative = str(path.relative_to(SRC))
    room = relative.split("/")[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    allowed = set(ROOMS[: ROOMS.index("train" if relative in MEASURES else room) + 1]) | {room, "__version__"}
    assert imported_rooms(path) <= allowed, f"{relative} imports {sorted(imported_rooms(path) - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_has_one_subject_and_under_400_lines(path):
    assert len(path.read_text().splitlines()) < 400


def test_a_function_fits_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 70:
                long.append(f"{path.relative_to(SRC)}:{node.lineno} {node.name}")
    assert not long


def test_the_path_of_a_training_run_reads_in_twelve_files():
    assert len(READING_ORDER) <= 12
    assert sum(len((SRC / name).read_text().splitlines()) for name in READING_ORDER) < 3200
    told = (SRC.parents[1] / "docs" / "architecture.md").read_text()
    assert [told.index(f"`{name}`") for name in READING_ORDER] == sorted(
        told.index(f"`{name}`") for name in READING_ORDER
    )


def test_importing_loads_nothing_heavy():
    code = "import sys, kiem; print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_runtime_reads_the_environment():
    readers = [str(p.relative_to(SRC)) for p in FILES if "os.environ" in p.read_text() or "os.getenv" in p.read_text()]
    assert readers == ["runtime.py"]


def test_no_dangerous_call():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.load"}, (
                    f"{path}: {name}"
                )
                assert not any(k.arg == "shell" for k in node.keywords), path
