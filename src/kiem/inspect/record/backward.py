"""Backward calls: which nodes ran, in which order, with which gradients."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kiem.inspect.graph.model import BackwardCall, Gradient, Op, Step, gradient, statistics
from kiem.inspect.record import source
from kiem.inspect.record.threads import LOW, MADE_BY

if TYPE_CHECKING:
    from kiem.inspect.record.recorder import Recorder

LEAF = "AccumulateGrad"


class BackwardHooks:
    """Wraps torch's engine: before each call it hangs a hook on every node that can be reached, and takes them off
    after."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._calls: list[BackwardCall] = []
        self._gradients: dict[int, tuple[weakref.ref, int, Gradient]] = {}
        self._accumulated: list[torch.Tensor] = []  # leaves whose `.grad` the call that is under way changes
        self._left: dict[int, tuple[weakref.ref, tuple]] = {}  # what backward left in `.grad`, by parameter
        self.evidence: list[tuple] = []  # (call, step, op, into, out): real gradients, held for a later verification

    @property
    def running(self) -> bool:
        """Whether a backward call is under way."""
        return bool(self._calls)

    @property
    def current(self) -> BackwardCall:
        """The innermost call that is under way."""
        return self._calls[-1]

    @property
    def kernels(self) -> list[str]:
        """Operations of the node that runs now."""
        kernels = self._recorder.local.kernels
        return kernels[-1] if kernels else []

    def wrap_engine(self) -> Callable[[], None]:
        """Record every backward call until the returned function is called."""
        original = torch.autograd._engine_run_backward

        def run(t_outputs, *args, **kwargs):
            if self._recorder.local.paused or compiling():
                return original(t_outputs, *args, **kwargs)
            if not source.records_here(self._recorder):
                self._recorder.note("A backward call in another thread is not recorded.")
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
            if changed and not self._recorder.local.paused and source.records_here(self._recorder):
                self._recorder.note(
                    "Between a backward call and optimizer.step() gradients were changed (clipped, scaled, set): "
                    "what is explained and verified is what backward gave."
                )

        return register_optimizer_step_pre_hook(before).remove

    def _run(self, original, t_outputs, args: tuple, kwargs: dict):
        recorder = self._recorder
        frame, _ = recorder.lines.find(sys._getframe(2))
        wanted = tuple(args[3]) if len(args) > 3 and args[3] else ()
        call, handles = None, []
        if not self._calls:
            for left_by_a_failure in (self._accumulated, recorder.local.kernels, recorder.local.nodes):
                left_by_a_failure.clear()
        with recorder.pause(), recorder.lock, recorder.looking("a backward call", frame):
            recorder.table.name_locals(frame)
            call = self._call([t for t in t_outputs if isinstance(t, torch.Tensor)], frame)
            call.partial = bool(wanted)
            call.retained = bool(args[1]) if len(args) > 1 else False
            for node, known in self._resolve(_reachable(t_outputs)).items():
                self._note_saved(node, known[1])
                handles += self._hang(call, node, *known)
        if call is not None:
            self._calls.append(call)
        local = recorder.local
        floor, local.floor = local.floor, len(local.parents)
        try:
            result = original(t_outputs, *args, **kwargs)
        finally:
            local.floor = floor
            if call is not None:
                self._calls.pop()
            for handle in handles:
                handle.remove()
        if call is not None:
            with recorder.pause(), recorder.looking("what a backward call gave", frame):
                self._ended(call, wanted, result)
        return result

    def _call(self, outputs: list[torch.Tensor], frame) -> BackwardCall:
        recorder, graph = self._recorder, self._recorder.graph
        roots = tuple(map(recorder.table.of, outputs))
        call = BackwardCall(graph.next_backward, source.at(frame), graph.next_op, roots, nested=self.running)
        call.transformed = torch._C._are_functorch_transforms_active()
        call.root_keys = tuple(map(recorder.table.edge, outputs, roots))
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
        if self._recorder.observer is not None:
            self._recorder.observer.backward_ended(self._recorder, call)
        self._recorder.step_ended()

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
                found[node] = ("leaf", self._recorder.table.leaf(node.variable)), None, edges
                continue
            number, op = node._sequence_nr(), self._op_of(node, edges, taken)
            key = self._recorder.numbers.number(number) if op is None else op.sequence & ~LOW | number
            if op is None and key in numbers:
                key = -1 - place  # of another thread, which gave it a number of ours
            numbers.add(key)
            found[node] = (key,), op, edges
        return found

    def _op_of(self, node, edges: tuple, taken: set[int]) -> Op | None:
        """The operation whose derivative a node is. One that no recorded operation has read the result of is known by
        its number, its name, and where it leads to."""
        graph, number, name = self._recorder.graph, node._sequence_nr(), _plain_name(node.name())
        op = node.metadata.get(MADE_BY)
        if op is not None and not _alike(op, name):
            op = None  # a node of torch.jit, which stands for many operations
        for index in self._recorder.by_sequence.get(number, ()) if op is None else ():
            known = graph.op(index)
            if index not in taken and _alike(known, name) and _same_ways(known.edges, edges):
                op = known
                break
        if op is None and name == "copyslices":
            # An operation changed a view in place; its own node, numbered just before, is inside.
            changing = (graph.op(i) for i in self._recorder.by_sequence.get(number - 1, ()))
            op = next((known for known in changing if known.mutates), None)
        if op is not None:
            op.node = "CopySlices" if name == "copyslices" else op.node or node.name()
        return op

    def _note_saved(self, node, op: Op | None) -> None:
        recorder = self._recorder
        if op is None or op.packed or op.kind == "compiled":
            return
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                if name.startswith("_saved_") and not hasattr(type(node), "_raw" + name):
                    continue  # a number
                with contextlib.suppress(RuntimeError):
                    for tensor in _tensors(getattr(node, name)):
                        value = recorder.graph.value(recorder.table.of(tensor))
                        if op.index not in value.saved_by:
                            value.saved_by.append(op.index)

    def _hang(self, call: BackwardCall, node, key: tuple, op: Op | None, edges: tuple) -> tuple:
        recorder = self._recorder
        leaf = key[1] if key[0] == "leaf" else None
        if leaf is not None:
            recorder.graph.value(leaf).hooks = hook_lines(node.variable)
            self._accumulated.append(node.variable)

        def before(_into) -> None:
            recorder.local.kernels.append([])
            recorder.local.nodes.append(node)

        def after(out, into) -> None:
            kernels = recorder.local.kernels.pop() if recorder.local.kernels else []
            del recorder.local.nodes[-1:]
            where = op.source if op else call.source
            with recorder.pause(), torch.no_grad(), recorder.looking(f"the gradient of {node.name()}", where):
                with recorder.lock:
                    step = Step(
                        op.index if op else None, node.name(), key, leaf, tuple(map(self._gradient, into)),
                        () if leaf is not None else tuple(map(self._gradient, out)), edges, kernels,
                    )  # fmt: skip
                    call.steps.append(step)
                    if leaf is not None and into[0] is not None:
                        call.leaf_grads[leaf] = step.into[0]
                # A check runs backward itself, maybe in the thread that waits for the lock.
                if recorder.observer is not None:
                    recorder.observer.node_ran(recorder, step, op, node, into, out)
                elif recorder.kept.limit != 0:
                    size = sum(g.numel() * g.itemsize for g in (*into, *out) if g is not None)
                    if recorder.kept.claim(size):
                        self.evidence.append((call, step, op, into, () if leaf is not None else out))
                    else:
                        self.evidence.clear()

        if leaf is not None:
            # The accumulation's own outputs are none; its hook before sees the sum that is added to `.grad`.
            return (node.register_prehook(lambda into: (before(into), after((), into))[0]),)
        return node.register_prehook(before), node.register_hook(after)

    def _gradient(self, tensor: torch.Tensor | None) -> Gradient | None:
        """The record of a gradient; one that leaves a node and arrives at the next is looked at once."""
        if tensor is None:
            return None
        known = self._gradients.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        record = gradient(tensor, statistics(tensor))
        self._gradients[id(tensor)] = (weakref.ref(tensor), tensor._version, record)
        return record

    def _take_results(self, call: BackwardCall, wanted: tuple, result: Any) -> None:
        """`autograd.grad` hands its gradients out instead of accumulating them."""
        if not isinstance(result, tuple):
            return
        for tensor, grad in zip(wanted, result, strict=False):
            if isinstance(tensor, torch.Tensor) and grad is not None:
                value = self._recorder.table.leaf(tensor) if tensor.is_leaf else self._recorder.table.of(tensor)
                call.leaf_grads[value] = self._gradient(grad)


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


def compiling() -> bool:
    """Whether torch.compile is tracing: it runs operations, and backward calls, on tensors without elements."""
    return torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling()


def hook_lines(tensor: torch.Tensor) -> tuple[str, ...]:
    """Where the functions hung on a tensor are defined."""
    found = []
    for hooks in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)):
        for hook in (hooks or {}).values():
            code = getattr(hook, "__code__", None)
            known = code and source.source_of(code.co_filename, code.co_firstlineno, code.co_qualname)
            found.append(str(known) if known else repr(hook))
    return tuple(found)


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
    for step in call.steps:
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
