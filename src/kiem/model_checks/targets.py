"""What `kiem explain` and `kiem verify` run: a Python file, a function, a model, or a run on its next batch.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiem.errors import ConfigError, DataError
from kiem.inspect.program import Program, function, script

if TYPE_CHECKING:
    from torch import Tensor

    from kiem.config.run import RunConfig
    from kiem.data.loader import Batch
    from kiem.model.transformer import Transformer

KINDS = "a Python file, module:function, a model configuration, a preset, or the folder of a run"
PYTHON, CONFIG = {".py", ".pyw"}, {".json", ".jsonc", ".json5", ".yaml", ".yml", ".toml"}
MOST_TOKENS = 128  # of the random text that a model without a run is shown


@dataclass(kw_only=True)
class ModelProgram(Program):
    """One of Kiem's own models, forward and backward. `loss()` makes the loss of the same batch with the same dropout
    anew."""

    model: Transformer = field(repr=False)
    loss: Callable[[], Tensor] = field(repr=False)
    documents_apart: bool


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
            return script(path, arguments)
        _no_arguments(target, arguments)
        return _configured(target)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", target) and not target.partition(":")[0].endswith(".py"):
        return function(target, arguments)
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


# ---- a model


def _configured(target: str) -> Program:
    """The model of a configuration on B = 1 row of random tokens."""
    import torch

    from kiem.config.presets import resolve, tokenizer_vocab_size
    from kiem.config.read import read_config
    from kiem.data.loader import Batch

    wanted = read_config(target)
    config = resolve(wanted, (wanted.model and wanted.model.vocab_size) or tokenizer_vocab_size(wanted))
    T, generator = min(config.model.context_length, MOST_TOKENS), torch.Generator().manual_seed(config.seed)
    text_BT = torch.randint(config.model.vocab_size, (1, T + 1), generator=generator)
    batch = Batch(text_BT[:, :-1], text_BT[:, 1:], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int32), T)
    model = _model(config, target).initialize(config.seed, config.train.init)
    title = f"{target}, a batch of 1 x {T} random tokens"
    # A matrix of zeros passes no gradient on: nothing before it would be seen.
    if zero := [w for w in model.parameters() if w.ndim > 1 and not w.any()]:
        title += f", random numbers in {len(zero)} matrices that would start as zero"
        for w in zero:
            w.data.normal_(0.0, w.shape[1] ** -0.5, generator=generator)
    return _of_model(title, model, config, batch)


def _run_folder(path: Path) -> Program:
    """The model of a run's newest checkpoint (or of the checkpoint named) on the batch that it would train on next."""
    from kiem.data.loader import Loader
    from kiem.runs import checkpoint
    from kiem.runs.run import Run

    if not Run(path).exists and path.resolve().parent.name != "checkpoints":
        raise ConfigError(f"{path}: is a folder, but not that of a run: it has no config.yaml: give {KINDS}")
    run = Run.at(path)
    config = run.config
    model = _model(config, path)
    found = run.read(("model",))
    try:
        dataset = run.dataset()
    except DataError as error:
        raise DataError(f"{error}. Or give {run.config_file} to see the model on random tokens") from None
    checkpoint.restore(model.state_dict(), found.tensors["model"], found.path, "model")
    context, step = config.model.context_length, found.state["step"]
    loader = Loader(dataset, context, config.train.batch_tokens // context, config.seed)
    parts = loader.batch(step).micro(config.train.micro_batch_tokens // context)
    some = f", the first {len(parts[0].tokens_BT)} of its {loader.batch_size} rows" if len(parts) > 1 else ""
    return _of_model(f"{path}, {found.path.name} on the batch of step {step + 1}{some}", model, config, parts[0])


def _model(config: RunConfig, of: str | Path) -> Transformer:
    """As the run trains it, but not compiled, and in float32 unless bfloat16 is asked for by name: a check is as sharp
    as its data type, and should be the same on every machine. Raises ConfigError where there is no memory for it."""
    import torch

    from kiem.model.transformer import Transformer
    from kiem.planning.budget import require_room

    require_room(config.model, config.device, of, "and their gradients")
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    return Transformer(config.model, dtype, config.train.activation_checkpointing)


def _of_model(title: str, model: Transformer, config: RunConfig, batch: Batch) -> ModelProgram:
    import torch

    from kiem.runtime import seed_everything, select_device
    from kiem.training.objective import NextToken

    device = select_device(config.device)
    model, batch = model.to(device).train(), batch.to(device)

    def loss() -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_everything(config.seed)
            objective = NextToken(documents_apart=not config.data.cross_document_attention)
            return objective.loss(model, batch)[0] / batch.n_valid

    def start() -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        result = loss()
        result.backward()
        return {"model": model, "loss": result, "batch": batch}

    apart = not config.data.cross_document_attention
    return ModelProgram(title, start, model=model, loss=loss, documents_apart=apart)
