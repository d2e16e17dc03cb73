"""Steps of a training loop that repeat are kept once and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiem.grad.graph import Repeat

if TYPE_CHECKING:
    from kiem.grad.record import Recorder


class Folder:
    """A step ends with an outermost backward call. One that ran the same operations at the same lines with the same
    shapes as the step before is taken out of the graph again; the values that live on are those of the step that is
    kept."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._start = (0, 0, 0)  # ops, values, backward calls
        self._signature: tuple | None = None

    @property
    def start(self) -> int:
        """The first operation of the step that is under way."""
        return self._start[0]

    def _sign(self) -> tuple:
        graph = self._recorder.graph
        ops, values, calls = self._start
        return (
            *((op.name, op.source, op.module, op.region, len(op.outputs)) for op in graph.ops[ops:]),
            *((v.shape, v.dtype, v.producer is None) for v in graph.values[values:]),
            len(graph.backwards) - calls,
        )

    def passes(self, op: int) -> int:
        """How many passes of a loop that repeats came before the one of this operation; 0: it does not go on as they
        did."""
        graph = self._recorder.graph
        if not graph.repeats or graph.repeats[-1].last != self._start[0] - 1:
            return 0
        repeat = graph.repeats[-1]
        same = repeat.first + op - self._start[0]
        if not repeat.first <= same <= repeat.last:
            return 0
        now, before = graph.ops[op], graph.ops[same]
        return repeat.times if (now.name, now.source, now.module) == (before.name, before.source, before.module) else 0

    def repeats_now(self) -> bool:
        """Whether the step that is about to end repeats the one before, which repeats others already."""
        repeats = self._recorder.graph.repeats
        return bool(repeats) and repeats[-1].last == self._start[0] - 1 and self._sign() == self._signature

    def step_ended(self) -> None:
        """Fold the step that ends now if it repeats the one before."""
        recorder, graph = self._recorder, self._recorder.graph
        ops, values, calls = self._start
        here = (len(graph.ops), len(graph.values), len(graph.backwards))
        sign = self._sign()
        if sign != self._signature or here[0] == ops:
            self._signature, self._start = sign, here
            return
        count_ops, count_values = here[0] - ops, here[1] - values
        if graph.repeats and graph.repeats[-1].last == ops - 1:
            graph.repeats[-1].times += 1
        else:
            graph.repeats.append(Repeat(ops - count_ops, ops - 1, 2))
        del graph.ops[ops:], graph.values[values:], graph.backwards[calls:]
        recorder.forget(ops, values, count_values)
        if recorder.observer is not None:
            recorder.observer.folded(self._start, (count_ops, count_values, here[2] - calls))
