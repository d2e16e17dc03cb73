"""Passes of a training loop that repeat are kept once and counted.

A pass ends with an outermost backward call. A row of up to 16 passes that did the same operations at the same lines, on
the same shapes where gradients flow, as the row before is dropped from the graph; a row that so repeats counts as one
pass, so that loops in loops (a log line every ten steps, two networks in turn, accumulated gradients) are found as
well. What lives on from a dropped pass is known by its twin in the row that is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kiem.inspect.graph.model import Dropped, Pass, Repeat, Source
from kiem.inspect.record.state import RecordState
from kiem.inspect.record.values import ValueTable

PERIOD = 16
# Passes that never repeat: above so many operations in the graph, only so many are kept for each line of a backward.
MANY_OPS, KEPT = 10_000, 8


@dataclass(slots=True)
class _Row:
    """A pass, or a row of passes that repeats (`loop`). `repeats`: entries of the graph before it."""

    passes: list[Pass]
    parts: tuple
    loop: bool = False
    repeats: int = 0

    @property
    def key(self) -> tuple:
        """Equal for rows that do the same."""
        return self.parts, self.loop


class Folder:
    """Folds after each pass."""

    def __init__(self, state: RecordState, table: ValueTable):
        self._state, self._table = state, table
        self._rows: list[_Row] = []
        self._ended: Counter[Source] = Counter()  # passes that are kept, by the line of their backward
        self.dropped: Counter[Source] = Counter()

    def pass_ended(self) -> None:
        """Fold what repeats now that a pass has ended."""
        graph = self._state.graph
        ended = graph.end_pass()
        row = _Row([ended], (ended.signature(), ended.shapes(), ended.sizes()), repeats=len(graph.repeats))
        self._rows.append(row)
        line = ended.backwards[-1].source
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
                first = rows[-count - 1 : -count] if known else rows[-2 * count : -count]
                if self._take_out(first, rows[-count:]):
                    kept = [one for row in first for one in row.passes]
                    rows[-count - len(first) :] = [_Row(kept, last, True, first[0].repeats)]
                    return True
        return False

    def _take_out(self, first: list[_Row], again: list[_Row]) -> bool:
        """Drop the passes of rows that repeat those just before them. Not if a gradient flows between the two."""
        graph = self._state.graph
        kept, leaving = ([one for row in rows for one in row.passes] for rows in (first, again))
        if [one.sizes() for one in kept] != [one.sizes() for one in leaving] or not any(one.ops for one in leaving):
            return False
        made = {op.sequence for one in kept for op in one.ops if op.sequence is not None}
        if any(edge and edge[0] in made for one in leaving for op in one.ops for edge in op.edges):
            return False
        del graph.repeats[again[0].repeats :]
        ops = [op.index for one in kept for op in one.ops]
        place = ops[0], ops[-1]
        repeat = next((r for r in graph.repeats[first[0].repeats :] if (r.first, r.last) == place), None)
        if repeat is None:
            graph.repeats.append(repeat := Repeat(*place, 1))
        repeat.times += 1
        dropped = self._leave(leaving, kept)
        if self._state.observer is not None:
            self._state.observer.folded(dropped)
        return True

    def _drop(self, row: _Row, line: Source) -> None:
        """Let go of a pass that is one of many and like no other, unless something is wrong in it."""
        observer = self._state.observer
        if observer is not None and not observer.may_leave(row.passes):
            return
        self._rows.pop()
        self.dropped[line] += 1
        self._leave(row.passes, [])

    def _leave(self, passes: list[Pass], twins: list[Pass]) -> Dropped:
        dropped = self._state.graph.drop(passes, twins)
        self._table.forget(dropped)
        self._state.forget(dropped)
        return dropped
