"""The numbers of backward passes, from 1, in the order in which they ran: those that were folded into another count.

Passes are alike if they ran the same nodes from the same line to the same leaves, whatever an optimizer does in between
(Adam creates its state in the first step only)."""

from __future__ import annotations

from dataclasses import dataclass

from kiem.inspect.graph.model import BackwardCall, Graph, Repeat


@dataclass(slots=True)
class Ran:
    """A backward call that the graph keeps. It stands for `times` passes: `number`, `number + every`, ..."""

    call: BackwardCall
    number: int
    times: int = 1
    every: int = 1

    @property
    def last(self) -> int:
        """The number of the last pass that it stands for."""
        return self.number + (self.times - 1) * self.every


def numbered(graph: Graph) -> list[Ran]:
    """All backward calls of the graph with their numbers."""
    found: list[Ran] = []
    _number(graph.backwards, graph.repeats, 1, found)
    return found


def _number(calls: list[BackwardCall], repeats: list[Repeat], number: int, found: list[Ran]) -> int:
    """Append `calls`, the first of which has this number, and return the number that comes after them."""
    at = 0
    while at < len(calls):
        around = [r for r in repeats if _holds(r, calls[at])]
        if not around:
            found.append(Ran(calls[at], number))
            number, at = number + 1, at + 1
            continue
        loop = max(around, key=lambda r: r.last - r.first)
        body = [call for call in calls[at:] if _holds(loop, call)]
        inner = [r for r in repeats if r is not loop and loop.first <= r.first and r.last <= loop.last]
        begin = len(found)
        length = _number(body, inner, number, found) - number
        for one in found[begin:]:
            one.every = length if one.times == 1 else one.every
            one.times *= loop.times
        number, at = number + length * loop.times, at + len(body)
    return number


def _holds(repeat: Repeat, call: BackwardCall) -> bool:
    return repeat.first < call.after_op <= repeat.last + 1


def alike(graph: Graph) -> list[list[Ran]]:
    """Backward calls that do the same, together; in the order of the first of each."""
    groups: dict[tuple, list[Ran]] = {}
    for one in numbered(graph):
        call = one.call
        nodes = tuple((s.node, None if s.leaf is None else graph.value(s.leaf).name, len(s.out)) for s in call.steps)
        groups.setdefault((call.source, call.partial, call.nested, nodes), []).append(one)
    return list(groups.values())


def numbers_text(ran: list[Ran]) -> str:
    """`pass 1`, `passes 1 to 3`, `passes 1, 3, … 39 (20)`."""
    first, last, count = ran[0].number, max(one.last for one in ran), sum(one.times for one in ran)
    if count == 1:
        return f"pass {first}"
    if count == 2 and last > first + 1:
        return f"passes {first} and {last}"
    if last - first + 1 == count:
        return f"passes {first} to {last}"
    second = ran[0].number + ran[0].every if ran[0].times > 1 else ran[1].number
    return f"passes {first}, {second}, … {last} ({count})"


def with_number(graph: Graph, number: int) -> int | None:
    """The place in `graph.backwards` of the call that stands for the pass of this number; None if there is none."""
    fitting = [
        (one.times, at)
        for at, one in enumerate(numbered(graph))
        if one.number <= number <= one.last and (number - one.number) % one.every == 0
    ]
    return min(fitting)[1] if fitting else None
