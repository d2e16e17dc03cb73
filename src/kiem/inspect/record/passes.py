"""Steps of a training loop that repeat are kept once and counted.

A step ends with an outermost backward call. A row of up to 16 steps that did the same operations at the same lines, on
the same shapes where gradients flow, as the row before is taken out of the graph again; a row that so repeats counts as
one step, so that loops in loops (a log line every ten steps, two networks in turn, accumulated gradients) are found as
well. The values that live on are those of the row that is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kiem.inspect.graph.model import Repeat, Source

if TYPE_CHECKING:
    from kiem.inspect.record.recorder import Recorder

PERIOD = 16
# Steps that never repeat: above so many operations in the graph, only so many are kept for each line of a backward.
MANY_OPS, KEPT = 10_000, 8

Place = tuple[int, int, int]  # operations, values and backward calls before it


@dataclass(slots=True)
class _Row:
    """A step, or a row of steps that repeats (`loop`): where it begins, and what it consists of."""

    start: Place
    parts: tuple
    loop: bool = False
    repeats: int = 0  # entries of the graph before it

    @property
    def key(self) -> tuple:
        """Equal for rows that do the same."""
        return self.parts, self.loop


class Folder:
    """Folds after each step."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._rows: list[_Row] = []
        self._start: Place = (0, 0, 0)
        self._ended: Counter[Source] = Counter()  # steps that are kept, by the line of their backward
        self.dropped: Counter[Source] = Counter()

    @property
    def start(self) -> int:
        """The first operation of the step that is under way."""
        return self._start[0]

    def sign(self) -> int:
        """The same number for steps that did the same operations at the same lines so far."""
        ops = self._recorder.graph.ops[self._start[0] :]
        return hash(tuple((op.name, op.source, op.module, op.region, len(op.outputs)) for op in ops))

    def step_ended(self) -> None:
        """Fold what repeats now that a step has ended."""
        graph, start = self._recorder.graph, self._start
        shapes = hash(tuple((v.shape, v.dtype) for v in graph.values[start[1] :] if v.requires_grad))
        sign = self.sign(), shapes
        self._start = len(graph.ops), len(graph.values), len(graph.backwards)
        row = _Row(start, (*sign, _difference(self._start, start)), repeats=len(graph.repeats))
        self._rows.append(row)
        line = graph.backwards[-1].source
        while self._fold():
            pass
        if self._rows and self._rows[-1] is row:
            self._ended[line] += 1
            if len(graph.ops) > MANY_OPS and self._ended[line] > KEPT:
                self._drop(row, line)

    def _fold(self) -> bool:
        """Whether the last rows repeated those before them, and left."""
        rows = self._rows
        for count in range(1, min(PERIOD, len(rows) - 1) + 1):
            last = tuple(row.key for row in rows[-count:])
            before = rows[-count - 1]
            known = before.loop and before.parts == last
            if known or (len(rows) >= 2 * count and tuple(row.key for row in rows[-2 * count : -count]) == last):
                first = before if known else rows[-2 * count]
                if self._take_out(first, rows[-count]):
                    place = rows.index(first)
                    rows[place:] = [_Row(first.start, last, True, first.repeats)]
                    return True
        return False

    def _take_out(self, first: _Row, again: _Row) -> bool:
        """Take the operations from `again` on out of the graph: they repeat those from `first` to there. Not if a
        gradient flows between the two."""
        recorder, graph = self._recorder, self._recorder.graph
        counts = _difference(again.start, first.start)
        if counts != _difference(self._start, again.start) or counts[0] == 0:
            return False
        made = {op.sequence for op in graph.ops[first.start[0] : again.start[0]] if op.sequence is not None}
        if any(edge and edge[0] in made for op in graph.ops[again.start[0] :] for edge in op.edges):
            return False
        del graph.repeats[again.repeats :]
        place = first.start[0], again.start[0] - 1
        repeat = next((r for r in graph.repeats[first.repeats :] if (r.first, r.last) == place), None)
        if repeat is None:
            graph.repeats.append(repeat := Repeat(*place, 1))
        repeat.times += 1
        self._cut(again.start)
        recorder.forget(again.start, counts[1])
        if recorder.observer is not None:
            recorder.observer.folded(again.start, counts)
        return True

    def _cut(self, start: Place) -> None:
        graph = self._recorder.graph
        del graph.ops[start[0] :], graph.values[start[1] :], graph.backwards[start[2] :]
        self._start = start

    def _drop(self, row: _Row, line: Source) -> None:
        """Let go of a step that is one of many and like no other, unless something is wrong in it."""
        recorder = self._recorder
        if recorder.observer is not None and not recorder.observer.dropped(row.start):
            return
        self._rows.pop()
        self.dropped[line] += 1
        self._cut(row.start)
        recorder.forget(row.start, None)


def _difference(one: Place, other: Place) -> Place:
    return one[0] - other[0], one[1] - other[1], one[2] - other[2]
