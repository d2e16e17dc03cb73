"""A run folder: whoever needs one of its parts asks here.

    config.yaml plan.json metrics.jsonl samples.jsonl tokenizer/ checkpoints/step-00001000/ report.json report.html
    .lock       held by the process that writes the run; it ends with that process
    .tmp-*      an interrupted write: waste

A run exists from the moment when it has its config.yaml, which is the first thing that is written into its folder. What
it was trained with (config, tokenizer, text) is what its checkpoint says: that is protected by checksums.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kiem import runtime
from kiem.config.presets import resolve, tokenizer_vocab_size
from kiem.config.read import config_dict, config_text, read_config
from kiem.config.run import RunConfig
from kiem.errors import CheckpointError, ConfigError, DataError, KiemWarning
from kiem.files import LOCK, TEMPORARY, lock, read_json, storage_error, to_json, write_atomically
from kiem.format import shell_word

if TYPE_CHECKING:
    from kiem.data.shards import Dataset
    from kiem.data.tokenizer import Tokenizer
    from kiem.runs.checkpoint import Checkpoint

PrepareProgress = Callable[[int, int, int], None]  # documents, bytes, tokens
MOST_REPORT_BYTES = 256 << 20


class Run:
    """One run folder, and the checkpoint in it that was named, if one was."""

    def __init__(self, folder: str | Path, named: Path | None = None) -> None:
        self.folder, self.named = Path(folder), named

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """The run of a run folder or of a checkpoint folder in it. Raises CheckpointError if it is neither."""
        path = Path(path).expanduser()
        whole = Path(os.path.abspath(path))
        if whole.parent.name == "checkpoints" and os.path.isdir(whole):
            return cls(path.parent.parent if len(path.parts) > 2 else whole.parent.parent, path)
        run = cls(path)
        if not run.exists:
            what = "is not the folder of a run: it has no config.yaml" if os.path.isdir(path) else "does not exist"
            raise CheckpointError(f"{path} {what}: name the folder that `kiem train` wrote, or a checkpoint in it")
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.named or self.folder)!r})"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run, one without a checkpoint included."""
        if os.path.isfile(self.config_file):
            return True
        return os.path.isdir(self.folder / "checkpoints") and any((self.folder / "checkpoints").glob("step-*"))

    @property
    def is_empty(self) -> bool:
        """Whether the folder is missing, or holds nothing but what a start that was killed at once left."""
        if not os.path.lexists(self.folder):
            return True
        if not os.path.isdir(self.folder):
            return False
        names = set(os.listdir(self.folder))
        if os.path.isdir(self.folder / "checkpoints"):  # of a fork, whose first checkpoint comes before config.yaml
            names = names - {"checkpoints"} | set(os.listdir(self.folder / "checkpoints"))
        return all(name.startswith((LOCK, TEMPORARY)) for name in names)

    def is_finished(self, config: RunConfig) -> bool:
        """Whether its newest checkpoint is that of the last step of this configuration (resolved)."""
        saved = self.state.get("config")
        same_length = isinstance(saved, dict) and (saved.get("train") or {}).get("tokens") == config.train.tokens
        return same_length and self.state.get("step") == config.train.tokens // config.train.batch_tokens

    # -- what it was trained with

    def read(self, groups: tuple[str, ...] | None = None) -> "Checkpoint":
        """The named checkpoint, or the newest whole one; a damaged newer one is passed over with a warning.

        Raises CheckpointError if there is none to load.
        """
        from kiem.runs import checkpoint

        if self.named is not None:
            return checkpoint.load(self.named, groups)
        found, problems = checkpoint.newest(self.folder, groups)
        if found is None:
            raise CheckpointError("\n".join([f"the run {self.folder} has no complete checkpoint", *problems]))
        for problem in problems:
            warnings.warn(f"{problem}; {found.path.name} is used", KiemWarning, stacklevel=3)
        return found

    @cached_property
    def state(self) -> dict[str, Any]:
        """The state of the checkpoint; empty if there is no whole one."""
        from kiem.runs import checkpoint

        if self.named is not None:
            return checkpoint.load(self.named, ()).state
        found, _ = checkpoint.newest(self.folder, ())
        return found.state if found else {}

    @cached_property
    def config(self) -> RunConfig:
        """The configuration that it was trained with, nothing left to derive. Raises CheckpointError, ConfigError."""
        config = self._saved_config() or self.written_config()
        if config.model is None or config.model.vocab_size is None:
            missing = "model" if config.model is None else "model.vocab_size"
            raise CheckpointError(
                f"{self.config_file} is not as `kiem train` wrote it: it has no {missing}. Bring it back, or start a "
                "run in a new folder with it: kiem train CONFIG --out FOLDER"
            )
        return resolve(config, 1)

    def written_config(self) -> RunConfig:
        """What config.yaml says now, which may have been edited; what is lost of it (all, or the length), as the
        checkpoint says it."""
        saved = self._saved_config()
        if saved and not os.path.isfile(self.config_file):
            return saved
        written = read_config(self.config_file)
        if saved and self.state.get("cut_from") == config_dict(written)["train"]:
            # The run was made shorter on the way, and killed before config.yaml said so.
            return written.model_copy(update={"train": saved.train})
        if saved and written.train.tokens is None:  # the line was lost: not as long as a new run of this model
            return written.model_copy(update={"train": written.train.model_copy(update={"tokens": saved.train.tokens})})
        return written

    @property
    def vocab_size(self) -> int:
        """Entries of its own tokenizer; of its model, where the tokenizer is not there or damaged."""
        try:
            return self.tokenizer.vocab_size
        except (DataError, CheckpointError):
            return self.config.model.vocab_size

    def _saved_config(self) -> RunConfig | None:
        saved = self.state.get("config")
        return saved_config(saved, self.named or self.folder) if saved else None

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """Its own tokenizer, known to be the one that it was trained with. Raises DataError, CheckpointError."""
        from kiem.data.tokenizer import Tokenizer

        problem, found = "", None
        try:
            found = Tokenizer.load(self.folder / "tokenizer")
        except DataError as error:
            problem = f" ({error})" if os.path.lexists(self.folder / "tokenizer") else " (it is missing)"
        if found is None or self.state.get("tokenizer") not in (None, found.digest):
            raise CheckpointError(
                f"{self.folder / 'tokenizer'} is not the tokenizer that this run was trained with: it was changed, "
                f"damaged or removed{problem}. Bring it back; while the text is there, this writes it again: "
                f"kiem train {shell_word(self.folder)}"
            )
        return found

    def dataset(self, progress: PrepareProgress | None = None, changed_text: bool = False) -> "Dataset":
        """The tokens that it was trained with: those in the cache, or made again from its text.

        If they are gone and the text has changed: DataError, or with `changed_text` the tokens that its own tokenizer
        makes of the text as it is now, with a warning.
        """
        config = self.config
        if (kept := self._kept_dataset(runtime.cache_dir())) is not None:
            return kept
        found = prepared(config, progress)
        fingerprint = self.state.get("data")
        if fingerprint in (None, found.fingerprint):
            return found
        if not changed_text:
            raise self.changed(found)
        what, now = f"the text of {self.folder} has changed since it was trained", "the text as it is now"
        if self._is_text_of(found):
            what, now = self._other_tokens(found), "the tokens that are there"
        if found.tokenizer.digest != self.tokenizer.digest:
            found = prepared(self.with_own_tokenizer(config), progress)
        warnings.warn(f"{what}. It may have been trained on what is held out of {now}", KiemWarning, stacklevel=3)
        return found

    def _is_text_of(self, tokens: "Dataset") -> bool:
        """Whether they were made from its text: their folder is named by the contents and the settings."""
        return tokens.path.name == self.state.get("data_folder")

    def _other_tokens(self, now: "Dataset") -> str:
        """Why tokens of its own text are not those of the run, and what helps."""
        return (
            f"{self.folder}: its text has not changed, but the tokens in {now.path} are not those that it was trained "
            f"on ({self._fingerprints(now)}): somebody changed them, or another version of a library made them. Delete "
            f"{now.path}: they are made again from the text"
        )

    def _fingerprints(self, now: "Dataset") -> str:
        return f"fingerprint {str(self.state.get('data'))[:12]}, now {now.fingerprint[:12]}"

    def with_own_tokenizer(self, config: RunConfig, **data: Any) -> RunConfig:
        """The configuration with the tokenizer of this run, and other values of `data`."""
        text = config.data.model_copy(update=data | {"tokenizer": os.path.abspath(self.folder / "tokenizer")})
        return config.model_copy(update={"data": text})

    def changed(self, now: "Dataset") -> DataError:
        """The refusal of tokens that are not those of the run."""
        fork = f"kiem train {shell_word(self.folder)} --fork {shell_word(f'{self.folder}-2')}"
        if self._is_text_of(now):
            return DataError(f"{self._other_tokens(now)}. Or train on those, from this run's weights: {fork}")
        return DataError(
            f"{self.folder}: its text has changed since it was trained ({self._fingerprints(now)}). Restore the text, "
            f"or train on it as it is now, from this run's weights: {fork}"
        )

    def _kept_dataset(self, cache: Path) -> "Dataset | None":
        """The tokens of the run where they still are in the cache, whatever became of the text."""
        from kiem.data.shards import open_dataset

        name, sources = self.state.get("data_folder"), self.config.data.sources
        if not isinstance(name, str) or not name.isalnum():
            return None
        names = [source.path for source in (*sources, *(self.config.data.validation or []))]
        try:
            found = open_dataset(cache / "data" / name, [source.weight for source in sources], names)
        except (DataError, ValueError, OSError):
            return None
        return found if found.fingerprint == self.state.get("data") else None

    @property
    def newest_step(self) -> int:
        """The step in the name of its newest checkpoint, 0 if it has none."""
        names = [path.name.removeprefix("step-") for path in (self.folder / "checkpoints").glob("step-*")]
        return max((int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 19), default=0)

    @property
    def report(self) -> dict[str, Any]:
        """What report.json says; empty if there is none."""
        try:
            found = read_json(self.folder / "report.json", MOST_REPORT_BYTES)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    # -- writing it

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder (it is made if missing) for writing, and clear what an interrupted write left in it.

        Raises BusyError with process and host of the holder, StorageError if the folder cannot be written.
        """
        from kiem.runs import checkpoint

        what = f"the run folder {self.folder}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise storage_error(problem, what, self.folder.parent) from problem
        with lock(self.folder, what):
            checkpoint.clean(self.folder)
            yield

    def write_facts(self, config: RunConfig, tokenizer: "Tokenizer", plan: Mapping[str, Any] | None) -> None:
        """What the folder says of the run besides its progress. config.yaml comes first: with it the run exists."""
        write_atomically(self.config_file, config_text(config))
        try:
            tokenizer.save(self.folder / "tokenizer")
        except OSError as problem:
            raise storage_error(problem, str(self.folder / "tokenizer"), self.folder) from problem
        if plan is not None:
            write_atomically(self.folder / "plan.json", to_json(plan, indent=1))


def prepared(config: RunConfig, progress: PrepareProgress | None = None) -> "Dataset":
    """The tokens of a configuration's text: from the cache, or made now."""
    from kiem.data.prepare import prepare

    return prepare(config.data, tokenizer_vocab_size(config), runtime.cache_dir(), progress)


def saved_config(saved: Any, where: Path) -> RunConfig:
    """The configuration in a checkpoint's state. Raises CheckpointError."""
    try:
        if not isinstance(saved, dict):
            raise ConfigError("not a group of keys")
        return read_config(saved)
    except ConfigError as problem:
        raise CheckpointError(f"the checkpoint in {where} has no usable configuration: {problem}") from None
