"""What `kiem explain` and `kiem verify` run: a Python file, a function, a model, or a run on its next batch.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kiem.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kiem.config.run import RunConfig
    from kiem.data.loader import Batch
    from kiem.model.transformer import Transformer

KINDS = "a Python file, module:function, a model configuration, a preset, or the folder of a run"
PYTHON, CONFIG = {".py", ".pyw"}, {".json", ".jsonc", ".json5", ".yaml", ".yml", ".toml"}
MOST_TOKENS = 128  # of the random text that a model without a run is shown


@dataclass
class Program:
    """Something to run once under a recorder. title: for people. library: path prefixes of code that is not the user's.
    model, loss, documents_apart: of Kiem's own models; `loss()` makes the loss of the same batch with the same dropout
    anew. namespace: the names of the program after `run` (also after one that failed)."""

    title: str
    start: Callable[[], dict[str, Any]] = field(repr=False)
    library: tuple[str, ...] = ()
    model: nn.Module | None = field(default=None, repr=False)
    loss: Callable[[], Tensor] | None = field(default=None, repr=False)
    documents_apart: bool = True
    namespace: dict[str, Any] = field(default_factory=dict, repr=False)

    def run(self) -> None:
        """Run it: a model forward and backward. What the program raises passes through."""
        try:
            self.namespace = self.start()
        except BaseException as error:
            self.namespace = _names_at_failure(error, self.title)
            raise


def load_program(target: str, arguments: Sequence[str] = ()) -> Program:
    """The program that `target` names: a Python file (with its arguments), `module:function` (with text arguments), a
    model configuration or preset (on random tokens), or a run folder (on its next batch). Raises ConfigError for a
    target that is none of these, CheckpointError and DataError for a run that has lost its checkpoint or its text."""
    target, arguments = str(target), list(arguments)
    path = Path(target).expanduser()
    if os.path.isdir(path):
        _no_arguments(target, arguments)
        return _run_folder(path)
    if os.path.exists(path):
        if _is_script(path):
            return _script(path, arguments)
        _no_arguments(target, arguments)
        return _configured(target)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", target) and not target.partition(":")[0].endswith(".py"):
        return _function(*target.split(":"), arguments)
    return _preset(target, arguments)


def _preset(target: str, arguments: list[str]) -> Program:
    from kiem.config.presets import PRESETS

    if target in PRESETS:
        _no_arguments(target, arguments)
        return _configured(target)
    file, colon, name = target.partition(":")
    if colon and file.endswith(".py"):
        module = file.removesuffix(".py").replace(os.sep, ".")
        raise ConfigError(f"{target}: a function is named by its module, not its file: write {module}:{name or 'NAME'}")
    parent = Path(target).parent
    near = [str(parent / entry) for entry in os.listdir(parent)] if os.path.isdir(parent) else []
    close = difflib.get_close_matches(target, [*PRESETS, *near], n=1)
    hint = f" (did you mean {close[0]}?)" if close else f" (presets: {', '.join(PRESETS)})"
    raise ConfigError(f"{target}: there is no such file in {Path.cwd()}, and no such preset: give {KINDS}{hint}")


def _no_arguments(target: str, arguments: list[str]) -> None:
    if arguments:
        given = " ".join(arguments)
        raise ConfigError(f"{target}: takes no arguments, given: {given}: a Python file and module:function take some")


# ---- a Python file


def _is_script(path: Path) -> bool:
    """Whether a file is a program, not a configuration. ConfigError if it is neither."""
    from kiem.config.formats import read_mapping

    suffix = path.suffix.lower()
    if suffix == ".ipynb":
        raise ConfigError(
            f"{path}: is a notebook: make it a script by `jupyter nbconvert --to script {path}`, or "
            "use `with kiem.record()` in it"
        )
    if suffix in CONFIG:
        return False
    try:
        tree: ast.Module | None = ast.parse(path.read_bytes())
        problem = ""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        tree, problem = None, f"{path}:{error.lineno}: is not valid Python: {error.msg}" if error.lineno else str(error)
    except (ValueError, RecursionError) as error:
        tree, problem = None, f"{path}: is not valid Python: {error}"
    if tree is not None and suffix in PYTHON:
        return not _only_a_dict(tree)
    try:
        read_mapping(path)
        return False
    except ConfigError as error:
        if tree is not None:
            return True
        if suffix in PYTHON:
            raise ConfigError(problem) from None
        raise ConfigError(
            f"{path}: is neither a Python program nor a configuration: give {KINDS}\n"
            f"  as Python: {problem}\n  as a configuration: {error}"
        ) from None


def _only_a_dict(tree: ast.Module) -> bool:
    """A configuration that is written as Python: `NAME = {...}` and nothing else."""
    return len(tree.body) == 1 and isinstance(getattr(tree.body[0], "value", None), ast.Dict)


def _script(path: Path, arguments: list[str]) -> Program:
    file, place = str(path), _Place(str(path.resolve().parent), [str(path), *arguments])

    def start() -> dict[str, Any]:
        with place.entered():
            try:
                return runpy.run_path(file, run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
                return _names_at_failure(end, file)

    return Program(file, start)


def _names_at_failure(error: BaseException, file: str) -> dict[str, Any]:
    """The globals of the file that an exception left."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == file and frame.f_code.co_name == "<module>":
            return dict(frame.f_globals)
    return {}


@dataclass
class _Place:
    """Where a program runs: its folder is on sys.path, sys.argv is its own. Afterwards the process is as before, and
    modules from the folder are forgotten (another program may have others of the same name)."""

    folder: str
    argv: list[str]
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def entered(self) -> Iterator[None]:
        path, before, argv, main = sys.path, list(sys.path), sys.argv, sys.modules.get("__main__")
        known, folder = set(sys.modules), os.getcwd()
        sys.path.insert(0, self.folder)
        sys.argv = list(self.argv)
        sys.modules.update(self.modules)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path, sys.argv = path, argv
            path[:] = before
            with suppress(OSError):
                os.chdir(folder)
            for name in [name for name in sys.modules if name not in known and self._own(sys.modules[name])]:
                self.modules[name] = sys.modules.pop(name)
            if main is not None:
                sys.modules["__main__"] = main

    def _own(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        libraries = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
        others = [os.path.realpath(place) for place in (*libraries, Path(__file__).parents[1])]
        return file is not None and _below(file, self.folder) and not any(_below(file, other) for other in others)


def _below(file: str, folder: str) -> bool:
    return os.path.realpath(file).startswith(os.path.join(os.path.realpath(folder), ""))


# ---- a function


def _function(module_name: str, name: str, arguments: list[str]) -> Program:
    target, place = f"{module_name}:{name}", _Place(os.getcwd(), sys.argv)
    with place.entered():
        module = _imported(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        close = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {module_name}:{close[0]}?" if close else f"its functions: {', '.join(own) or 'none'}"
        what = "is no function" if hasattr(module, name) else "does not exist"
        raise ConfigError(f"{target}: {name} {what} in {getattr(module, '__file__', None) or module_name}: {hint}")
    with suppress(ValueError):  # no signature to look at
        signature = inspect.signature(function)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{target}: {name}{signature} cannot be called with {len(arguments)} arguments: {error}. "
                f"Give them after the target, or name a function that needs none"
            ) from None

    def start() -> dict[str, Any]:
        with place.entered():
            result = function(*arguments)
            if _waits_for_backward(result):
                result.backward()
        return {**getattr(function, "__globals__", {}), "result": result}

    return Program(target, start)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{name}: there is no module {error.name} in {os.getcwd()} or among the installed "
                "packages: run from the folder it is in, or install it"
            ) from None
        raise _not_importable(name, error) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(name, error) from error


def _not_importable(name: str, error: BaseException) -> ConfigError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    inside = [
        f
        for f in frames
        if not _below(f.filename, str(Path(__file__).parent))
        and not _below(f.filename, os.path.dirname(importlib.__file__))
    ]
    at = f" at {inside[-1].filename}:{inside[-1].lineno}" if inside else ""
    kind = "it ends the process (SystemExit)" if isinstance(error, SystemExit) else type(error).__name__
    return ConfigError(f"{name}: the module does not import: {kind}: {error}{at}: mend it, or name another module")


def _waits_for_backward(result: Any) -> bool:
    """Whether it is a scalar whose graph no backward pass has been through."""
    import torch

    if not isinstance(result, torch.Tensor) or result.numel() != 1 or not result.requires_grad:
        return False
    if result.grad_fn is None:
        return result.grad is None
    seen, waiting = {result.grad_fn}, [result.grad_fn]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if (leaf is not None and leaf.grad is not None) or _freed(node):
            return False
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        waiting += new
    return True


def _freed(node: Any) -> bool:
    """Whether a backward pass has freed what an autograd node had saved."""
    try:
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                getattr(node, name, None)
    except RuntimeError as error:
        return "freed" in str(error)
    return False


# ---- a model


def _configured(target: str) -> Program:
    """The model of a configuration on B = 1 row of random tokens."""
    import torch

    from kiem.config.presets import resolve, tokenizer_vocab_size
    from kiem.config.read import read_config
    from kiem.data.loader import Batch

    wanted = read_config(target)
    config = resolve(wanted, wanted.model.vocab_size if wanted.model else tokenizer_vocab_size(wanted))
    T, generator = min(config.model.context_length, MOST_TOKENS), torch.Generator().manual_seed(config.seed)
    text_BT = torch.randint(config.model.vocab_size, (1, T + 1), generator=generator)
    batch = Batch(text_BT[:, :-1], text_BT[:, 1:], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int32), T)
    model = _model(config).initialise(config.seed, config.train.init)
    title = f"{target}, a batch of 1 x {T} random tokens"
    # A matrix of zeros passes no gradient on: nothing before it would be seen.
    if zero := [w for w in model.parameters() if w.ndim > 1 and not w.any()]:
        title += f", random numbers in {len(zero)} matrices that would start as zero"
        for w in zero:
            w.data.normal_(0.0, w.shape[1] ** -0.5, generator=generator)
    return _of_model(title, model, config, batch)


def _run_folder(path: Path) -> Program:
    """The model of a run's newest checkpoint (or of the checkpoint named) on the batch that it would train on next."""
    from kiem.config.presets import resolve
    from kiem.config.read import read_config
    from kiem.data.loader import Loader
    from kiem.runs import checkpoint

    one = path.resolve().parent.name == "checkpoints"
    run = path.resolve().parent.parent if one else path
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{path}: is a folder, but not that of a run: it has no config.yaml: give {KINDS}")
    config = read_config(run / "config.yaml")
    if one:
        found, (tensors, state) = path, checkpoint.load(path, ("model",))
    else:
        found, tensors, state, problems = checkpoint.load_latest(run, ("model",))
        if found is None:
            raise CheckpointError(
                "\n".join([f"{run}: the run has no whole checkpoint: train it, or name another", *problems])
            )
    dataset = _dataset(run, config, state)
    config = resolve(config, dataset.tokenizer.vocab_size)
    model = _model(config)
    checkpoint.restore(model.state_dict(), tensors["model"], found, "model")
    context, step = config.model.context_length, state["step"]
    loader = Loader(dataset, context, config.train.batch_tokens // context, config.seed)
    parts = loader.batch(step).micro(config.train.micro_batch_tokens // context)
    some = f", the first {len(parts[0].tokens_BT)} of its {loader.batch_size} rows" if len(parts) > 1 else ""
    return _of_model(f"{path}, {found.name} on the batch of step {step + 1}{some}", model, config, parts[0])


def _dataset(run: Path, config: RunConfig, state: dict[str, Any]) -> Any:
    from kiem import runtime
    from kiem.config.presets import tokenizer_vocab_size
    from kiem.data.prepare import prepare

    try:
        dataset = prepare(config.data, tokenizer_vocab_size(config), config.seed, runtime.cache_dir())
    except DataError as error:
        raise DataError(
            f"{run}: the text of its next batch cannot be read: {error} Bring the text back, or give "
            f"{run / 'config.yaml'} to see the model on random tokens."
        ) from None
    if state["data"] != dataset.fingerprint:
        raise DataError(
            f"{run}: its text or tokenizer has changed since it was trained (fingerprint "
            f"{state['data'][:12]}, now {dataset.fingerprint[:12]}): bring the text back, or give "
            f"{run / 'config.yaml'} to see the model on random tokens."
        )
    return dataset


def _model(config: RunConfig) -> Transformer:
    """As the run trains it, but not compiled, and in float32 unless bfloat16 is asked for by name: a check is as sharp
    as its data type, and should be the same on every machine."""
    import torch

    from kiem.model.transformer import Transformer

    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    return Transformer(config.model, dtype, config.train.activation_checkpointing)


def _of_model(title: str, model: Transformer, config: RunConfig, batch: Batch) -> Program:
    import torch

    from kiem.runtime import seed_everything, select_device
    from kiem.training.step import loss_sum

    device = select_device(config.device)
    model, batch = model.to(device).train(), batch.to(device)

    def loss() -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_everything(config.seed)
            return loss_sum(model, batch, not config.data.cross_document_attention) / batch.n_valid

    def start() -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        result = loss()
        result.backward()
        return {"model": model, "loss": result, "batch": batch}

    apart = not config.data.cross_document_attention
    return Program(title, start, model=model, loss=loss, documents_apart=apart)
