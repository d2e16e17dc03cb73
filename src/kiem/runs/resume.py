"""How a run is taken up again: from which checkpoint, and whether it still is the same run.

Identity keys of the configuration decide what is learned; a run with another value of one is another run, and is
refused with the way to make it one. Execution keys may change: that is recorded. A run may be made longer. Where its
cool-down had begun, it continues from the newest checkpoint before the cool-down, so that it is the run that it would
have been had it been as long from the start.
"""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiem.config.keys import kind
from kiem.config.run import RunConfig
from kiem.errors import CheckpointError, ConfigError, DataError, KiemWarning, StorageError
from kiem.format import shell_word
from kiem.optim.schedule import lr_scale

if TYPE_CHECKING:
    from kiem.data.shards import Dataset
    from kiem.runs.checkpoint import Checkpoint
    from kiem.runs.run import Run

LENGTH = "train.tokens"
ENDED = "ended-"  # before the name of the last checkpoint of a run that was made longer, until the longer one ends
Changes = dict[str, list[Any]]  # key: [value before, value now]


@dataclass
class Start:
    """Where training begins: with `checkpoint`, or without one from the start. `notes` are for the user."""

    checkpoint: "Checkpoint | None" = None
    changed: Changes = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_options(run: "Run", out: str | Path | None, minutes: float | None) -> None:
    """Raise ConfigError for what a run that exists cannot be given."""
    if out is not None and os.path.realpath(out) != os.path.realpath(run.folder):
        raise ConfigError(
            f"--out {out}: {run.folder} is resumed in its own folder: leave --out out, or start a new run from its "
            f"weights: kiem train {shell_word(run.folder)} --fork {shell_word(out)}"
        )
    if minutes is not None:
        raise ConfigError(f"--minutes: {run.folder} already has its length: give --tokens to make it longer")


def take_up(run: "Run", config: RunConfig, dataset: "Dataset") -> Start:
    """Find where the run goes on. The caller holds its lock; `config` is resolved.

    Raises CheckpointError if no checkpoint can be used though there are some, ConfigError if `config` is another run's,
    DataError if the tokens are not those that it was trained with.
    """
    from kiem.runs import checkpoint
    from kiem.runs.run import saved_config

    found, problems = checkpoint.newest(run.folder)
    if found is None and problems:
        raise CheckpointError(
            checkpoint.listed(f"the run {run.folder} has no complete checkpoint to resume from", problems)
            + f"\nRestore one, or delete {run.folder / 'checkpoints'} to start training over."
        )
    if found is None:
        return Start()
    for problem in problems:
        warnings.warn(f"{problem}. Resuming from {found.path.name}", KiemWarning, stacklevel=3)
    _check_state(found)
    before = saved_config(found.state["config"], found.path)
    changed = changes(before, config, run.folder)
    if found.state["data"] != dataset.fingerprint:
        raise run.changed(dataset)
    start = Start(found, changed)
    if LENGTH in changed:
        _take_up_longer(run, start, before, config)
    assert start.checkpoint is not None
    start.notes += [f"changed: {key} from {old} to {new}" for key, (old, new) in changed.items()]
    start.notes.append(f"resumed from {start.checkpoint.path.name}")
    if _tokenizer_digest(run) not in (None, dataset.tokenizer.digest):
        start.notes.append(f"{run.folder / 'tokenizer'} was no longer the run's tokenizer: it was written again")
    return start


def changes(before: RunConfig, after: RunConfig, folder: Path) -> Changes:
    """What differs between two resolved configurations of one run. Raises ConfigError if that makes another run."""
    old, new = (flat(config.model_dump()) for config in (before, after))
    changed = {key: [old.get(key), new.get(key)] for key in {**old, **new} if old.get(key) != new.get(key)}
    other = [key for key in changed if key != LENGTH and kind(key) == "identity"]
    if other:
        was = "; ".join(f"{key} is {_shown(changed[key][0])} in it, {_shown(changed[key][1])} now" for key in other)
        ways = f"start a new run in another folder, or keep the values of {folder}"
        if not any(key.startswith(("model.", "data.tokenizer")) for key in other):
            # with the weights that the run has now
            ways = f"train it as a new run, from this one's weights: {fork_command(folder, changed, other)}"
        raise ConfigError(
            f"{folder}: {was}. That decides what is learned, so it would no longer be the same run: {ways}"
        )
    check_length(before, after.train.tokens, folder)
    return changed


def check_length(before: RunConfig, tokens: int | None, folder: Path) -> None:
    """Raise ConfigError for a run that is to end before it did."""
    if tokens is not None and tokens // before.train.batch_tokens < before.train.tokens // before.train.batch_tokens:
        raise ConfigError(
            f"{folder}: {LENGTH} {tokens} is less than the run's {before.train.tokens}: a run can be made longer, not "
            f"shorter. Give {before.train.tokens} or more"
        )


def fork_command(folder: Path, changed: Changes, keys: Iterable[str]) -> str:
    """What a user types to train on from a run's weights with other values."""
    values = {key: changed[key][1] for key in keys}
    said = "".join(f" {key}={_word(value)}" for key, value in values.items() if not isinstance(value, list))
    return f"kiem train {shell_word(folder)} --fork {shell_word(f'{folder}-2')}{said}"


def _word(value: Any) -> str:
    """A value as an override of the command line takes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shell_word(value)


def set_ended_aside(run: "Run", first_later: int) -> None:
    """Before a run is trained longer from an earlier checkpoint: its last one gets another name, later ones go."""
    from kiem.runs import checkpoint

    later = [path for path in checkpoint.newest_first(run.folder) if checkpoint.step_of(path) >= first_later]
    try:
        for path in later[:1]:
            os.rename(path, path.with_name(ENDED + path.name))
    except OSError as problem:
        raise StorageError(f"{later[0]} cannot be renamed: {problem.strerror or problem}") from problem
    for path in later[1:]:
        checkpoint.remove(path)


def remove_ended(run: "Run") -> None:
    """After the longer run has ended: what `set_ended_aside` kept."""
    from kiem.runs import checkpoint

    for path in (run.folder / "checkpoints").glob(f"{ENDED}step-*"):
        checkpoint.remove(path)


def _take_up_longer(run: "Run", start: Start, before: RunConfig, after: RunConfig) -> None:
    """Choose the checkpoint from which the longer run is the same as one that was as long from the start."""
    from kiem.runs import checkpoint

    found = start.checkpoint
    assert found is not None
    if same_rates_up_to(found.state["step"], before, after):
        return
    for path in checkpoint.newest_first(run.folder):
        if same_rates_up_to(checkpoint.step_of(path), before, after):
            try:
                start.checkpoint = checkpoint.load(path)
            except CheckpointError:
                continue
            _check_state(start.checkpoint)
            step = start.checkpoint.state["step"]
            start.notes.append(
                f"longer: its learning rate had begun to fall, so it continues from step {step}, before the cool-down. "
                f"The model of step {found.state['step']} is kept as {ENDED}{found.path.name} until the longer run ends"
            )
            set_ended_aside(run, step + 1)
            return
    raise ConfigError(
        f"{run.folder}: {LENGTH}={after.train.tokens}: the learning rate has begun to fall, and there is no checkpoint "
        "from before that. To train on from its weights, with a new warm-up: "
        + fork_command(run.folder, start.changed, [LENGTH])
    )


def same_rates_up_to(step: int, before: RunConfig, after: RunConfig) -> bool:
    """Whether the first `step` updates have the same learning rates in both."""
    seen = (step - 1) * before.train.batch_tokens
    return step <= 0 or lr_scale(seen, before.train) == lr_scale(seen, after.train)


def last_step_before_cooldown(config: RunConfig) -> int:
    """The last step whose state does not depend on the cool-down, and so on the length of the run."""
    train = config.train
    if train.cooldown == "none" or not train.cooldown_tokens:
        return train.tokens // train.batch_tokens
    return max(0, int((train.tokens - train.cooldown_tokens) / train.batch_tokens + 0.5))


def _check_state(found: "Checkpoint") -> None:
    """What others may have written with right checksums. Raises CheckpointError."""
    state = found.state
    whole = (
        type(state.get("step")) is int
        and state["step"] >= 0
        and type(state.get("tokens")) is int
        and isinstance(state.get("data"), str)
        and isinstance(state.get("config"), dict)
        and _numbers(state.get("watch"))
        and {"model", "optimizer", "random"} <= found.tensors.keys()
    )
    if not whole:
        raise CheckpointError(f"the checkpoint {found.path} lacks what a resume needs, or holds it in the wrong form")


def _numbers(watch: Any) -> bool:
    """Whether it is a mapping of mappings of numbers and lists of numbers."""
    if not isinstance(watch, dict) or not all(isinstance(track, dict) for track in watch.values()):
        return False
    leaves = [leaf for track in watch.values() for value in track.values() for leaf in _leaves(value)]
    return all(isinstance(leaf, int | float) for leaf in leaves)


def _leaves(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _tokenizer_digest(run: "Run") -> str | None:
    from kiem.data.tokenizer import Tokenizer

    if not os.path.lexists(run.folder / "tokenizer"):
        return None
    try:
        return Tokenizer.load(run.folder / "tokenizer").digest
    except DataError:
        return "damaged"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested groups by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
