"""Backward calls: which nodes ran, in which order, with which gradients."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kiem.inspect.graph.layouts import batched
from kiem.inspect.graph.model import BackwardCall, Gradient, Op, Step
from kiem.inspect.graph.stats import gradient
from kiem.inspect.record import source
from kiem.inspect.record.source import hook_lines
from kiem.inspect.record.state import LOW, MADE_BY, Evidence, RecordState, compiling
from kiem.inspect.record.values import ValueTable

LEAF = "AccumulateGrad"


class BackwardHooks:
    """Wraps torch's engine: before each call it hangs a hook on every node that can be reached, and takes them off
    after. `ended`: called after an outermost call."""

    def __init__(self, state: RecordState, table: ValueTable, ended: Callable[[], None]):
        self._state, self._table, self._call_ended = state, table, ended
        self._gradients: dict[int, tuple[Callable[[], Any], int, Gradient]] = {}
        self._accumulated: list[torch.Tensor] = []  # leaves whose `.grad` the call that is under way changes
        self._left: dict[int, tuple[Callable[[], Any], tuple]] = {}  # what backward left in `.grad`, by parameter

    def wrap_engine(self) -> Callable[[], None]:
        """Record every backward call until the returned function is called."""
        original = torch.autograd._engine_run_backward

        def run(t_outputs, *args, **kwargs):
            if self._state.paused or compiling():
                return original(t_outputs, *args, **kwargs)
            if not self._state.records_here():
                self._state.note("A backward call in another thread is not recorded.", lost=True)
                return original(t_outputs, *args, **kwargs)
            return self._run(original, t_outputs, args, kwargs)

        torch.autograd._engine_run_backward = run

        def undo() -> None:
            torch.autograd._engine_run_backward = original

        return undo

    def watch_optimizers(self) -> Callable[[], None]:
        """Say when an optimizer is given other gradients than backward left, until the returned function is called."""

        def before(optimizer, _args, _kwargs) -> None:
            changed = 0
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    left = self._left.get(id(parameter))
                    if left is not None and left[0]() is parameter and left[1] != _state(parameter.grad):
                        changed += 1
            self._left.clear()
            if changed and not self._state.paused and self._state.records_here():
                self._state.note(
                    "Between a backward call and optimizer.step() gradients were changed (clipped, scaled, set): "
                    "what is explained and verified is what backward gave."
                )

        return register_optimizer_step_pre_hook(before).remove

    def _run(self, original, t_outputs, args: tuple, kwargs: dict):
        state = self._state
        frame, _ = state.lines.find(sys._getframe(2))
        wanted = tuple(args[3]) if len(args) > 3 and args[3] else ()
        call: BackwardCall | None = None
        handles: list[Any] = []
        if not state.running:
            for left_by_a_failure in (self._accumulated, state.local.kernels, state.local.nodes):
                left_by_a_failure.clear()
        with state.lock, state.looking("a backward call", frame):
            self._table.name_locals(frame)
            call = self._call([t for t in t_outputs if isinstance(t, torch.Tensor)], frame)
            call.partial = bool(wanted)
            call.retained = bool(args[1]) if len(args) > 1 else False
            for node, known in self._resolve(_reachable(t_outputs)).items():
                self._note_saved(node, known[1])
                handles += self._hang(call, node, *known)
        if call is not None:
            state.calls.append(call)
        local = state.local
        floor, local.floor = local.floor, len(local.parents)
        try:
            result = original(t_outputs, *args, **kwargs)
        finally:
            local.floor = floor
            if call is not None:
                state.calls.pop()
            for handle in handles:
                handle.remove()
        if call is not None:
            with state.looking("what a backward call gave", frame):
                self._ended(call, wanted, result)
        return result

    def _call(self, outputs: list[torch.Tensor], frame) -> BackwardCall:
        graph = self._state.graph
        roots = tuple(map(self._table.of, outputs))
        call = BackwardCall(graph.next_backward, source.at(frame), graph.next_op, roots, nested=self._state.running)
        call.transformed = torch._C._are_functorch_transforms_active()
        call.after_value = graph.next_value
        call.root_keys = tuple(map(self._table.edge, outputs, roots))
        graph.add_backward(call)
        return call

    def _ended(self, call: BackwardCall, wanted: tuple, result: Any) -> None:
        self._take_results(call, wanted, result)
        mark_hooks(call)
        if call.nested:
            return
        for parameter in self._accumulated:
            self._left[id(parameter)] = weakref.ref(parameter), _state(parameter.grad)
        self._gradients.clear()
        if self._state.observer is not None:
            self._state.observer.backward_ended(self._state, call)
        self._call_ended()

    def _resolve(self, nodes: list) -> dict[Any, tuple[tuple, Op | None, tuple]]:
        """Of each node its key, the operation whose derivative it is, and where its gradients go. `nodes`: those that
        a node leads to come before it."""
        found: dict[Any, tuple[tuple, Op | None, tuple]] = {}
        made = [op for node in nodes if (op := node.metadata.get(MADE_BY)) is not None]
        taken, numbers = {op.index for op in made}, {op.sequence for op in made}
        for place, node in enumerate(nodes):
            edges = tuple(
                None if following is None else _edge(found[following][0], number)
                for following, number in node.next_functions
            )
            if node.name().endswith(LEAF):
                found[node] = ("leaf", self._table.leaf(node.variable)), None, edges
                continue
            number, op = node._sequence_nr(), self._op_of(node, edges, taken)
            thread = self._state.numbers.number(0) if op is None or op.sequence is None else op.sequence & ~LOW
            key = thread | number
            if op is None and key in numbers:
                key = -1 - place  # of another thread, which gave it a number of ours
            numbers.add(key)
            found[node] = (key,), op, edges
        return found

    def _op_of(self, node, edges: tuple, taken: set[int]) -> Op | None:
        """The operation whose derivative a node is. One that no recorded operation has read the result of is known by
        its number, its name, and where it leads to."""
        state, number, name = self._state, node._sequence_nr(), _plain_name(node.name())
        op = node.metadata.get(MADE_BY)
        if op is not None and (op.index not in state.graph or not _alike(op, name)):
            op = None  # of a pass that left the graph; a node of torch.jit, which stands for many operations
        for index in state.by_sequence.get(number, ()) if op is None else ():
            known = state.graph.op(index)
            if index not in taken and _alike(known, name) and _same_ways(known.edges, edges):
                op = known
                break
        if op is None and name == "copyslices":
            # An operation changed a view in place; its own node, numbered just before, is inside.
            changing = (state.graph.op(i) for i in state.by_sequence.get(number - 1, ()))
            op = next((known for known in changing if known.mutates), None)
        if op is not None:
            op.node = "CopySlices" if name == "copyslices" else op.node or node.name()
        return op

    def _note_saved(self, node, op: Op | None) -> None:
        """What a node keeps, the first time that a backward call comes to it."""
        if op is None or op.saved or op.packed or op.kind == "compiled":
            return
        saved: dict[int, None] = {}
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                if name.startswith("_saved_") and not hasattr(type(node), "_raw" + name):
                    continue  # a number
                with contextlib.suppress(RuntimeError):
                    saved |= dict.fromkeys(map(self._table.of, _tensors(getattr(node, name))))
        op.saved = tuple(saved)

    def _hang(self, call: BackwardCall, node, key: tuple, op: Op | None, edges: tuple) -> tuple:
        state, local = self._state, self._state.local
        leaf = key[1] if key[0] == "leaf" else None
        if leaf is not None:
            state.graph.value(leaf).hooks = hook_lines(node.variable)
            self._accumulated.append(node.variable)

        def before(_into) -> None:
            local.kernels.append([])
            local.nodes.append(node)

        def after(out, into) -> None:
            kernels = local.kernels.pop() if local.kernels else []
            del local.nodes[-1:]
            with torch.no_grad(), state.looking(f"the gradient of {node.name()}", op.source if op else call.source):
                self._node_ran(call, node, key, op, edges, kernels, into, () if leaf is not None else out)

        if leaf is not None:
            # The accumulation's own outputs are none; its hook before sees the sum that is added to `.grad`.
            def both(into: tuple) -> None:
                before(into)
                after((), into)

            return (node.register_prehook(both),)
        return node.register_prehook(before), node.register_hook(after)

    def _node_ran(self, call: BackwardCall, node, key: tuple, op: Op | None, edges: tuple, kernels, into, out) -> None:
        state, leaf = self._state, key[1] if key[0] == "leaf" else None
        with state.lock:
            arrived, sent = (tuple(None if g is None else self._gradient(g) for g in some) for some in (into, out))
            step = Step(op.index if op else None, node.name(), key, leaf, arrived, sent, edges, kernels)
            call.steps.append(step)
            if leaf is not None and arrived[0] is not None:
                call.leaf_grads[leaf] = arrived[0]
        # A check runs backward itself, maybe in the thread that waits for the lock.
        if state.observer is not None:
            state.observer.node_ran(state, step, op, node, into, out)
        else:
            state.keep_gradients(Evidence(call, step, op, into, out))

    def _gradient(self, tensor: torch.Tensor) -> Gradient:
        """The record of a gradient; one that leaves a node and arrives at the next is looked at once."""
        known = self._gradients.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        record = gradient(tensor)
        self._gradients[id(tensor)] = (weakref.ref(tensor), tensor._version, record)
        return record

    def _take_results(self, call: BackwardCall, wanted: tuple, result: Any) -> None:
        """`autograd.grad` hands its gradients out instead of accumulating them."""
        if not isinstance(result, tuple):
            return
        for tensor, grad in zip(wanted, result, strict=False):
            if isinstance(grad, torch.Tensor) and batched(grad):
                self._state.note("Of many gradients at once (is_grads_batched) none is verified.", lost=True)
            elif isinstance(tensor, torch.Tensor) and isinstance(grad, torch.Tensor):
                value = self._table.leaf(tensor) if tensor.is_leaf else self._table.of(tensor)
                call.leaf_grads[value] = record = self._gradient(grad)
                if not call.nested and not call.transformed:
                    place = self._table.edge(tensor, value)
                    self._hand_out(call, Step(None, "autograd.grad", place, value, (record,), (), ()), grad)

    def _hand_out(self, call: BackwardCall, step: Step, grad: torch.Tensor) -> None:
        call.handed.append(step)
        if self._state.observer is not None:
            self._state.observer.handed_out(self._state, call, step, grad)
        else:
            self._state.keep_gradients(Evidence(call, step, None, (grad,), ()))


def _reachable(outputs) -> list:
    """Every node from the outputs down; those that a node leads to come before it."""
    stack, seen, nodes = [], set(), []
    for tensor in outputs:
        if not isinstance(tensor, torch.Tensor):
            node = getattr(tensor, "node", None)  # a GradientEdge
        else:
            node = torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None
        if node is not None:
            stack.append((node, False))
    while stack:
        node, done = stack.pop()
        if done:
            nodes.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return nodes


def _edge(key: tuple, number: int) -> tuple:
    return key if key[0] == "leaf" else (key[0], number)


def _state(grad: torch.Tensor | None) -> tuple:
    """Differs once a gradient is another tensor or was changed."""
    return (None,) if grad is None else (id(grad), grad._version)


def _alike(op: Op, node: str) -> bool:
    """Whether a node may be of an operation, by its plain name."""
    name = _plain_name(op.label)
    return op.kind != "op" or name.startswith(node) or node.startswith(name)


def _same_ways(recorded: tuple, edges: tuple) -> bool:
    """Whether a node and an operation send a gradient to the same place."""
    one, other = {e for e in recorded if e}, {e for e in edges if e}
    return not one or not other or bool(one & other)


def mark_hooks(call: BackwardCall) -> None:
    """Where the contributions to a node's gradient do not add up to what arrived, a hook changed it."""
    seeded = set(call.root_keys)
    for step, position, total, size, count in joins(call):
        if (step.key if step.leaf is not None else (step.key[0], position)) in seeded:
            continue  # more arrived there than its users sent: what the call began with
        arrived = step.into[position]
        if arrived is None or arrived.sketch.shape != total.shape:
            continue
        if not adds_up(total, size, arrived, count):
            step.changed_by_hook = True


def joins(call: BackwardCall):
    """(step, output position, sum of the sketches sent to it, sum of their norms, how many) for each gradient that
    arrived from other nodes."""
    sums: dict[tuple, tuple[torch.Tensor, float, int]] = {}
    for step in (*call.steps, *call.handed):
        key = step.key if step.leaf is None else None
        for position in range(len(step.into)):
            place = (key[0], position) if key else step.key
            if place in sums:
                yield step, position, *sums[place]
        for edge, gradient_ in zip(step.edges, step.out, strict=False):
            if edge is not None and gradient_ is not None:
                known = sums.get(edge)
                if known is None:
                    sums[edge] = gradient_.sketch, gradient_.stats.norm, 1
                elif known[0].shape == gradient_.sketch.shape:
                    sums[edge] = known[0] + gradient_.sketch, known[1] + gradient_.stats.norm, known[2] + 1


def adds_up(total: torch.Tensor, size: float, arrived: Gradient, count: int) -> bool:
    """Whether contributions, of norms whose sum is `size`, give what arrived, up to the rounding of their sums (a sum
    of n numbers by halves: log2 n roundings of terms whose root mean square is the norm's)."""
    unit = torch.finfo(arrived.dtype).eps if arrived.dtype.is_floating_point else 1e-6
    numel = max(int(torch.Size(arrived.shape).numel()), 2)
    scale = max(arrived.stats.norm, size)  # contributions may cancel
    bound = unit * (4 * count + numel.bit_length()) * scale
    error = float((total - arrived.sketch).abs().max()) if total.numel() else 0.0
    return not error > bound or arrived.stats.nonfinite > 0


def _plain_name(name: str) -> str:
    """`SoftmaxBackward0` and `_softmax` are both softmax."""
    name = name.rsplit("::", 1)[-1]
    if "Backward" in name:
        name = name[: name.rindex("Backward")]
    return name.replace("_", "").lower()


def _tensors(saved: Any) -> list[torch.Tensor]:
    if isinstance(saved, torch.Tensor):
        return [saved]
    return [t for t in saved if isinstance(t, torch.Tensor)] if isinstance(saved, list | tuple) else []
