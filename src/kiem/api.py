"""What Kiem does, as functions: the subcommands are these, with printing around them.

`train` is the whole path: configuration, text to tokens, derived values, plan, training, report.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiem import runtime
from kiem.config.presets import resolve, tokenizer_vocab_size
from kiem.config.read import read_config
from kiem.config.run import RunConfig, Source
from kiem.errors import ConfigError, NumericsError, Stopped
from kiem.runs import folders, resume
from kiem.runs import run as runs

if TYPE_CHECKING:
    from kiem.data.shards import Dataset
    from kiem.generation.engine import LanguageModel
    from kiem.planning.predict import Plan
    from kiem.training.evaluate import Evaluation

Target = str | Path | Mapping | RunConfig | None
Sources = str | Path | Mapping | Source | Sequence[str | Path | Mapping | Source] | None

SAMPLES_AT_ENDS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 96, 0.8
SAMPLED_FREELY = 50_000_000  # parameters; a larger model draws fewer samples


class Run(runs.Run):
    """A run folder: what `train` gives back. `report` is the contents of its report.json."""

    def load(self, device: str = "auto") -> "LanguageModel":
        """The trained model."""
        return load(self.named or self.folder, device)

    def evaluate(self, **options: Any) -> "Evaluation":
        """As kiem.evaluate of this run."""
        return evaluate(self.named or self.folder, **options)

    def __repr__(self) -> str:
        from kiem.report.facts import headline

        report = self.report
        return f"Run({str(self.folder)!r}: {headline(report) if report else 'no report yet'})"

    def _repr_html_(self) -> str:
        """The main results, for a notebook."""
        from kiem.report.facts import facts, headline

        report = self.report
        if not report:
            return f"<p>{escape(repr(self))}</p>"
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(report))
        head = f"<b>{escape(str(self.folder))}</b>: {escape(headline(report))}"
        return f"<table><caption>{head}</caption>{rows}</table>"


def train(
    config: Target = None,
    *,
    data: Sources = None,
    out: str | Path | None = None,
    fork: str | Path | None = None,
    depth: int | None = None,
    tokens: int | str | None = None,
    minutes: float | None = None,
    tokenizer: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    show: Callable[[Any], None] | None = None,
) -> Run:
    """Train a model, or resume a run.

    `config` is a configuration file, a preset, a mapping, a RunConfig, or the folder of a run: it is resumed, or with
    `fork` (a new folder) a new run takes its weights and settings from it. `data` replaces the sources; `tokens` is the
    length (10_000_000 or "10M"); `minutes` sets the length by measuring this machine. `out` is the run's folder, by
    default runs/NAME of the data; one that holds the very run that is asked for is resumed, any other is refused.
    Progress goes to standard error unless `quiet`; `show` gets the plan before the start. Raises errors of kiem.errors.
    """
    options = _options(data=data, depth=depth, tokens=tokens, tokenizer=tokenizer, seed=seed, device=device)
    if minutes is not None:
        _check_minutes(minutes, tokens, overrides)
    if isinstance(config, str | Path) and os.path.isdir(config):
        run = Run.at(config)
        if fork is not None:
            return _fork(run, Run(fork), options, overrides, quiet, show)
        resume.check_options(run, out, minutes)
        return _resume(run, options, overrides, quiet, show)
    if fork is not None:
        raise ConfigError(f"--fork {fork}: it takes the folder of a run to start from: kiem train RUN --fork {fork}")
    from kiem.planning.budget import Budget

    budget = None if minutes is None else Budget(minutes)
    wanted = folders.with_whole_paths(read_config(config, overrides, options))
    run = Run(out if out is not None else folders.default(config, wanted))
    ends = None if budget is None else budget.ends
    if folders.holds(run, wanted, any_length=budget is not None):
        return _resume(run, {}, (), quiet, show, ends)
    if budget is not None:
        wanted = budget.with_depth(wanted)
    dataset = _prepare(wanted, quiet)
    if budget is not None:
        wanted = budget.with_length(wanted, dataset.tokenizer.vocab_size)
    return _train(wanted, run, dataset, quiet, show, ends=ends)


def load(run: str | Path | runs.Run, device: str = "auto") -> "LanguageModel":
    """The model of a run's newest whole checkpoint, or of the checkpoint folder named."""
    from kiem.generation import engine
    from kiem.planning.budget import require_room

    found = run if isinstance(run, runs.Run) else runs.Run.at(run)
    require_room(found.config.model, device, found.folder)
    return engine.load(found, device)


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
    with _counting(quiet) as progress:
        return runs.prepared(read_config(config, overrides, options), progress)


def evaluate(
    run: str | Path | runs.Run, *, data: Sources = None, device: str = "auto", quiet: bool = True
) -> "Evaluation":
    """Loss, perplexity and bits per byte of a run's model on its held-out text, or on all of `data`.

    The tokenizer and how text is read and packed are the run's own. Where the text has changed since it was trained, a
    warning says what is scored.
    """
    from kiem.training.evaluate import evaluate as measure
    from kiem.training.objective import NextToken

    found = run if isinstance(run, runs.Run) else runs.Run.at(run)
    model, config = load(found, device), found.config
    with _counting(quiet) as progress:
        if data is None:
            dataset = found.dataset(progress, changed_text=True)
        else:
            chosen = read_config(None, options=_options(data=data)).data.sources
            text = found.with_own_tokenizer(config, sources=[], validation=chosen)
            dataset = runs.prepared(text, progress)
    model.model.compute_dtype = runtime.select_precision(config.train.precision, runtime.select_device(device))
    objective = NextToken(documents_apart=not config.data.cross_document_attention)
    return measure(model.model, dataset, config.train.micro_batch_tokens, objective=objective)


def plan(
    config: Target = None,
    *,
    data: Sources = None,
    depth: int | None = None,
    minutes: float | None = None,
    overrides: Sequence[str] = (),
    measure: bool = True,
    quiet: bool = True,
) -> "Plan":
    """Parameters, FLOPs, memory and (if `measure`) speed and time of a run.

    With `data` its text is prepared: then the vocabulary is the real one, and a note says how often the text is seen.
    With `minutes` the length is what fits them on this machine. `config` may be the folder of a run.
    """
    from kiem.format import count_of, number_text
    from kiem.planning.budget import Budget
    from kiem.planning.predict import plan as predict

    if minutes is not None:
        _check_minutes(minutes, None, overrides)
        if not measure:
            raise ConfigError("--minutes needs the speed of this machine: leave out --no-measure")
    target: Target = Run.at(config).config if isinstance(config, str | Path) and os.path.isdir(config) else config
    wanted = read_config(target, overrides, _options(data=data, depth=depth))
    budget = None if minutes is None else Budget(minutes)
    dataset = None
    if data is not None:
        wanted = folders.with_whole_paths(wanted)
        dataset = _prepare(wanted if budget is None else budget.with_depth(wanted), quiet)
    vocab_size = dataset.tokenizer.vocab_size if dataset else tokenizer_vocab_size(wanted)
    with _saying("measuring this machine ...", not quiet and measure):
        if budget is not None:
            wanted = budget.with_length(budget.with_depth(wanted), vocab_size)
        planned = predict(resolve(wanted, vocab_size), measure)
    if dataset is not None:
        tokens = sum(split.n_tokens for split, _ in dataset.train)
        often = planned.config.train.tokens / max(tokens, 1)
        planned.notes.append(
            f"the training text has {count_of(tokens, 'token')}: each is seen {number_text(often, 2)} times"
        )
    return planned


def _train(
    config: RunConfig,
    run: Run,
    dataset: "Dataset",
    quiet: bool,
    show: Callable[[Any], None] | None,
    weights: Run | None = None,
    ends: float | None = None,
) -> Run:
    """From tokens to a trained model and its report. ends: when it must have ended, on the clock of time.monotonic."""
    from kiem.planning import predict
    from kiem.report import summary
    from kiem.training import loop
    from kiem.training.deadline import Deadline

    resolved = resolve(config, dataset.tokenizer.vocab_size)
    planned = None
    if not run.is_finished(resolved):
        with _saying("measuring this machine ...", not quiet):
            planned = predict.plan(resolved, measure=True)
        if show is not None:
            show(predict.render(planned))
        predict.require_memory(planned)
    with _listener(resolved, run.folder) as listener:
        try:
            loop.train(
                resolved,
                run,
                dataset,
                plan=planned.to_dict() if planned else None,
                weights=weights,
                sampler=_sampler(resolved, dataset),
                listener=listener,
                deadline=None if ends is None else Deadline(ends),
                quiet=quiet,
            )
        except (Stopped, NumericsError):
            summary.write(run.folder, dataset)
            raise
    summary.write(run.folder, dataset)
    return Run(run.folder)


def _resume(
    run: Run,
    options: dict[str, Any],
    overrides: Sequence[str],
    quiet: bool,
    show: Callable[[Any], None] | None,
    ends: float | None = None,
) -> Run:
    """Train a run to its end; what is given may change how, not what is learned. ends: as in `_train`."""
    wanted = folders.with_whole_paths(read_config(run.written_config(), overrides, options))
    resume.check_length(run.config, wanted.train.tokens, run.folder)
    wanted = resolve(wanted, run.vocab_size)
    resume.changes(run.config, wanted, run.folder)
    with _counting(quiet) as progress:
        dataset = run.dataset(progress)
    return _train(wanted, run, dataset, quiet, show, ends=ends)


def _fork(
    run: Run,
    new: Run,
    options: dict[str, Any],
    overrides: Sequence[str],
    quiet: bool,
    show: Callable[[Any], None] | None,
) -> Run:
    """A new run with the weights and the settings of another, but for what is given."""
    config, same_text = folders.forked(run, new, overrides, options)
    if folders.holds(new, config):
        return _resume(new, {}, (), quiet, show)
    with _counting(quiet) as progress:
        if same_text:
            dataset = run.dataset(progress, changed_text=True)
        else:
            dataset = _prepare(run.with_own_tokenizer(config), quiet)
    return _train(config, new, dataset, quiet, show, weights=run)


def _prepare(config: RunConfig, quiet: bool) -> "Dataset":
    """The tokens of the configured text; what was held out of it and left out of it is said."""
    from kiem.format import printable
    from kiem.report.facts import data_lines
    from kiem.training.progress import StatusLine

    with _counting(quiet) as progress:
        dataset = runs.prepared(config, progress)
    for text in data_lines(dataset.report):
        StatusLine(not quiet).line(printable(text), fit="words")
    return dataset


@contextmanager
def _counting(quiet: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A line on a terminal that says how far the text is."""
    from kiem.format import bytes_text, count_of, plural
    from kiem.training.progress import StatusLine

    line = StatusLine(not quiet)
    try:
        yield lambda documents, size, tokens: line(
            f"preparing: {plural(documents, 'document')}, {bytes_text(size)}, {count_of(tokens, 'token')}"
        )
    finally:
        line.clear()


@contextmanager
def _saying(text: str, wanted: bool) -> Iterator[None]:
    """A text on the terminal while something takes its time."""
    from kiem.training.progress import StatusLine

    line = StatusLine(wanted)
    line(text)
    try:
        yield
    finally:
        line.clear()


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
