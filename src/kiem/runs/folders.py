"""Which folder a new run gets, and whether it may have it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kiem import runtime
from kiem.config.presets import DEFAULT_DEPTH, default_model
from kiem.config.read import config_dict, read_config
from kiem.config.run import RunConfig, Source
from kiem.errors import ConfigError, StorageError
from kiem.format import shell_word
from kiem.runs.resume import LENGTH, flat
from kiem.runs.run import Run

MOST_NAME_CHARACTERS = 80
# What follows from the length of a run, and so is derived anew for a fork of another length.
FROM_LENGTH = ("warmup_tokens", "cooldown_tokens", "eval_every", "eval_tokens", "sample_every", "save_every")


def default(target: Any, config: RunConfig) -> Path:
    """runs/NAME: the names of the texts, and of the configuration if one was given."""
    names = [_name(source.path) for source in config.data.sources]
    text = "+".join(names[:3]) + (f"+{len(names) - 3}" if len(names) > 3 else "")
    if isinstance(target, str | Path):
        text += f"-{Path(target).stem}"
    return Path("runs") / (text[:MOST_NAME_CHARACTERS] or "run")


def _name(path: str) -> str:
    """A short name of a source."""
    if path == "-":
        return "stdin"
    if path.startswith("hf:"):
        path = path.removeprefix("hf:").partition(":")[0]
    name = Path(path).name.partition(".")[0] or Path(path).name or "text"
    if os.path.basename(os.path.dirname(path)) == "stdin":  # where the cache keeps what came from there
        name = "stdin"
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "text"


def holds(run: Run, wanted: RunConfig, any_length: bool = False) -> bool:
    """Whether the folder holds the very run that is wanted, so that it can be resumed; False if it is free.

    `any_length`: model and length follow from a time, and are not compared. Raises ConfigError for another run, for
    other files, and for a place where no folder can be, StorageError for one that cannot be written.
    """
    if run.exists:
        if other := _differences(run, wanted, any_length):
            raise ConfigError(
                f"{run.folder}: the folder holds another run ({', '.join(other)} differ): resume that one with "
                f"`kiem train {shell_word(run.folder)}`, or choose another folder with --out"
            )
        return True
    if os.path.lexists(run.folder) and not os.path.isdir(run.folder):
        raise ConfigError(f"{run.folder}: is a file, not a run folder: choose another with --out")
    if not run.is_empty:
        raise ConfigError(f"{run.folder}: the folder exists and holds files: choose another with --out")
    _check_place(run.folder)
    return False


def _differences(run: Run, wanted: RunConfig, any_length: bool) -> list[str]:
    """The keys that are given and have another value in the run."""
    config = run.written_config()
    have, given = (flat(of.model_dump()) for of in (config, wanted))
    given = {key: value for key, value in given.items() if value is not None and key != "depth"}
    other = [key for key, value in given.items() if have.get(key) != value and key != LENGTH]
    if LENGTH in given and not 0 <= given[LENGTH] - config.train.tokens < config.train.batch_tokens:
        other.append(LENGTH)
    depth = wanted.depth or (None if any_length or wanted.model is not None else DEFAULT_DEPTH)
    if depth is not None and config.model is not None and config.model != default_model(depth, config.model.vocab_size):
        other.append("depth")
    return other


def _check_place(folder: Path) -> None:
    place = next((place for place in [folder, *folder.absolute().parents] if os.path.exists(place)), None)
    if place is None or not os.path.isdir(place):
        raise ConfigError(f"{folder}: {place} is not a folder: choose another place with --out")
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise StorageError(f"{folder}: the name is too long for a file system: choose another with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: {place} cannot be written: choose another place with --out")


def forked(run: Run, new: Run, overrides: Sequence[str], options: Mapping[str, Any]) -> tuple[RunConfig, bool]:
    """The configuration of a fork of `run` in the folder of `new`, and whether it is of the same text.

    It keeps the tokenizer, which the weights belong to. What follows from the length is derived anew with a new length.
    """
    base = config_dict(run.config)
    before = read_config(base)
    changed = with_whole_paths(read_config(base, overrides, options))
    if changed.data.tokenizer != before.data.tokenizer:
        raise ConfigError(
            f"--fork {new.folder}: a fork keeps the tokenizer of {run.folder}, which its weights need: leave "
            "data.tokenizer out, or start a new run without --fork"
        )
    same_text = changed.data == before.data
    if changed.train.tokens != before.train.tokens:
        for name in FROM_LENGTH:
            base["train"].pop(name, None)
    base["data"]["tokenizer"] = os.path.abspath(new.folder / "tokenizer")
    base["data"].pop("tokenizer_vocab_size", None)
    return with_whole_paths(read_config(base, overrides, options)), same_text


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Paths from the root, so that a run resumes from any working folder; standard input as a file of the cache."""

    def whole(path: str) -> str:
        if path == "-":
            from kiem.data.sources import spool_stdin

            return str(spool_stdin(runtime.cache_dir()))
        return path if path == "python" or path.startswith("hf:") else os.path.abspath(os.path.expanduser(path))

    def all_whole(sources: list[Source] | None) -> list[Source] | None:
        return sources and [source.model_copy(update={"path": whole(source.path)}) for source in sources]

    data = config.data
    tokenizer = data.tokenizer if data.tokenizer in ("bpe", "bytes", "chars") else whole(data.tokenizer)
    paths = {"sources": all_whole(data.sources), "validation": all_whole(data.validation), "tokenizer": tokenizer}
    return config.model_copy(update={"data": data.model_copy(update=paths)})
