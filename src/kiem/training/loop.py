"""The loop of a run: batches into steps, and around them what a person sees and what lets the run survive.

At the end of a step, in this order: its record, an evaluation, a sample, a checkpoint. So a checkpoint of step k
stands after every record up to k, and a resume that drops the records after k writes them again, equal.
"""

import json
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from kiem import runtime
from kiem.config.read import config_dict, write_config
from kiem.config.run import RunConfig
from kiem.data.loader import Batch, Loader
from kiem.data.shards import Dataset
from kiem.errors import NumericsError, Stopped
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.optim.state import load_state_tensors, state_tensors
from kiem.runs import checkpoint, metrics
from kiem.training import guard
from kiem.training.evaluate import Evaluation, evaluate
from kiem.training.objective import NextToken
from kiem.training.progress import Progress
from kiem.training.step import StepResult, train_step

Sampler = Callable[[Transformer, int], list[dict[str, Any]]]  # (model, step) -> records of samples.jsonl
Listener = Callable[[dict[str, Any]], None]  # takes every record of metrics.jsonl and samples.jsonl


def train(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    *,
    plan: dict[str, Any] | None = None,
    sampler: Sampler | None = None,
    listener: Listener | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Train from the newest whole checkpoint in `folder` (or from the start) to the last token; return the final
    evaluation.

    config: resolved. plan: contents of plan.json. Ctrl-C and SIGTERM end the step, save, and raise Stopped;
    NumericsError, StorageError, BusyError, CheckpointError and DataError as their names say.
    """
    runtime.set_up_process()
    # What cannot work fails here, before there is a folder.
    flops = None if plan is None else plan["flops_per_token"]["total_flops"]
    trainer = Trainer(config, folder, dataset, sampler, listener, flops)
    with checkpoint.lock(folder):
        notes = trainer.restore()
        write_facts(config, folder, dataset, plan)
        return trainer.run(Progress(config.train.tokens, trainer.steps, tokens=trainer.tokens, quiet=quiet), notes)


def write_facts(config: RunConfig, folder: Path, dataset: Dataset, plan: dict[str, Any] | None) -> None:
    """What a run folder says of itself besides its progress: config.yaml, tokenizer/, plan.json."""
    write_config(config, folder / "config.yaml")
    dataset.tokenizer.save(folder / "tokenizer")
    if plan is not None:
        text = json.dumps(plan, indent=1)
        (folder / "plan.json").write_text(text, encoding="utf-8")


class Trainer:
    """One process at work on one run folder. The folder is touched from `restore` on, and must be locked by then."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        dataset: Dataset,
        sampler: Sampler | None,
        listener: Listener | None,
        flops_per_token: int | None = None,
    ):
        self.config, self.folder, self.dataset = config, folder, dataset
        self.sampler, self.listener = sampler, listener
        self.train, context = config.train, config.model.context_length
        self.objective = NextToken(documents_apart=not config.data.cross_document_attention)
        self.device = runtime.select_device(config.device)
        dtype = runtime.select_precision(self.train.precision, self.device)
        self.loader = Loader(dataset, context, self.train.batch_tokens // context, config.seed)
        self.steps = self.train.tokens // self.train.batch_tokens
        self.model = Transformer(config.model, dtype, self.train.activation_checkpointing)
        self.model.initialise(config.seed, self.train.init).to(self.device)
        self.optimizer = build_optimizer(self.model, self.train)
        if self.train.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        runtime.seed_everything(config.seed)
        self.watch = guard.Watch()
        self.step, self.tokens = 0, 0  # updates done, training tokens seen
        self.stop_signal = None
        self.log = metrics.MetricsLog(folder / "metrics.jsonl")
        self.samples = metrics.JsonLines(folder / "samples.jsonl")
        self.matmul_rate = runtime.matmul_rate(self.device, dtype)
        self.flops_per_token = flops_per_token

    def run(self, progress: Progress, notes: list[str]) -> Evaluation:
        """From where `restore` left off to the end. `notes` are shown first."""
        self.progress = progress
        with self.progress, self.log, self.samples, runtime.deferred_signals(self.on_signal):
            for note in notes:
                self.progress.note(note)
            self.record("start", reason="resumed" if self.step else "new", time=_now())
            if self.step == 0:
                self.sample()
            saved, final = self.step, None
            while self.step < self.steps:
                self.one_step()
                last = self.step == self.steps
                if last:
                    final = self.evaluate(None)
                elif self.step % self.train.eval_every == 0:
                    self.evaluate(self.train.eval_tokens)
                if self.step % self.train.sample_every == 0 or last:
                    self.sample()
                if self.step % self.train.save_every == 0 or last or self.stop_signal:
                    self.save()
                    saved = self.step
                if self.stop_signal and not last:
                    self.stop(saved)
            self.record("end", reason="finished", time=_now())
        return final or self.measured(None)

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
        batch = self.loader.batch(self.step).to(self.device)
        micro_batches = batch.micro(self.train.micro_batch_tokens // self.config.model.context_length)
        try:
            result = train_step(self.objective, self.model, self.optimizer, micro_batches, self.train, self.tokens)
        except NumericsError as problem:
            raise self.explained(problem, batch, micro_batches) from problem
        self.step += 1
        self.tokens += batch.tokens_BT.numel()
        self.progress.step(self.record("step", **self.step_numbers(result, time.perf_counter() - began)))
        verdict = self.watch.add(self.step, result.loss, result.grad_norm)
        if verdict is not None and verdict.stop:
            self.record("stop", reason=verdict.reason, time=_now())
            raise NumericsError(
                f"step {self.step}: {verdict.reason}. The run was stopped; its checkpoints are kept. "
                f"Start a new run with a lower learning rate (train.lr {self.train.lr:g}), or look at the batch: "
                f"{_some(batch.documents)}"
            )
        if verdict is not None:
            self.progress.note(f"step {self.step}: {verdict.reason}")

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
        cause = next((c for c in causes if not c.startswith("not found")), "not found in a repetition of the step")
        reason = (
            f"step {self.step + 1}: {problem}. First place: {cause}. Documents of the batch: {_some(batch.documents)}"
        )
        self.record("stop", reason=reason, time=_now())
        path, _ = checkpoint.latest(self.folder)
        kept = f"The last good state is {path}" if path else "No checkpoint was saved yet"
        return NumericsError(f"{reason}. {kept}. Lower train.lr, or train in float32, if this comes back.")

    def measured(self, max_tokens: int | None) -> Evaluation:
        return evaluate(self.model, self.dataset, self.train.micro_batch_tokens, max_tokens, self.objective)

    def evaluate(self, max_tokens: int | None) -> Evaluation:
        """Held-out loss, recorded and shown."""
        found = self.measured(max_tokens)
        record = self.record(
            "eval", loss=found.loss, perplexity=found.perplexity, bits_per_byte=found.bits_per_byte,
            eval_tokens=found.tokens, eval_bytes=found.bytes, seconds=found.seconds,
        )  # fmt: skip
        self.progress.eval(record)
        return found

    def sample(self) -> None:
        """Samples, recorded; the first is shown."""
        if self.sampler is None:
            return
        records = [
            {"step": self.step, "tokens": self.tokens, **sample} for sample in self.sampler(self.model, self.step)
        ]
        for record in records:
            self.samples.append(record)
            if self.listener is not None:
                self.listener({"kind": "sample", **record})
        if records:
            self.progress.sample(records[0])

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on; older ones go, unless the run is in trouble."""
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
            "watch": self.watch.state(),
            "config": config_dict(self.config),
        }
        path = checkpoint.save(self.folder, self.step, groups, state)
        if self.watch.calm:
            checkpoint.prune(self.folder, self.train.keep_checkpoints)
        size = sum(file.stat().st_size for file in path.iterdir())
        name = path.relative_to(self.folder).as_posix()
        self.progress.save(self.record("save", path=name, bytes=size, seconds=time.perf_counter() - began))

    def restore(self) -> list[str]:
        """Take up the newest whole checkpoint, if there is one. Returns what to say about it."""
        path, tensors, state, problems = checkpoint.load_latest(self.folder)
        notes = [f"passed over: {problem}" for problem in problems]
        if path is not None:
            checkpoint.check_config(state, config_dict(self.config), path)
            if state["data"] != self.dataset.fingerprint:
                raise checkpoint.CheckpointError(
                    f"{path} was trained on other data (fingerprint {state['data'][:12]}, "
                    f"now {self.dataset.fingerprint[:12]}): "
                    "the text or the tokenizer has changed. Restore it, or start a new run"
                )
            checkpoint.restore(self.model.state_dict(), tensors["model"], path, "model")
            load_state_tensors(self.optimizer, self.model, tensors["optimizer"])
            runtime.set_random_state(tensors["random"])
            self.watch = guard.Watch(state["watch"])
            self.step, self.tokens = state["step"], state["tokens"]
            notes.append(f"resumed from {path.name}")
        elif problems:
            notes.append("no whole checkpoint is left: training starts from the beginning")
        self.log.truncate(self.step)
        self.samples.truncate(self.step or -1)  # from the beginning again, also with the samples before training
        return notes

    def on_signal(self, number: int) -> None:
        """First signal: finish the step and save. Second: stop at once."""
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number
        self.progress.note("stopping after this step (again: at once, without saving)")

    def stop(self, saved: int) -> None:
        self.record("stop", reason=f"signal {self.stop_signal}", time=_now())
        raise Stopped(f"stopped at step {saved} of {self.steps}, saved. Go on with: kiem train {self.folder}")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
