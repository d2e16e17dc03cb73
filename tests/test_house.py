"""The house rules that a machine can hold: who imports whom, how long a file is, how much a reader must read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "kiem"
FILES = sorted(SRC.rglob("*.py"))
# A package imports only itself and packages before it.
PACKAGES = [
    "errors",
    "format",
    "files",
    "inspect",
    "config",
    "runtime",
    "data",
    "model",
    "parallel",
    "optim",
    "runs",
    "training",
    "generation",
    "interop",
    "planning",
    "report",
    "model_checks",
    "api",
    "cli",
]
# What the inspector may know: it could be a package of its own.
INSPECT = {"errors", "format", "files", "inspect"}
READING_ORDER = [
    "cli/train.py",
    "api.py",
    "config/presets.py",
    "data/prepare.py",
    "data/loader.py",
    "model/transformer.py",
    "model/attention.py",
    "optim/groups.py",
    "training/step.py",
    "training/loop.py",
    "runs/run.py",
    "runs/checkpoint.py",
]


def names(files):
    return [str(f.relative_to(SRC)) for f in files]


def module_name(path):
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path):
    """Modules of Kiem imported anywhere in the file, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        wanted = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        found |= {name for name in wanted if name in MODULES and name != module_name(path)}
    return found


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_go_upwards(path):
    package = str(path.relative_to(SRC)).split("/")[0].removesuffix(".py")
    if package in ("__init__", "__main__"):
        return
    allowed = INSPECT if package == "inspect" else set(PACKAGES[: PACKAGES.index(package) + 1])
    wrong = sorted(name for name in imported(path) if name != "kiem" and name.split(".")[1] not in allowed)
    assert not wrong, f"{path.relative_to(SRC)} imports {wrong}"


def test_there_is_no_import_cycle():
    graph = {
        name: {found for found in imported(path) if MODULES[found].name != "__init__.py"}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert not graph, f"modules that import one another: {sorted(graph)}"


def test_no_package_has_the_name_of_a_public_function():
    import kiem

    packages = {path.name for path in SRC.iterdir() if path.is_dir()}
    assert not packages & set(kiem.__all__)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_has_one_subject_and_under_500_lines(path):
    assert len(path.read_text().splitlines()) < 500


def test_a_function_fits_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 70:
                long.append(f"{path.relative_to(SRC)}:{node.lineno} {node.name}")
    assert not long


def test_the_path_of_a_training_run_reads_in_twelve_files():
    lines = {name: len((SRC / name).read_text().splitlines()) for name in READING_ORDER}
    print(f"from the command to the checkpoint: {len(lines)} files, {sum(lines.values())} lines: {lines}")
    assert len(lines) <= 12
    assert sum(lines.values()) < 3200
    told = (SRC.parents[1] / "docs" / "architecture.md").read_text()
    assert [told.index(f"`{name}`") for name in READING_ORDER] == sorted(
        told.index(f"`{name}`") for name in READING_ORDER
    )


def test_the_house_in_numbers():
    """Printed with -s: what a reader meets. The inspector is the largest product, and no package of the trainer is."""
    lines = {}
    for path in FILES:
        package = str(path.relative_to(SRC)).split("/")[0].removesuffix(".py")
        lines[package] = lines.get(package, 0) + len(path.read_text().splitlines())
    total = sum(lines.values())
    shares = {name: round(n / total, 3) for name, n in sorted(lines.items(), key=lambda item: -item[1])}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(SRC)}:{node.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    print(f"{total} lines in {len(FILES)} files; shares {shares}; longest function {max(functions)}")
    assert max(share for name, share in shares.items() if name != "inspect") < 0.15


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


def test_there_is_one_atomic_write():
    """files.publish: to the disk, then renamed. What else renames moves whole folders."""
    replacing = [str(p.relative_to(SRC)) for p in FILES if "os.replace(" in p.read_text()]
    renaming = [str(p.relative_to(SRC)) for p in FILES if "os.rename(" in p.read_text()]
    assert replacing == ["files.py"]
    assert renaming == ["runs/checkpoint.py", "runs/resume.py"]
    assert not [p for p in FILES if "NamedTemporaryFile" in p.read_text() or "mkstemp" in p.read_text()]
