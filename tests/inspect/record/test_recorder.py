"""What a recording says of a program, and that the program does not notice."""

import gc
import json
import threading
import time
import weakref

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kiem.inspect.record.recorder import Recorder
from kiem.inspect.show.document import document
from kiem.inspect.show.summary import totals

HERE = __file__.rsplit("/", 1)[-1]


def recorded(function):
    """The recorder of a function that ran, and what the function gave."""
    torch.manual_seed(0)
    with Recorder() as recorder:
        result = function()
    return recorder, result


def ops(graph, label):
    return [op for op in graph.ops if op.label == label]


def line_of(text):
    """The only line of this file that holds a text as a comment."""
    with open(__file__) as file:
        found = [i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}")]
    assert len(found) == 1, found
    return found[0]


# -- names -------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Trainer(nn.Module):
    """Calls the parts of its network itself, as a training step may."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(3))

    def step(self, x):
        for block in self.blocks:
            x = block(x)
        return (x * self.scale).sum()


def test_names_are_those_of_variables_and_of_modules():
    def program():
        x = torch.randn(2, 3)
        net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))
        hidden = net(x)
        loss = hidden.sum()
        loss.backward()

    graph = recorded(program)[0].graph
    assert {"x", "hidden", "loss", "net.0.weight", "net.0.bias", "net.1.1.weight"} <= {v.name for v in graph.values}
    assert [(op.module, op.module_class) for op in ops(graph, "addmm")] == [("net.0", "Linear"), ("net.1.1", "Linear")]
    assert ops(graph, "tanh")[0].module == "net.1.0" and ops(graph, "sum")[0].module == ""
    assert graph.find("net.0.weight").is_parameter and graph.find("loss").producer is not None
    assert graph.find("nothing") is None


def test_a_tied_weight_has_one_name_and_one_leaf():
    def program():
        model = Tied()
        model(torch.tensor([1, 2])).sum().backward()
        return model

    recorder, model = recorded(program)
    graph = recorder.graph
    assert [v.name for v in graph.leaves()] == ["model.embed.weight"]
    (leaf,) = graph.backwards[0].leaf_grads
    assert graph.backwards[0].leaf_grads[leaf].stats.norm == pytest.approx(model.embed.weight.grad.norm().item())


def test_a_module_that_calls_its_parts_by_hand_names_them():
    def program():
        trainer = Trainer()
        trainer.step(torch.ones(2, 3)).backward()

    graph = recorded(program)[0].graph
    assert {v.name for v in graph.leaves()} == {
        "trainer.blocks.0.weight", "trainer.blocks.0.bias", "trainer.blocks.1.weight", "trainer.blocks.1.bias",
        "trainer.scale"}  # fmt: skip
    assert {op.module for op in ops(graph, "addmm")} == {"trainer.blocks.0", "trainer.blocks.1"}


def test_modules_of_a_plain_list_that_are_called_by_hand():
    def program():
        layers = [nn.Linear(3, 3) for _ in range(2)]
        x = torch.ones(1, 3)
        for layer in layers:
            x = layer(x)
        x.sum().backward()

    graph = recorded(program)[0].graph
    assert {v.name for v in graph.leaves()} == {f"layers[{i}].{p}" for i in (0, 1) for p in ("weight", "bias")}


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_what_a_tensor_is():
    def program():
        scalar = torch.tensor(2.0, requires_grad=True)
        vector = torch.arange(3.0)
        matrix = torch.ones(2, 3, dtype=torch.float64)
        cube = torch.zeros(2, 3, 4, dtype=torch.int16)
        turned = matrix.t()
        part = cube[1]
        return (scalar * vector, turned * 1, part + 1)

    graph = recorded(program)[0].graph
    facts = {n: graph.find(n) for n in ("scalar", "vector", "matrix", "cube", "turned", "part")}
    assert [facts[n].rank for n in ("scalar", "vector", "matrix", "cube")] == ["scalar", "vector", "matrix", "3-D"]
    assert facts["cube"].shape == (2, 3, 4) and facts["cube"].strides == (12, 4, 1) and facts["cube"].nbytes == 48
    assert facts["matrix"].dtype is torch.float64 and facts["matrix"].describe() == "float64[2, 3]"
    assert facts["scalar"].requires_grad and not facts["vector"].requires_grad and facts["vector"].device == "cpu"
    assert facts["turned"].base == facts["matrix"].index and facts["turned"].strides == (1, 3)
    assert facts["part"].base == facts["cube"].index and facts["part"].offset == 12
    assert facts["turned"].storage == facts["matrix"].storage and facts["vector"].base is None
    assert facts["vector"].data == [0.0, 1.0, 2.0] and facts["vector"].stats.norm == pytest.approx(5**0.5)


def test_a_copy_is_no_view():
    def program():
        a = torch.randn(2, 3)
        same = a.contiguous()
        copied = a.t().contiguous()
        clone = a.clone()
        return same + 1, copied + 1, clone + 1

    graph = recorded(program)[0].graph
    a, clone, copied = graph.find("a"), graph.find("clone"), graph.find("copied")
    assert clone.storage != a.storage != copied.storage and clone.base is None and copied.base is None
    assert graph.op(clone.producer).label == "clone"


def test_a_change_in_place_makes_a_new_version_seen_through_every_view():
    def program():
        a = torch.zeros(4)
        view = a[:2]
        before = a + 0
        view.add_(1)
        after = a + 0
        return before, after

    graph = recorded(program)[0].graph
    first, second = (op for op in ops(graph, "add") if op.name == "aten.add.Tensor")
    read, again = (graph.value(dict(op.inputs)["self"]) for op in (first, second))
    assert read.storage == again.storage and (read.version, again.version) == (0, 1) and read.index != again.index
    assert again.data == [1.0, 1.0, 0.0, 0.0]
    changed = ops(graph, "add_")[0]
    assert len(changed.mutates) == 1 and graph.value(changed.mutates[0]).version == 1
    assert again.producer == changed.index  # what wrote it, though through another tensor


def test_data_is_the_same_memory_without_a_gradient():
    def program():
        w = torch.ones(3, requires_grad=True)
        y = w * 2
        z = w.data * 3
        return y + z

    graph = recorded(program)[0].graph
    one, two = ops(graph, "mul")
    a, b = (graph.value(dict(op.inputs)["self"]) for op in (one, two))
    assert a.storage == b.storage and a.requires_grad and not b.requires_grad and b.base == a.index
    assert one.edges and not two.edges


# -- operations --------------------------------------------------------------------------------------------------------


def test_an_operation_knows_its_line_arguments_and_errors():
    def program():
        x = torch.randn(2, 3)
        with pytest.raises(RuntimeError):
            x @ x  # fails here
        return F.softmax(x, dim=-1)  # softmax here

    graph = recorded(program)[0].graph
    failed, softmax = ops(graph, "mm")[0], ops(graph, "_softmax")[0]
    assert failed.source.line == line_of("fails here") and "cannot be multiplied" in failed.error
    assert failed.outputs == ()
    assert softmax.source.line == line_of("softmax here") and softmax.source.file.endswith(HERE)
    assert softmax.attributes["dim"] == -1 and softmax.source.text.startswith("return F.softmax")
    assert softmax.source.function.endswith("program")


def test_what_backward_keeps():
    def program():
        x = torch.randn(10, requires_grad=True)
        w = torch.randn(10, requires_grad=True)
        y = torch.sigmoid(x)
        z = x * w
        s = (y + z).sum()
        s.backward()

    graph = recorded(program)[0].graph
    saved = {op.label: set(map(graph.title, op.saved)) for op in graph.ops if op.node}
    assert saved["sigmoid"] == {"y"} and saved["mul"] == {"x", "w"}
    assert saved["add"] == set() and saved["sum"] == set()
    assert totals(graph)["saved_bytes"] == 40  # y; x and w are leaves


@pytest.mark.parametrize("draw", [
    lambda: torch.randn(3, 4),
    lambda: torch.rand(5, dtype=torch.float64),
    lambda: torch.randperm(20),
    lambda: torch.empty(6).normal_(),
    lambda: torch.multinomial(torch.ones(9), 4),
    lambda: F.dropout(torch.ones(40), 0.5),
    lambda: torch.bernoulli(torch.full((30,), 0.5)),
])  # fmt: skip
def test_a_random_operation_runs_again_from_its_state(draw):
    def program():
        torch.rand(3)
        return draw()

    recorder, result = recorded(program)
    graph = recorder.graph
    op = [op for op in graph.ops if op.random][-1]
    func, args, kwargs = op.call
    read = [graph.value(v) for _, v in op.inputs]
    fill = {v.index: torch.tensor(v.data, dtype=v.dtype) for v in read if v.data}
    if op.label == "normal_":
        fill = {op.inputs[0][1]: torch.empty(6)}
    kept = torch.get_rng_state()
    torch.set_rng_state(op.rng_state)
    again = func(*(fill[a.value] if hasattr(a, "value") else a for a in args), **kwargs)
    torch.set_rng_state(kept)
    again = again[0] if isinstance(again, tuple) else again
    assert torch.equal(again, result) or torch.equal(again * 2, result)  # dropout scales its mask


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return (x + 0) * factor

    @staticmethod
    def backward(ctx, g):  # backward of Scaled
        return g * ctx.factor, None


class Split(torch.autograd.Function):
    @staticmethod
    def forward(x, y):
        return x + y, x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return g + h * y, g + h * x


def test_a_custom_function_is_one_operation_with_its_inside():
    def program():
        x = torch.ones(3, requires_grad=True)
        y = torch.full((3,), 2.0, requires_grad=True)
        a, b = Split.apply(x, y)
        Scaled.apply(a + b, 4.0).sum().backward()
        return x.grad

    recorder, grad = recorded(program)
    graph = recorder.graph
    split, scaled = (op for op in graph.ops if op.kind == "function")
    assert [o.label for o in graph.ops if o.parent == split.index] == ["add", "mul"]
    assert [o.label for o in graph.ops if o.parent == scaled.index] == ["add", "mul"]
    assert [n for n, _ in split.inputs] == ["x", "y"] and len(split.outputs) == 2
    assert scaled.attributes == {"factor": 4.0} and scaled.inputs[0][0] == "x"
    assert scaled.backward_source.line == line_of("backward of Scaled")
    assert set(map(graph.title, split.saved)) == {"x", "y"}
    own = [s.op for s in graph.backwards[0].steps if s.node.startswith(("Scaled", "Split"))]
    assert own == [scaled.index, split.index]
    assert grad.tolist() == [12.0] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes(reentrant):
    ran = []

    def block(h):
        ran.append(1)
        return torch.sin(h).exp()

    def program():
        x = torch.randn(4, requires_grad=True)
        h = x * 2
        checkpoint(block, h, use_reentrant=reentrant).sum().backward()
        return x

    recorder, x = recorded(program)
    graph = recorder.graph
    assert [op.region for op in ops(graph, "sin")] == ["checkpoint", "recomputed"]
    assert len(ran) == 2  # to look at what is saved does not compute it again
    assert [call.nested for call in graph.backwards] == ([False, True] if reentrant else [False])
    want = torch.autograd.grad(block(x * 2).sum(), x)[0]
    assert torch.equal(x.grad, want)


def test_hooks_say_where_they_are_defined():
    def program():
        w = torch.ones(3, requires_grad=True)
        w.register_hook(lambda g: g * 2)  # the hook
        h = w * 3
        h.sum().backward()
        return w.grad

    recorder, grad = recorded(program)
    (leaf,) = recorder.graph.leaves()
    assert leaf.hooks and leaf.hooks[0].endswith(f"{HERE}:{line_of('the hook')}") and grad.tolist() == [6.0] * 3
    assert [s.changed_by_hook for s in recorder.graph.backwards[0].steps if s.leaf is not None] == [True]


def test_detach_and_no_grad_cut():
    def program():
        w = torch.ones(3, requires_grad=True)
        with torch.no_grad():
            quiet = w * 2
        cut = w.detach() * 3
        (w * quiet * cut).sum().backward()

    graph = recorded(program)[0].graph
    quiet, cut = graph.find("quiet"), graph.find("cut")
    assert not graph.op(quiet.producer).grad_enabled and graph.op(quiet.producer).edges == ()
    assert not cut.requires_grad and len(ops(graph, "detach")) == 1
    assert len(graph.backwards[0].leaf_grads) == 1


def test_casts_of_autocast_and_the_optimizer_are_seen():
    def program():
        net = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(net.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            y = net(torch.ones(2, 4))
        y.float().sum().backward()
        optimizer.step()

    graph = recorded(program)[0].graph
    casts = [op for op in ops(graph, "_to_copy") if graph.value(op.outputs[0]).dtype is torch.bfloat16]
    assert {graph.title(op.inputs[0][1]) for op in casts} >= {"net.weight", "net.bias"}
    assert ops(graph, "addmm")[0].module == "net"
    assert {op.region for op in graph.ops if op.index >= graph.backwards[0].after_op} == {"optimizer"}


def test_what_hooks_of_a_program_pack_is_not_unpacked_by_looking():
    unpacked = []

    def unpack(t):
        unpacked.append(t)
        return t

    def program():
        x = torch.ones(3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = x.sin()
        y.sum().backward()

    graph = recorded(program)[0].graph
    assert len(unpacked) == 1 and ops(graph, "sin")[0].packed and not ops(graph, "sum")[0].packed


# -- loops -------------------------------------------------------------------------------------------------------------


def train(steps):
    """A loop whose every step is the same."""
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randn(4, 8)
        loss = net(x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_steps_that_repeat_are_kept_once_and_counted():
    recorder, _ = recorded(lambda: train(10))
    graph = recorder.graph
    few = recorded(lambda: train(4))[0].graph
    assert len(graph.ops) == len(few.ops) and len(graph.values) == len(few.values)
    (repeat,) = graph.repeats
    assert repeat.times == 9 and len(graph.backwards) == 2  # the first has no optimizer's step before it
    assert [op.index for one in graph.passes for op in one.ops] == [op.index for op in graph.ops]
    for op in graph.ops:  # nothing speaks of what was dropped
        assert all(map(graph.value, (*(v for _, v in op.inputs), *op.outputs, *op.saved)))
        assert op.parent is None or graph.op(op.parent)
    for value in graph.values:
        assert value.producer is None or graph.op(value.producer)
        assert value.base is None or graph.value(value.base)
    for call in graph.backwards:
        assert all(map(graph.value, (*call.roots, *call.leaf_grads)))
        assert all(step.op is None or graph.op(step.op) for step in call.steps)


def test_steps_that_differ_are_all_kept():
    def program():
        w = torch.ones(5, requires_grad=True)
        for i in range(1, 5):
            (w[:i] * 2).sum().backward()

    graph = recorded(program)[0].graph
    assert len(graph.backwards) == 4 and not graph.repeats


def test_memory_stays_flat_over_a_long_loop():
    with Recorder():
        train(30)
        gc.collect()
        before = psutil.Process().memory_info().rss
        train(300)
        gc.collect()
    drift = psutil.Process().memory_info().rss - before
    print(f"{drift / 1e6:.1f} MB over 300 steps")
    assert drift < 20e6


# -- backward ----------------------------------------------------------------------------------------------------------


def branched(x, w, c):
    h = torch.tanh(x @ w)
    a, b = h.chunk(2, dim=1)
    return (F.softmax(a * b + c, dim=-1) ** 2).sum() + h.std()


def by_hand(root):
    """The gradients in and out of every node, by its name and number, from hooks on plain autograd."""
    seen, stack, found, order = set(), [root.grad_fn], {}, []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
        if not node.name().endswith("AccumulateGrad"):

            def hook(out, into, node=node):
                order.append(node.name())
                found[node.name(), node._sequence_nr()] = (into, out)

            node.register_hook(hook)
    root.backward()
    return order, [found[k] for k in sorted(found, key=lambda k: -k[1])]


def test_every_step_of_backward_has_the_gradients_of_plain_autograd():
    torch.manual_seed(3)
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (4, 6), (3,))]
    plain = [t.clone().requires_grad_() for t in given]
    order, want = by_hand(branched(*plain))
    leaves = [t.clone().requires_grad_() for t in given]
    recorder, _ = recorded(lambda: branched(*leaves).backward())
    (call,) = recorder.graph.backwards
    steps = [s for s in call.steps if s.leaf is None]
    assert [s.node for s in steps] == order and all(s.op is not None for s in steps)
    for step, (into, out) in zip(sorted(steps, key=lambda s: -s.key[0]), want, strict=True):
        for got, tensors in ((step.into, into), (step.out, out)):
            assert [g is None for g in got] == [t is None for t in tensors]
            for g, t in zip(got, tensors, strict=True):
                assert g is None or (g.data == t.tolist() and g.stats.norm == pytest.approx(t.norm().item()))
    for leaf, other in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, other.grad)
        assert call.leaf_grads[recorder.table.find_leaf(leaf)].data == other.grad.tolist()


def test_every_step_belongs_to_its_operation():
    def program():
        x = torch.randn(2, 6, requires_grad=True)
        y = x.view(3, 4).t().clone()
        y[0].mul_(2)
        y.log_softmax(0).cumsum(1).amax(0).norm().backward()

    graph = recorded(program)[0].graph
    for step in graph.backwards[0].steps:
        assert step.leaf is not None or step.op is not None, step.node
    made = {graph.op(s.op).label for s in graph.backwards[0].steps if s.op is not None}
    assert made >= {"view", "t", "clone", "mul_", "_log_softmax", "cumsum", "amax", "linalg_vector_norm"}


def test_grad_of_some_inputs_and_of_gradients():
    def program():
        x = torch.tensor(3.0, requires_grad=True)
        y = torch.tensor(2.0, requires_grad=True)
        (first,) = torch.autograd.grad(x**3 * y, x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, retain_graph=True)
        first.backward()
        return first, second, x, y

    recorder, (first, second, x, y) = recorded(program)
    graph = recorder.graph
    assert (first.item(), second.item(), x.grad.item(), y.grad.item()) == (54.0, 36.0, 36.0, 27.0)
    a, b, c = graph.backwards
    assert a.partial and b.partial and not c.partial and a.retained and b.retained and not c.retained
    value = {n: recorder.table.find_leaf(t) for n, t in (("x", x), ("y", y))}
    assert a.leaf_grads[value["x"]].data == 54.0 and value["y"] not in a.leaf_grads
    assert c.leaf_grads[value["x"]].data == 36.0 and c.leaf_grads[value["y"]].data == 27.0
    assert all(s.leaf is not None or s.op is not None for s in (*b.steps, *c.steps))


def test_several_roots_that_are_no_scalars_and_an_edge():
    def program():
        x = torch.arange(1.0, 4.0, requires_grad=True)
        y, z = x**2, 3 * x
        torch.autograd.backward([y, z], [torch.ones(3), torch.tensor([1.0, 0.0, 2.0])], retain_graph=True)
        total = x.grad.clone()
        edge = torch.autograd.graph.get_gradient_edge(y)
        torch.autograd.backward(edge, torch.ones(3), retain_graph=True)
        (inner,) = torch.autograd.grad(z.sum(), torch.autograd.graph.get_gradient_edge(x))
        return total, x.grad - total, inner

    recorder, (total, more, inner) = recorded(program)
    assert total.tolist() == [5.0, 4.0, 12.0] and more.tolist() == [2.0, 4.0, 6.0] and inner.tolist() == [3.0] * 3
    first, second, third = recorder.graph.backwards
    assert [recorder.graph.title(v) for v in first.roots] == ["y", "z"]
    assert next(iter(first.leaf_grads.values())).data == [5.0, 4.0, 12.0]
    assert next(iter(second.leaf_grads.values())).data == [2.0, 4.0, 6.0] and second.steps and third.steps


def test_an_unused_or_second_backward_fails_as_without_recording():
    def program():
        x = torch.ones(2, requires_grad=True)
        y = (x * x).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad((x * 2).sum(), torch.ones(2, requires_grad=True))
        with pytest.raises(RuntimeError, match="scalar outputs"):
            (x * 2).backward()
        return x.grad

    assert recorded(program)[1].tolist() == [2.0, 2.0]


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        raise ValueError("no way back")  # raised in backward


def test_an_exception_in_the_middle_of_backward():
    x = torch.ones(2, requires_grad=True)
    y = Explodes.apply(x * 2).sum()
    nodes = [y.grad_fn, y.grad_fn.next_functions[0][0]]
    with pytest.raises(ValueError, match="no way back"), Recorder() as recorder:
        y.backward()
    assert recorder.graph.failure.kind == "ValueError" and recorder.graph.failure.message == "no way back"
    assert recorder.graph.failure.source.line == line_of("raised in backward")
    assert not recorder.state.running and all(not getattr(n, "_backward_hooks", None) for n in nodes)
    with Recorder() as again:
        (x * 3).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0] and len(again.graph.backwards) == 1


# -- the program does not notice ---------------------------------------------------------------------------------------


def learn(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    net = nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        tokens = torch.randint(11, (2, 6))
        loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in net.parameters()], [p.grad for p in net.parameters()], torch.get_rng_state()


def test_results_are_bit_equal_with_and_without_recording():
    losses, parameters, grads, state = learn(5)
    with Recorder():
        seen = learn(5)
    assert seen[0] == losses and torch.equal(seen[3], state)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[2], grads, strict=True))


def test_nothing_is_left_behind():
    def program():  # up to Python 3.12 a frame holds what its variables were when they were last looked at
        net, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
        with Recorder() as recorder:
            hidden = net(x).sin()
            hidden.sum().backward()
        assert not x._backward_hooks and not getattr(hidden.grad_fn, "_backward_hooks", None)
        return [weakref.ref(t) for t in (x, hidden, net.weight, net, recorder)]

    apply, engine = torch.autograd.Function.__dict__["apply"], torch.autograd._engine_run_backward
    alive = program()
    assert torch.autograd.Function.__dict__["apply"] is apply and torch.autograd._engine_run_backward is engine
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    gc.collect()
    assert [r() for r in alive] == [None] * 5


def test_what_a_recording_holds_ends_with_it():
    kept = []

    def program():
        x = torch.randn(1000, requires_grad=True)
        h = x.sin()
        kept.append(weakref.ref(h))
        h.sum().backward()

    with Recorder(keep=0) as recorder:
        program()
        gc.collect()
        assert kept[0]() is None  # nothing is kept for a verification
    assert not recorder.state.kept.tensors


def test_a_recording_in_a_recording():
    x = torch.ones(2, requires_grad=True)
    with Recorder() as outer:
        a = x * 2
        with Recorder() as inner:
            b = a.sin()
            b.sum().backward()
        x.exp().sum().backward()
    assert {op.label for op in inner.graph.ops} >= {"sin", "sum"} and len(inner.graph.backwards) == 1
    assert [op.label for op in outer.graph.ops] == ["mul", "sin", "sum", "exp", "sum"]  # none of the inner recorder's
    assert not ops(inner.graph, "exp") and not outer.graph.notes
    assert torch.allclose(x.grad, 2 * torch.cos(2 * torch.ones(2)) + torch.e)


def test_another_thread_is_not_disturbed():
    results, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            x = torch.full((3,), 2.0, requires_grad=True)
            Scaled.apply(nn.Identity()(x * x), 3.0).sum().backward()
            results.append(x.grad.tolist())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with Recorder() as recorder:
            for _ in range(20):
                w = torch.ones(2, requires_grad=True)
                (w * 3).sum().backward()
    finally:
        stop.set()
        thread.join()
    assert results and all(r == [12.0] * 3 for r in results)
    assert "Scaled" not in {op.name for op in recorder.graph.ops}
    assert {op.source.line for op in recorder.graph.ops} and not recorder.state.local.parents


# -- unusual tensors ---------------------------------------------------------------------------------------------------


def sparse_gradient():
    table = nn.Embedding(6, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    return table.weight.grad.to_dense().sum().item()


def complex_numbers():
    x = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    torch.fft.fft(x).abs().sum().backward()
    return x.grad.shape


def empty():
    x = torch.zeros(0, 3, requires_grad=True)
    (x.sum() + torch.zeros(()).mean()).backward()
    return x.grad.shape


def strided():
    x = torch.randn(4, 6, requires_grad=True)
    (x[::2, 1::3].t() * torch.ones(2, 1).expand(2, 2)).sum().backward()
    return x.grad.sum().item()


def meta():
    x = torch.ones(3, 3, device="meta", requires_grad=True)
    (x @ x).relu().sum().backward()
    return x.grad.shape


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(3, 3, requires_grad=True)
        (x @ x).relu().sum().backward()
        return x.grad.shape


def functional():
    return torch.func.grad(lambda x: (x**3).sum())(torch.ones(3)).tolist()


def mapped():
    return torch.func.vmap(torch.func.grad(lambda x: (x**2).sum()))(torch.ones(2, 3)).tolist()


def loaded():
    data = torch.utils.data.TensorDataset(torch.arange(6.0).view(3, 2))
    return [b.tolist() for (b,) in torch.utils.data.DataLoader(data, batch_size=2)]


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]).to_padded_tensor(0.0).sum().item()


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8).dequantize().tolist()


def half_and_bool():
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    x.masked_fill(torch.tensor([True, False, True]), 0).sum().backward()
    return x.grad.tolist()


def packed():
    lstm = nn.LSTM(2, 3)
    sequence = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    lstm(sequence)[0].data.sum().backward()
    return lstm.weight_ih_l0.grad.shape


def optimizers_of_many_tensors():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    for optimizer in (
        torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=True),
        torch.optim.Adam(weights, foreach=True),
        torch.optim.AdamW(weights, fused=True),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            (weights[0] * weights[1]).sum().backward()
            optimizer.step()
    return [w.tolist() for w in weights]


def several_gradients_at_once():
    x = torch.ones(3, requires_grad=True)
    return torch.autograd.grad(x**2, x, torch.eye(3), is_grads_batched=True)[0].tolist()


def second_derivatives():
    return torch.func.hessian(lambda x: (x**3).sum())(torch.ones(3)).tolist()


def shape_comes_later():
    return nn.LazyLinear(3)(torch.ones(2, 4)).shape


def compressed_rows():
    w = torch.ones(3, 2, requires_grad=True)
    (torch.eye(3).to_sparse_csr() @ w).sum().backward()
    return w.grad.tolist()


def anomalies():
    with torch.autograd.set_detect_anomaly(True):
        w = torch.ones(3, requires_grad=True)
        (w * 2).sum().backward()
    return w.grad.tolist()


UNUSUAL = [sparse_gradient, complex_numbers, empty, strided, meta, fake, functional, mapped, loaded, nested, quantized,
half_and_bool, packed, optimizers_of_many_tensors, several_gradients_at_once, second_derivatives, shape_comes_later,
compressed_rows, anomalies]  # fmt: skip


@pytest.mark.parametrize("program", UNUSUAL, ids=lambda f: f.__name__)
def test_unusual_tensors_do_not_end_a_program(program):
    torch.manual_seed(0)
    want = program()
    recorder, got = recorded(program)
    assert got == want and recorder.graph.ops
    json.dumps(document(recorder.graph, "x"), allow_nan=False)


def test_a_compiled_function_is_recorded_operation_by_operation():
    @torch.compile(backend="aot_eager")
    def block(x):
        return torch.sin(x) * 2

    def program():
        x = torch.ones(3, requires_grad=True)
        block(x).sum().backward()
        return x.grad

    recorder, grad = recorded(program)
    assert torch.allclose(grad, 2 * torch.cos(torch.ones(3)))
    assert ops(recorder.graph, "sin") and ops(recorder.graph, "mul")


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_operations_take_seconds():
    with Recorder():
        torch.ones(1)  # torch imports what it needs for this once
    x = torch.ones(4, requires_grad=True)
    began = time.process_time()
    with Recorder() as recorder:
        h = x
        for _ in range(5000):
            h = h * 1.0001
            h = h + 0.001
        h.sum().backward()
    seconds = time.process_time() - began  # which a busy machine does not stretch
    print(f"10,000 operations and their backward: {seconds:.1f} s")
    assert len(recorder.graph.ops) >= 10_000 and len(recorder.graph.backwards[0].steps) >= 10_000
    assert seconds < 10


def test_two_hundred_layers():
    def program():
        net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(200)])
        net(torch.ones(1, 4)).sum().backward()

    graph = recorded(program)[0].graph
    assert len(graph.backwards[0].leaf_grads) == 400 and graph.find("net.199.bias") is not None
