"""What Kiem does, as functions: the verbs of the command line are these, with printing around them.

`train` is the whole path: configuration, text to tokens, derived values, plan, training, report.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiem.config.read import read_config
from kiem.config.run import DataConfig, RunConfig, Source
from kiem.errors import CheckpointError, ConfigError, NumericsError, Stopped, StorageError

if TYPE_CHECKING:
    from kiem.data.shards import Dataset
    from kiem.generation.engine import LanguageModel
    from kiem.planning.predict import Plan
    from kiem.training.evaluate import Evaluation

Target = str | Path | Mapping | RunConfig | None
Sources = str | Path | Mapping | Source | Sequence[str | Path | Mapping | Source] | None

SAMPLES_AT_ENDS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 96, 0.8
SAMPLED_FREELY = 50_000_000  # parameters; a larger model draws fewer samples

# What may change when a run goes on: how long it is, and what it writes on the way. Everything else is another run.
CHANGEABLE = frozenset(
    f"train.{name}"
    for name in ("tokens", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "tensorboard")
)


@dataclass(frozen=True)
class Run:
    """A run that has ended: its folder and the contents of its report.json."""

    folder: Path
    report: dict[str, Any] = field(repr=False)

    def load(self, device: str = "auto") -> "LanguageModel":
        """The trained model."""
        return load(self.folder, device)


def train(
    config: Target = None,
    *,
    data: Sources = None,
    out: str | Path | None = None,
    depth: int | None = None,
    tokens: int | str | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    show: Callable[[Any], None] | None = None,
) -> Run:
    """Train a model, or go on with a run.

    `config` is a configuration file, a preset, a mapping, a RunConfig, or the folder of a run, which is resumed. `data`
    replaces its sources; `tokens` is the length (10_000_000 or "10M"); `minutes` sets the length by measuring this
    machine. `out` is the run's folder, by default runs/NAME; a folder with something in it is never written over.
    Progress goes to standard error unless `quiet`; `show` gets the plan before the start. Raises errors of kiem.errors.
    """
    options = _options(data=data, depth=depth, tokens=tokens, seed=seed, device=device)
    if minutes is not None:
        _check_minutes(minutes, tokens, overrides)
    if isinstance(config, str | Path) and os.path.isdir(config):
        return _resume(Path(config), options, overrides, out, minutes, quiet, show)
    from kiem.planning.budget import Budget

    budget = None if minutes is None else Budget(minutes)
    run_config = _with_whole_paths(read_config(config, overrides, options))
    if budget is not None:
        run_config = budget.with_depth(run_config)
    folder = _new_folder(out, config, run_config)
    dataset = _dataset(run_config, quiet)
    if budget is not None:
        run_config = budget.with_length(run_config, dataset.tokenizer.vocab_size)
    return _run(run_config, folder, dataset, quiet, show)


def load(run: str | Path | Run, device: str = "auto") -> "LanguageModel":
    """The model of a run's newest whole checkpoint, or of the checkpoint folder named."""
    from kiem.generation import engine

    return engine.load(run.folder if isinstance(run, Run) else run, device)


def prepare(
    config: Target = None,
    *,
    data: Sources = None,
    tokenizer: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> "Dataset":
    """Turn text into tokens on disk, or find that this was done before. Returns the dataset."""
    options = _options(data=data, tokenizer=tokenizer)
    return _dataset(_with_whole_paths(read_config(config, overrides, options)), quiet)


def evaluate(run: str | Path | Run, *, data: Sources = None, device: str = "auto", quiet: bool = True) -> "Evaluation":
    """Loss, perplexity and bits per byte of a run's model on its held-out text, or on all of `data`."""
    from kiem.runtime import select_device, select_precision
    from kiem.training.evaluate import evaluate as measure

    folder = run.folder if isinstance(run, Run) else Path(run)
    model = load(folder, device)
    config = model.config
    if data is not None:
        chosen = read_config(None, options=_options(data=data)).data.sources
        text = {"sources": chosen, "validation": chosen, "tokenizer": str(_run_of(folder) / "tokenizer")}
        config = config.model_copy(update={"data": DataConfig(**text)})
    dataset = _dataset(config, quiet)
    _check_vocabulary(config, dataset)
    model.model.compute_dtype = select_precision(config.train.precision, select_device(device))
    return measure(
        model.model, dataset, config.train.micro_batch_tokens, documents_apart=not config.data.cross_document_attention
    )


def plan(
    config: Target = None, *, depth: int | None = None, overrides: Sequence[str] = (), measure: bool = True
) -> "Plan":
    """Parameters, FLOPs, memory and (if `measure`) speed and time of a run, without its text."""
    from kiem.config.presets import resolve, tokenizer_vocab_size
    from kiem.planning.predict import plan as predict

    if isinstance(config, str | Path) and os.path.isdir(config):
        config = _config_file(Path(config))
    wanted = read_config(config, overrides, _options(depth=depth))
    return predict(resolve(wanted, tokenizer_vocab_size(wanted)), measure)


def _run(
    config: RunConfig,
    folder: Path,
    dataset: "Dataset",
    quiet: bool,
    show: Callable[[Any], None] | None,
) -> Run:
    """From tokens to a trained model and its report."""
    from kiem.config.presets import resolve
    from kiem.planning import predict
    from kiem.report import summary
    from kiem.training import loop

    resolved = resolve(config, dataset.tokenizer.vocab_size)
    _check_vocabulary(resolved, dataset)
    planned = predict.plan(resolved, measure=True)
    if show is not None:
        show(predict.render(planned))
    with _listener(resolved, folder) as listener:
        try:
            loop.train(
                resolved,
                folder,
                dataset,
                plan=planned.to_dict(),
                sampler=_sampler(resolved, dataset),
                listener=listener,
                quiet=quiet,
            )
        except (Stopped, NumericsError):
            summary.write(folder, dataset)
            raise
    return Run(folder, summary.write(folder, dataset))


def _sampler(config: RunConfig, dataset: "Dataset") -> Callable[[Any, int], list[dict[str, Any]]]:
    """Samples from the start of a document: a few on the way, and before and after training enough to count shares."""
    from kiem.generation.engine import LanguageModel

    ends = (0, config.train.tokens // config.train.batch_tokens)

    def sample(model: Any, step: int) -> list[dict[str, Any]]:
        cheap = sum(p.numel() for p in model.parameters()) < SAMPLED_FREELY
        n = (SAMPLES_AT_ENDS if cheap else 4) if step in ends else 1
        texts = LanguageModel(model, dataset.tokenizer).generate(
            [""], n=n, max_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=config.seed
        )
        return [{"prompt": "", "text": text, "seed": config.seed, "temperature": SAMPLE_TEMPERATURE} for text in texts]

    return sample


@contextmanager
def _listener(config: RunConfig, folder: Path) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """TensorBoard files, if they are asked for."""
    if not config.train.tensorboard:
        yield None
        return
    from kiem.report.board import Board

    with Board(folder) as board:
        yield lambda record: board.sample(record) if record["kind"] == "sample" else board.record(record)


def _resume(
    folder: Path,
    options: dict[str, Any],
    overrides: Sequence[str],
    out: str | Path | None,
    minutes: float | None,
    quiet: bool,
    show: Callable[[Any], None] | None,
) -> Run:
    """Go on with a run: only what does not change it may be given."""
    file = _config_file(folder)
    if out is not None:
        raise ConfigError(f"--out {out}: a run goes on in its own folder, {folder}: leave --out away")
    if minutes is not None:
        raise ConfigError(f"--minutes: {folder} has its length already: give --tokens to make it longer")
    before, after = read_config(file), read_config(file, overrides, options)
    old, new = _flat(before.model_dump()), _flat(after.model_dump())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if wrong := [key for key in changed if key not in CHANGEABLE]:
        raise ConfigError(
            f"{folder}: {', '.join(wrong)} cannot change when a run goes on, as that is another run: start "
            f"a new one, or change only {', '.join(sorted(CHANGEABLE))}"
        )
    if before.train.tokens and after.train.tokens and after.train.tokens < before.train.tokens:
        raise ConfigError(
            f"{folder}: train.tokens {after.train.tokens} is less than the run's {before.train.tokens}: "
            "a run can be made longer, not shorter"
        )
    dataset = _dataset(after, quiet)
    return _run(after, folder, dataset, quiet, show)


def _dataset(config: RunConfig, quiet: bool) -> "Dataset":
    """The tokens of the configured text, with a line of progress on standard error where that is a terminal."""
    from kiem import runtime
    from kiem.config.presets import tokenizer_vocab_size
    from kiem.data.prepare import prepare as make

    return make(config.data, tokenizer_vocab_size(config), config.seed, runtime.cache_dir(), _counter(quiet))


def _counter(quiet: bool) -> Callable[[int, int, int], None] | None:
    import sys

    from kiem.format import bytes_text, count_text

    if quiet or not sys.stderr.isatty():
        return None
    return lambda documents, size, tokens: print(
        f"\r\033[Kprepare: {count_text(documents)} documents, {bytes_text(size)}, {count_text(tokens)} tokens",
        end="",
        file=sys.stderr,
        flush=True,
    )


def _options(data: Sources = None, **values: Any) -> dict[str, Any]:
    """The arguments that were given, by configuration key."""
    paths = {
        "depth": "depth",
        "seed": "seed",
        "device": "device",
        "tokens": "train.tokens",
        "tokenizer": "data.tokenizer",
    }
    given = {paths[name]: value for name, value in values.items() if value is not None}
    if isinstance(given.get("data.tokenizer"), Path):
        given["data.tokenizer"] = str(given["data.tokenizer"])
    if data is not None:
        entries = data if isinstance(data, Sequence) and not isinstance(data, str) else [data]
        given["data.sources"] = [str(entry) if isinstance(entry, Path) else entry for entry in entries]
    return given


def _check_minutes(minutes: float, tokens: Any, overrides: Sequence[str]) -> None:
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= 525_600:
        raise ConfigError(f"--minutes {minutes}: it takes a number above 0 and at most 525600 (a year)")
    if tokens is not None or any(text.partition("=")[0].strip() in ("tokens", "train.tokens") for text in overrides):
        raise ConfigError("--minutes and train.tokens both set the length of the run: keep one")


def _check_vocabulary(config: RunConfig, dataset: "Dataset") -> None:
    have, need = config.model.vocab_size, dataset.tokenizer.vocab_size
    if have < need:
        raise ConfigError(
            f"model.vocab_size is {have} and the tokenizer ({config.data.tokenizer}) has {need} entries: set "
            f"model.vocab_size={need} or more, or choose a smaller tokenizer"
        )


def _new_folder(out: str | Path | None, target: Target, config: RunConfig) -> Path:
    """The folder of a new run: not there yet or empty, and in a place that can be written."""
    folder = Path(out) if out is not None else Path("runs") / _name(target, config)
    if folder.is_dir() and any(folder.iterdir()):
        is_run = (folder / "config.yaml").exists()
        advice = f"go on with it by `kiem train {folder}`, or " if is_run else ""
        raise ConfigError(
            f"{folder}: the folder exists and holds {'a run' if is_run else 'files'}: {advice}choose another with --out"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, the folder of a run was expected: choose another with --out")
    parent = next((place for place in [folder, *folder.absolute().parents] if place.exists()), None)
    if parent is None or not parent.is_dir():
        raise ConfigError(f"{folder}: {parent} is not a folder: choose another place with --out")
    try:
        tempfile.TemporaryDirectory(prefix=".kiem-", dir=parent).cleanup()
    except OSError as error:
        reason = f"{parent} cannot be written ({error.strerror})"
        raise StorageError(f"{folder}: {reason}: choose another place with --out") from None
    return folder


def _name(target: Target, config: RunConfig) -> str:
    if isinstance(target, str | Path):
        return Path(target).stem or "run"
    if config.depth is not None:
        return f"depth-{config.depth}"
    return "default" if config.model is None else f"model-{config.model.n_layers}x{config.model.emb_dim}"


def _config_file(folder: Path) -> Path:
    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder}: is not the folder of a run: it has no config.yaml")
    return file


def _run_of(folder: Path) -> Path:
    return folder if (folder / "config.yaml").is_file() else folder.resolve().parent.parent


def _with_whole_paths(config: RunConfig) -> RunConfig:
    """Paths from the root, so that a run goes on from any working folder."""

    def whole(path: str) -> str:
        return path if path in ("-", "python") or path.startswith("hf:") else os.path.abspath(os.path.expanduser(path))

    def all_whole(sources: list[Source] | None) -> list[Source] | None:
        return sources and [source.model_copy(update={"path": whole(source.path)}) for source in sources]

    data = config.data
    tokenizer = data.tokenizer if data.tokenizer in ("bpe", "bytes", "chars") else whole(data.tokenizer)
    return config.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "sources": all_whole(data.sources),
                    "validation": all_whole(data.validation),
                    "tokenizer": tokenizer,
                }
            )
        }
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
