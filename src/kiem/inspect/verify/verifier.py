"""Hold every gradient of a running program against mathematics, while it runs and its tensors are still there."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch

from kiem.errors import ConfigError
from kiem.inspect.graph.model import BackwardCall, Dropped, Graph, Op, Pass, Source, Step
from kiem.inspect.record.state import RecordState
from kiem.inspect.verify.end_to_end import Unchecked, unlike_numbers, whole_verdicts
from kiem.inspect.verify.judge import InputVerdict
from kiem.inspect.verify.meant import without_hooks
from kiem.inspect.verify.nonfinite import backward_text, forward_verdict, nonfinite
from kiem.inspect.verify.operation import Verdict, check

PASSES = 3  # of a step of a loop that repeats
SECONDS = 20.0  # for further passes
BAD, SETTLED = ("wrong", "nonfinite"), ("ok", "kink", "zero")
CASES = 3  # wrong operations whose tensors are held for a program that shows the error


@dataclass
class Case:
    """The tensors of a wrong operation: its inputs by value and the gradients that arrived."""

    verdict: Verdict
    inputs: dict[int, torch.Tensor]
    into: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that was not checked. `kind`: node (a backward node that no recorded operation made), transform
    (torch.func), unrecorded, end to end, repeat (steps of a loop left out for time), program (it failed)."""

    kind: str
    text: str


@dataclass
class Result:
    """What verification found: verdicts per operation in the order of backward, per leaf end to end, and what was not
    checked."""

    verdicts: list[Verdict] = field(default_factory=list)
    parameters: list[tuple[int, InputVerdict]] = field(default_factory=list)  # backward call, verdict
    notes: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Verdict]:
        """Operations with a gradient that is wrong or not finite, the first that backward came to first."""
        return [v for v in self.verdicts if v.verdict in BAD]

    @property
    def wrong_parameters(self) -> list[InputVerdict]:
        """Leaves whose whole gradient is wrong or not finite."""
        return [v for _, v in self.parameters if v.verdict in BAD]

    @property
    def verdict(self) -> str:
        """right: every gradient was checked and is right. wrong: one is wrong or not finite. incomplete: none was found
        wrong, but something was not checked, or too coarsely to tell, or nothing was."""
        if self.wrong or self.wrong_parameters:
            return "wrong"
        checked = any(v.verdict in ("ok", "kink") for v in self.verdicts)
        coarse = "coarse" in [v.verdict for v in self.verdicts] + [v.verdict for _, v in self.parameters]
        missing = coarse or any(v.verdict == "unchecked" and not v.declared for v in self.verdicts)
        return "right" if checked and self.parameters and not missing and not self.gaps else "incomplete"

    @property
    def ok(self) -> bool | None:
        """True: right, False: wrong, None: incomplete."""
        return {"right": True, "wrong": False}.get(self.verdict)


class Verifier:
    """An observer of a Recorder. `result` fills as the program runs; `told` is called with a line on it."""

    def __init__(self, end_to_end: bool = True, told: Callable[[str], None] | None = None):
        self.result = Result()
        self._told, self._count, self._wrong, self._calls = told, 0, 0, 0
        self._end_to_end = end_to_end
        self._leaves: dict[tuple[int, int], torch.Tensor] = {}
        self._roots: dict[tuple[int, tuple], torch.Tensor] = {}
        self._done: set[int] = set()
        self._since: dict[int, int] = {}  # backward call that is under way -> verdicts when its last node had run
        self._passes: Counter[int] = Counter()  # steps that did the same
        self._outer: BackwardCall | None = None  # that is under way
        self._skip = False
        self._opaque: set[int] = set()  # operations of which not all of the inside was seen
        self._made: list[Verdict] = []  # operations that made a gradient that is not finite of finite ones
        self._nodes: dict[int, dict[str, None]] = {}  # backward call -> notes on nodes that nobody recorded
        self._left_out: Counter[Source] = Counter()

    def node_ran(self, state: RecordState, step: Step, op: Op | None, node, into: tuple, out: tuple) -> None:
        """Check the node at once: what its backward saved is as it was."""
        if self._skips(state, state.calls[-1]):
            if op is not None:
                self._done.add(op.index)
            return
        began = time.perf_counter()
        self.add(state, state.calls[-1], step, op, into, out, node)
        self.result.seconds += time.perf_counter() - began

    def handed_out(self, state: RecordState, call: BackwardCall, step: Step, gradient: torch.Tensor) -> None:
        """Hold what autograd.grad gave, for the end of the call."""
        if not self._skips(state, call):
            self.add(state, call, step, None, (gradient,), ())

    def _skips(self, state: RecordState, call: BackwardCall) -> bool:
        """Whether a call is left out: of steps that do the same, the first three, the fourth, the eighth, the 16th and
        so on are checked, and all while there is time. A call inside another one goes with it."""
        if call is not self._outer and not call.nested:
            sign = state.graph.passes[-1].signature()
            self._passes[sign] += 1
            count = self._passes[sign]
            rare = count > PASSES and count & (count - 1) != 0
            self._outer, self._skip = call, rare and self.result.seconds > SECONDS
            if self._skip:
                self._left_out[call.source] += 1
        return self._skip

    def add(self, state, call: BackwardCall, step: Step, op: Op | None, into: tuple, out: tuple, node=None) -> None:
        """Check one node of a call. `node`: it itself, as long as it can be run again."""
        if step.leaf is not None:
            if into[0] is not None:
                self._leaves[call.index, step.leaf] = into[0].detach()
            return
        for position, grad in enumerate(into):
            if grad is not None and (step.key[0], position) in call.root_keys:
                self._roots[call.index, (step.key[0], position)] = grad
        if call.transformed:
            text = f"What torch.func differentiates, on tensors of its own, is not checked ({call.source})."
            self._gap("transform", text)
            return
        if op is None:
            self._nodes.setdefault(call.index, {})[
                f"{step.node}: made by no recorded operation; not checked by itself"
            ] = None
            return
        self._done.add(op.index)
        verdict = check_safely(state.graph, call, op, step, state.kept.tensors, into, out)
        if verdict.verdict == "wrong" and op.kind == "function" and (inner := self._wrong_inside(call)) is not None:
            name, place = state.graph.op(inner.op).label, state.graph.op(inner.op).source
            verdict.verdict, verdict.text = "unchecked", f"its backward runs that of {name} at {place}, which is wrong"
        if verdict.verdict == "wrong" and node is not None and self._hooked(state, call, step, op, into, node):
            verdict.verdict, verdict.text = "hook", f"a hook on {op.node} changes the gradient"
            step.changed_by_hook = True
        self.result.verdicts.append(verdict)
        if verdict.opaque:
            self._opaque.add(op.index)
        if any(map(nonfinite, step.out)) and not any(map(nonfinite, step.into)):
            self._made.append(verdict)
        self._count, self._wrong = self._count + 1, self._wrong + (verdict.verdict in BAD)
        if self._told is not None:
            self._told(f"verifying: backward call {self._calls + 1:,}, {self._count:,} operations checked, "
                       f"{self._wrong} wrong")  # fmt: skip
        self._since[call.index] = len(self.result.verdicts)
        sources = {state.graph.op(case.verdict.op).source for case in self.result.cases}
        if verdict.verdict in BAD and len(sources) < CASES and op.source not in sources:
            held = state.kept.tensors
            inputs = {v: held[v].clone() for v in {v for _, v in op.inputs} if v in held}
            self.result.cases.append(Case(verdict, inputs, tuple(None if g is None else g.clone() for g in into)))

    def _hooked(self, state: RecordState, call: BackwardCall, step: Step, op: Op, into: tuple, node: Any) -> bool:
        """Whether a node whose gradient is wrong gives the right one by itself, so that a hook on it changed that."""
        out = without_hooks(op, node, into)
        if out is None:
            return False
        return check_safely(state.graph, call, op, step, state.kept.tensors, into, out).verdict in ("ok", "kink")

    def _wrong_inside(self, call: BackwardCall) -> Verdict | None:
        """What was found wrong in a backward call that the last node of this call made."""
        recent = self.result.verdicts[self._since.get(call.index, 0) :]
        return next((v for v in recent if v.verdict in BAD and v.backward > call.index), None)

    def backward_ended(self, state: RecordState, call: BackwardCall) -> None:
        """Check whole gradients; let go of what is no longer needed."""
        if not self._skips(state, call):
            began = time.perf_counter()
            self.end(state, call)
            self.result.seconds += time.perf_counter() - began
        self._calls += 1
        self._leaves.clear()
        self._roots.clear()
        self._since.clear()
        if not call.retained:
            state.release_done(self._done)

    def end(self, state: RecordState, call: BackwardCall) -> None:
        """Check the whole gradients of a call."""
        self._blame(state, call)
        covered = self._end_to_end and all([self._whole(state, one) for one in _with_nested(state.graph, call)])
        for note in (note for notes in self._nodes.values() for note in notes):
            # Autograd makes nodes of its own for views: where the whole is right, they are.
            self._note(note) if covered else self._gap("node", note)
        self._nodes.clear()

    def _blame(self, state: RecordState, call: BackwardCall) -> None:
        """Of a loss that is not finite, and of gradients that are not and reach a leaf or were asked for: where they
        were made. What is made and dropped again, as by a mask or a clamp, is as it should be."""
        graph, held = state.graph, state.kept.tensors
        bad = [v for v in call.roots if nonfinite(graph.value(v))]
        if bad:
            self.result.verdicts.insert(self._first(call), forward_verdict(graph, call, bad, held, "the loss itself"))
        if not bad and any(nonfinite(g) for c in _with_nested(graph, call) for g in c.leaf_grads.values()):
            for verdict in self._made:
                verdict.verdict = "nonfinite"
                verdict.text = backward_text(graph, graph.op(verdict.op), call, held)
        self._made.clear()

    def _first(self, call: BackwardCall) -> int:
        """Where the verdicts of a call begin."""
        found = (i for i, v in enumerate(self.result.verdicts) if v.backward >= call.index)
        return next(found, len(self.result.verdicts))

    def _whole(self, state: RecordState, call: BackwardCall) -> bool:
        """Whether every leaf of a call could be checked, and none is wrong."""
        leaves = {leaf: grad for (index, leaf), grad in self._leaves.items() if index == call.index}
        roots = {key: grad for (index, key), grad in self._roots.items() if index == call.index}
        if call.nested:  # what was made for this call alone is not what the program asks for
            outer = max(
                (c for c in state.graph.backwards if not c.nested and c.index < call.index), key=lambda c: c.index
            )
            leaves = {leaf: grad for leaf, grad in leaves.items() if leaf < outer.after_value}
        try:
            wrong = {v.op for v in self.result.wrong}
            verdicts, notes = whole_verdicts(state.graph, call, state.kept.tensors, leaves, roots, self._opaque, wrong)
        except Unchecked as reason:
            self.result.parameters += [(call.index, v) for v in unlike_numbers(state.graph, leaves)]
            self._gap("end to end", f"End to end not checked for the backward call at {call.source}: {reason}")
            return False
        self.result.parameters += [(call.index, v) for v in verdicts]
        for note in notes:
            self._note(note)
        missed = sorted(map(state.graph.title, set(leaves) - {v.value for v in verdicts}))
        if missed:
            more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
            self._gap(
                "end to end", f"End to end not checked: {', '.join(missed[:5])}{more}: read outside of what ran here"
            )
        return not missed and all(v.verdict in ("ok", "kink") for v in verdicts)

    def folded(self, dropped: Dropped) -> None:
        """Passes that repeat others left the graph: what was wrong in them stays, and what was not settled as it was in
        the others; told of the passes that are kept."""
        known = {(v.op, v.verdict) for v in self.result.verdicts}
        for verdict in self.result.verdicts:
            twin = dropped.ops.get(verdict.op)
            new = verdict.verdict not in SETTLED and (twin, verdict.verdict) not in known
            if twin is not None and (verdict.verdict in BAD or new):
                known.add((twin, verdict.verdict))
                verdict.op, verdict.backward = twin, dropped.backward(verdict.backward)
                for result in verdict.inputs:
                    result.value = dropped.value(result.value)
        for _, leaf in self.result.parameters:
            leaf.value = dropped.value(leaf.value)
        self.result.parameters = [
            (dropped.backward(call) if leaf.verdict in BAD else call, leaf) for call, leaf in self.result.parameters
        ]
        self._forget(dropped.ops, dropped.backwards)

    def may_leave(self, passes: list[Pass]) -> bool:
        """Whether nothing was wrong in passes, which leave the graph then."""
        ops, calls = {op.index for one in passes for op in one.ops}, {c.index for one in passes for c in one.backwards}
        if any(v.op in ops and v.verdict in BAD for v in self.result.verdicts):
            return False
        if any(call in calls and v.verdict in BAD for call, v in self.result.parameters):
            return False
        self._forget(ops, calls)
        return True

    def _forget(self, ops: Container[int], calls: Container[int]) -> None:
        self.result.verdicts = [v for v in self.result.verdicts if v.op not in ops]
        self.result.parameters = [(call, v) for call, v in self.result.parameters if call not in calls]
        self._done = {op for op in self._done if op not in ops}

    def ended(self) -> Result:
        """The result, with a note on what was left out."""
        for line, count in self._left_out.items():
            self._gap(
                "repeat",
                f"Of the steps up to {line} that do the same, the first {PASSES}, the 4th, 8th, 16th and so on were "
                f"checked; {count:,} were not.",
            )
        self._left_out.clear()
        return self.result

    def _gap(self, kind: str, text: str) -> None:
        """What was not checked, once."""
        if (gap := Gap(kind, text)) not in self.result.gaps:
            self.result.gaps.append(gap)
        self._note(text)

    def _note(self, note: str) -> None:
        if note not in self.result.notes:
            self.result.notes.append(note)


def _with_nested(graph: Graph, call: BackwardCall) -> list[BackwardCall]:
    """An outermost backward call and those inside it."""
    later = itertools.dropwhile(lambda c: c is not call, graph.backwards)
    return list(itertools.takewhile(lambda c: c is call or c.nested, later))


def check_safely(
    graph: Graph, call: BackwardCall, op: Op, step: Step, recorded: dict, into: tuple, out: tuple
) -> Verdict:
    """The verdict on one operation; what cannot be checked is said, and never ends the user's program."""
    try:
        verdict = check(graph, call, op, step, recorded, into, out)
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        verdict = Verdict(op.index, "unchecked", f"could not be checked: {reason}")
    verdict.backward = call.index
    return verdict


def verify_recorded(state: RecordState) -> Result:
    """Verify after the program has ended, from what the recorder kept. Raises ConfigError if it was too much to
    keep."""
    if not state.kept.complete:
        raise ConfigError(
            "kiem.record(): the program's tensors were too many to keep for a verification afterwards: verify "
            "by kiem.record(verify=True)"
        )
    verifier = Verifier()
    began = time.perf_counter()
    for call, step, op, into, out in state.evidence:
        verifier.add(state, call, step, op, into, out)
    for call in state.graph.backwards:
        if not call.nested:
            verifier.end(state, call)
    verifier.result.seconds = time.perf_counter() - began
    return verifier.result
