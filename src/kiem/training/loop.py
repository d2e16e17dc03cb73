"""The loop of a run: batches into steps, and around them what a person sees and what lets the run survive.

At the end of a step, in this order: its record, an evaluation, a sample, a checkpoint. So a checkpoint of step k
stands after every record up to k, and a resume that drops the records after k writes them again, equal.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from kiem import runtime
from kiem.config.read import config_dict, write_config
from kiem.config.run import RunConfig
from kiem.data.loader import Batch, Loader
from kiem.data.shards import Dataset
from kiem.errors import CheckpointError, NumericsError, Stopped
from kiem.format import plural, shell_word
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.optim.state import load_state_tensors, state_tensors
from kiem.runs import checkpoint, metrics, resume
from kiem.runs.run import Run
from kiem.training import guard
from kiem.training.deadline import Deadline
from kiem.training.evaluate import Evaluation, evaluate
from kiem.training.objective import NextToken
from kiem.training.progress import Progress
from kiem.training.step import StepResult, train_step

Sampler = Callable[[Transformer, int], list[dict[str, Any]]]  # (model, step) -> records of samples.jsonl
REPORT_SECONDS = 2.0  # after the last save, about
SKIP_AHEAD = 1 << 32  # a batch that is left out is replaced by one from so many steps later, which no run comes to
Listener = Callable[[dict[str, Any]], None]  # takes every record of metrics.jsonl and samples.jsonl


def train(
    config: RunConfig,
    run: Run,
    dataset: Dataset,
    *,
    plan: dict[str, Any] | None = None,
    weights: Run | None = None,
    sampler: Sampler | None = None,
    listener: Listener | None = None,
    deadline: Deadline | None = None,
    quiet: bool = False,
) -> None:
    """Train from the newest whole checkpoint of `run` (or from the start) to the last token.

    config: resolved. plan: contents of plan.json. weights: the run whose weights a new run starts from. deadline: the
    run is made shorter on the way if it would end later. Ctrl-C and SIGTERM end the step, save, and raise Stopped;
    NumericsError, StorageError, BusyError, CheckpointError, ConfigError and DataError as their names say.
    """
    runtime.set_up_process()
    # What cannot work fails here, before there is a folder.
    flops = None if plan is None else plan["flops_per_token"]["total_flops"]
    trainer = Trainer(config, run, dataset, sampler, listener, flops, deadline)
    with run.writing():
        start = trainer.restore(weights)
        run.write_facts(config, dataset.tokenizer, plan)
        with trainer.open_logs(start):
            progress = Progress(config.train.tokens, trainer.steps, tokens=trainer.tokens, quiet=quiet)
            trainer.run(progress, start)


class Trainer:
    """One process at work on one run folder. The folder is touched from `restore` on, and must be locked by then."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        dataset: Dataset,
        sampler: Sampler | None,
        listener: Listener | None,
        flops_per_token: int | None = None,
        deadline: Deadline | None = None,
    ):
        self.config, self.of, self.folder, self.dataset = config, run, run.folder, dataset
        self.sampler, self.listener = sampler, listener
        self.train, context = config.train, config.model.context_length
        self.objective = NextToken(documents_apart=not config.data.cross_document_attention)
        self.device = runtime.select_device(config.device)
        dtype = runtime.select_precision(self.train.precision, self.device)
        self.loader = Loader(dataset, context, self.train.batch_tokens // context, config.seed)
        self.steps = self.train.tokens // self.train.batch_tokens
        self.model = Transformer(config.model, dtype, self.train.activation_checkpointing)
        self.model.initialize(config.seed, self.train.init).to(self.device)
        self.optimizer = build_optimizer(self.model, self.train)
        if self.train.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        runtime.seed_everything(config.seed)
        self.watch = guard.Watch(uniform_loss=math.log(config.model.vocab_size))
        self.deadline = deadline
        self.took: dict[str, float] = {}  # seconds of the newest evaluation (per token), sample and save
        self.step, self.tokens = 0, 0  # updates done, training tokens seen
        self.stop_signal: int | None = None
        self.skipped = self.train.skipped_steps()
        self.origin: str | None = None  # of a fork: where its weights are from
        self.matmul_rate = runtime.matmul_rate(self.device, dtype)
        self.flops_per_token = flops_per_token

    @contextmanager
    def open_logs(self, start: resume.Start) -> Iterator[None]:
        """metrics.jsonl and samples.jsonl, without the records of steps that will be made again."""
        log = metrics.MetricsLog(self.folder / "metrics.jsonl")
        samples = metrics.JsonLines(self.folder / "samples.jsonl")
        with log, samples:
            self.log, self.samples = log, samples
            start.notes += log.truncate(self.step)
            start.notes += samples.truncate(self.step or -1)  # those before training are drawn again too
            yield

    def run(self, progress: Progress, start: resume.Start) -> None:
        """From where `restore` left off to the end. What `start` has to say is shown first."""
        self.progress = progress
        with self.progress, runtime.deferred_signals(self.on_signal):
            for note in start.notes:
                self.progress.note(note)
            if self.step == self.steps and self.log.last_kind() == "end" and not start.changed:
                return
            reason = "resumed" if self.step else self.origin or "new"
            self.record("start", reason=reason, changed=start.changed or None, time=_now())
            if self.step == 0:
                self.sample()
            saved = self.step
            while self.step < self.steps:
                self.one_step()
                self.keep_deadline()
                last = self.step == self.steps
                if self.stop_signal is not None and not last:
                    self.progress.note(
                        f"{_signal_name(self.stop_signal)}: saving (again: stop at once, without saving)"
                    )
                if self.step % self.train.eval_every == 0 or last:
                    found = self.evaluate(self.train.eval_tokens)
                    if last and found["part"] == "sample":  # beside the curve, whose points are of one sample
                        found = self.evaluate(None)
                    self.progress.eval(found)
                if self.step % self.train.sample_every == 0 or last:
                    self.sample()
                if self.step % self.train.save_every == 0 or last or self.stop_signal is not None:
                    self.save()
                    saved = self.step
                if self.stop_signal is not None and not last:
                    self.stop(saved)
            if warning := self.watch.ending():
                self.progress.note(f"warning: {warning}")
            self.record("end", reason="finished", warning=warning, time=_now())
        resume.remove_ended(self.of)

    def record(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write a record of metrics.jsonl about this step, tell the listener, and return it."""
        record = {"step": self.step, "tokens": self.tokens, **fields}
        self.log.write(kind, **record)
        if self.listener is not None:
            self.listener({"kind": kind, **record})
        return record

    def one_step(self) -> None:
        """Batch, update, record, verdict."""
        began = time.perf_counter()
        number = self.step + (SKIP_AHEAD if self.step + 1 in self.skipped else 0)
        batch = self.loader.batch(number).to(self.device)
        micro_batches = batch.micro(self.train.micro_batch_tokens // self.config.model.context_length)
        try:
            result = train_step(self.objective, self.model, self.optimizer, micro_batches, self.train, self.tokens)
        except NumericsError as problem:
            raise self.explained(problem, batch, micro_batches) from problem
        self.step += 1
        self.tokens += batch.tokens_BT.numel()
        self.progress.step(self.record("step", **self.step_numbers(result, time.perf_counter() - began)))
        verdict = self.watch.add(self.step, result.loss, result.grad_norm)
        if verdict is not None and verdict.stop and self.train.stop_on_divergence:
            self.record("stop", reason=verdict.reason, time=_now())
            raise NumericsError(f"step {self.step}: {verdict.reason}. {self.after_divergence(verdict.since)}")
        if verdict is not None:
            self.progress.note(f"step {self.step}: {verdict.reason}")

    def after_divergence(self, since: int) -> str:
        """What can be done about a loss that exploded in step `since`."""
        good = next((path for path in checkpoint.newest_first(self.folder) if checkpoint.step_of(path) < since), None)
        lower = {"train.lr": f"{self.train.lr / 2:g}"}
        if self.train.matrix_lr is not None:
            lower["train.matrix_lr"] = f"{self.train.matrix_lr / 2:g}"
        values = " ".join(f"{key}={value}" for key, value in lower.items())
        again = f"{_command(good)} --fork {self.fork} {values}" if good else f"start a new run with {values}"
        return (
            f"The run was stopped; its checkpoints are kept. To try a lower learning rate: {again}. "
            f"To train on regardless: {_command(self.folder)} train.stop_on_divergence=false"
        )

    @property
    def fork(self) -> str:
        """The folder of a fork in a command that is advised."""
        return shell_word(f"{self.folder}-2")

    def keep_deadline(self) -> None:
        """Make the run shorter if it would end after its deadline: said, recorded, and saved at once."""
        if self.deadline is None:
            return
        ending = self.took.get("sample", 0.0) + self.took.get("save", 0.0) + REPORT_SECONDS
        held_out = self.dataset.validation.n_tokens if self.dataset.validation else 0
        ending += self.took.get("evaluation", 0.0) * held_out
        settings = self.deadline.shortened(self.train, self.tokens, ending)
        if settings is None:
            return
        before = config_dict(self.config)["train"]
        self.train = settings
        self.config = self.config.model_copy(update={"train": settings})
        self.steps = settings.tokens // settings.batch_tokens
        self.progress.total_tokens, self.progress.total_steps = settings.tokens, self.steps
        self.record("shortened", total_tokens=settings.tokens, cooldown_tokens=settings.cooldown_tokens, time=_now())
        self.progress.note(
            f"slower than planned: the run now ends at step {self.steps:,} ({plural(settings.tokens, 'token')}), "
            "to end in time"
        )
        self.save(cut_from=before)  # a kill between the two is no edit of config.yaml
        write_config(self.config, self.of.folder / "config.yaml")

    def step_numbers(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """What metrics.jsonl says of a step."""
        rate = metrics.tokens_per_second(self.train.batch_tokens, seconds)
        matrix_lr = self.train.matrix_lr
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr_scale": result.lr_scale,
            "lr": self.train.lr * result.lr_scale,
            "matrix_lr": None if matrix_lr is None else matrix_lr * result.lr_scale,
            "tokens_per_second": rate,
            "matmul_share": metrics.matmul_share(self.flops_per_token or math.nan, rate, self.matmul_rate),
            "step_seconds": seconds,
            "memory_bytes": runtime.peak_memory(self.device),
        }

    def explained(self, problem: NumericsError, batch: Batch, micro_batches: list[Batch]) -> NumericsError:
        """The refusal of a step with its place: step, documents, the first operation that is not finite."""
        causes = (guard.first_nonfinite(self.objective, self.model, part) for part in micro_batches)
        cause = next((c for c in causes if not c.startswith("not found")), "not found when the step was repeated")
        reason = (
            f"step {self.step + 1}: {problem}. First place: {cause}. Documents of the batch: {_some(batch.documents)}"
        )
        self.record("stop", reason=reason, time=_now())
        path, _ = checkpoint.latest(self.folder)
        kept = f"The last good state is {path}" if path else "No checkpoint has been saved yet"
        skipped = ",".join(map(str, sorted({*self.skipped, self.step + 1})))
        ways = [f"without this batch: {_command(self.folder)} train.skip_batches={skipped}"]
        if self.model.compute_dtype != torch.float32:
            ways.append(f"in float32: {_command(self.folder)} train.precision=float32")
        if path:
            lower = f"train.lr={self.train.lr / 2:g}"
            ways.append(f"with a lower learning rate: {_command(self.folder)} --fork {self.fork} {lower}")
        return NumericsError(f"{reason}. {kept}. To continue " + "; or ".join(ways))

    def measured(self, max_tokens: int | None) -> Evaluation:
        return evaluate(self.model, self.dataset, self.train.micro_batch_tokens, max_tokens, self.objective)

    def evaluate(self, max_tokens: int | None) -> dict[str, Any]:
        """Held-out loss, recorded; the record."""
        found = self.measured(max_tokens)
        record = self.record(
            "eval", loss=found.loss, perplexity=found.perplexity, bits_per_byte=found.bits_per_byte,
            eval_tokens=found.tokens, eval_bytes=found.bytes, part=found.part, seconds=found.seconds,
        )  # fmt: skip
        self.took["evaluation"] = found.seconds / found.tokens
        return record

    def sample(self) -> None:
        """Samples, recorded; the first is shown."""
        if self.sampler is None:
            return
        began = time.perf_counter()
        records = [
            {"step": self.step, "tokens": self.tokens, **sample} for sample in self.sampler(self.model, self.step)
        ]
        for record in records:
            self.samples.append(record)
            if self.listener is not None:
                self.listener({"kind": "sample", **record})
        if records:
            self.progress.sample(records[0])
        self.took["sample"] = time.perf_counter() - began

    def save(self, cut_from: dict[str, Any] | None = None) -> None:
        """A checkpoint of everything that the next step depends on; older ones go, unless the run is in trouble.

        cut_from: the settings of a run that has just been made shorter.
        """
        began = time.perf_counter()
        groups = {
            "model": dict(self.model.state_dict()),
            "optimizer": state_tensors(self.optimizer, self.model),
            "random": runtime.random_state(),
        }
        guard.require_finite({"weight": groups["model"], "optimizer": groups["optimizer"]}, f"step {self.step}")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "data": self.dataset.fingerprint,
            "data_folder": self.dataset.path.name,
            "tokenizer": self.dataset.tokenizer.digest,
            "origin": self.origin,
            "watch": self.watch.state(),
            "config": config_dict(self.config),
        } | ({} if cut_from is None else {"cut_from": cut_from})
        if self.step:  # a checkpoint stands on the records before it
            self.log.sync()
            self.samples.sync()
        path = checkpoint.save(self.folder, self.step, groups, state)
        if not self.step:
            return
        if self.watch.calm:
            checkpoint.prune(self.folder, self.train.keep_checkpoints, resume.last_step_before_cooldown(self.config))
        self.took["save"] = time.perf_counter() - began
        size = sum(file.stat().st_size for file in path.iterdir())
        name = path.relative_to(self.folder).as_posix()
        self.progress.save(self.record("save", path=name, bytes=size, seconds=time.perf_counter() - began))

    def restore(self, weights: Run | None = None) -> resume.Start:
        """Take up the newest checkpoint, if there is one; a new run may start from the weights of another."""
        start = resume.take_up(self.of, self.config, self.dataset)
        if start.checkpoint is not None:
            try:
                self.load(start.checkpoint)
            except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as problem:
                reason = f"{type(problem).__name__}: {problem}"
                raise CheckpointError(
                    f"the checkpoint {start.checkpoint.path} does not fit this run: {reason}"
                ) from None
        elif weights is not None:
            found = weights.read(("model",))
            checkpoint.restore(self.model.state_dict(), found.tensors["model"], found.path, "model")
            self.origin = f"weights of {found.path}"
            start.notes.append(f"new run with the {self.origin}")
            self.save()  # so that a start that is killed has these weights too
        return start

    def load(self, found: checkpoint.Checkpoint) -> None:
        """The state of everything that the next step depends on."""
        checkpoint.restore(self.model.state_dict(), found.tensors["model"], found.path, "model")
        load_state_tensors(self.optimizer, self.model, found.tensors["optimizer"])
        runtime.set_random_state(found.tensors["random"])
        self.watch = guard.Watch(found.state["watch"], math.log(self.config.model.vocab_size))
        self.step, self.tokens, self.origin = found.state["step"], found.state["tokens"], found.state.get("origin")

    def on_signal(self, number: int) -> None:
        """First signal: finish the step and save. Second: stop at once."""
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number  # and no more: what prints may be in the middle of printing

    def stop(self, saved: int) -> None:
        assert self.stop_signal is not None
        self.record("stop", reason=_signal_name(self.stop_signal), time=_now())
        raise Stopped(f"stopped at step {saved} of {self.steps}, saved. Resume with: {_command(self.folder)}")


def _command(run: Path) -> str:
    """What a user types to resume the run."""
    return f"kiem train {shell_word(run)}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
