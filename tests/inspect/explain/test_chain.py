"""The chain rule: numbers by hand, joins, what has no gradient, random expressions against autograd and differences."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.inspect.explain.chain import NoPath, chain_rule, scalar, tensors
from kiem.inspect.record.recorder import Recorder
from kiem.inspect.show.chain import equations, path_names, paths

PROGRAMS = Path(__file__).parents[1] / "programs"


@pytest.fixture(autouse=True)
def _keep_default_dtype():
    """A program under test may set it."""
    yield
    torch.set_default_dtype(torch.float32)


def recorded(function):
    with Recorder() as recorder:
        function()
    return recorder.graph


def program(name):
    return recorded(lambda: runpy.run_path(str(PROGRAMS / name), run_name="__main__"))


def chain_to(graph, name, call=-1):
    return chain_rule(graph, graph.backwards[call], graph.find(name).index)


def test_the_chapter_by_hand():
    """z = 1.1 · 2.2, a = σ(z), L = −ln(a): dL/da = −1/a = −1.0889, da/dz = a(1 − a) = 0.0750, dz/dw = x = 1.1."""
    a = 1 / (1 + math.exp(-2.42))
    graph = program("chapter/gradients.py")
    for call in (0, 2):
        chain = chain_to(graph, "w1", call)
        assert [s.label for s in chain.steps] == ["binary_cross_entropy", "sigmoid", "add", "mul"]
        local = [scalar(s.links[0].local) for s in chain.steps]
        assert local == pytest.approx([-1 / a, a * (1 - a), 1, 1.1], rel=1e-6)
        assert scalar(chain.gradient) == pytest.approx(-1 / a * a * (1 - a) * 1.1, rel=1e-6)
        assert chain.product == pytest.approx(scalar(chain.gradient), rel=1e-6)
        assert equations(chain) == ["dL/dw1 = dL/da · da/dz · dz/dw1 = -1.0889 · 0.0750 · 1.1 = -0.0898"]
        assert [path_names(chain, p) for p in paths(chain)] == [
            ["loss", "binary_cross_entropy", "sigmoid", "add", "mul", "w1"]
        ]
        assert chain.ok and chain.error < 1e-6 and chain.paths == 1
    assert scalar(chain_to(graph, "b", 1).gradient) == pytest.approx(-0.0817, abs=5e-5)
    with pytest.raises(NoPath, match="asked for the gradients of others"):
        chain_to(graph, "b", 0)


def test_every_step_of_the_chapter_names_its_line_and_formula():
    chain = chain_to(program("chapter/gradients.py"), "w1")
    assert [s.source.line for s in chain.steps] == [13, 11, 10, 10]
    link = chain.steps[1].links[0]
    assert (link.argument, link.title, link.formula) == ("self", "z", "g · y · (1 − y)")
    assert link.numbers == "−1.089 · 0.9183 · (1 − 0.9183)"


def test_a_value_used_twice_has_two_contributions():
    def twice():
        w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        loss = w * w + 5 * w
        loss.backward()

    chain = chain_to(recorded(twice), "w")
    join = chain.joins[-1]
    assert chain.paths == 3 and len(join.contributions) == 3
    assert scalar(join.total) == scalar(chain.gradient) == chain.product == 11.0
    assert sorted(scalar(chain.steps[i].links[j].leaves) for i, j in join.contributions) == [3.0, 3.0, 5.0]
    assert chain.error == 0.0 and join.bound == 1e-12
    assert len(equations(chain)) == 4


def test_matrices_and_float64():
    def net():
        torch.manual_seed(0)
        x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        first = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
        second = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
        hidden = torch.tanh(x @ first)
        loss = ((hidden @ second + hidden.sum() - y) ** 2).mean()
        loss.backward()

    graph = recorded(net)
    chain = chain_to(graph, "first")
    assert chain.ok and chain.paths == 2
    assert all(join.error < 1e-12 for join in chain.joins)
    last = chain.steps[-1].links[0]
    assert (last.argument, last.formula) == ("mat2", "Aᵀ G")
    assert chain.joins[0].title == "hidden" and len(chain.joins[0].contributions) == 2
    assert chain.product is None and equations(chain) == []


@pytest.mark.parametrize("name", ["right/gpt2.py", "right/transformers_gpt2.py", "right/inplace_views.py",
                                  "right/checkpoint.py", "right/double.py", "right/bfloat16.py", "right/lstm.py",
                                  "right/two_backwards.py", "right/gradient_penalty.py"])  # fmt: skip
def test_contributions_add_up_at_every_join_of_right_programs(name):
    if "transformers" in name:
        pytest.importorskip("transformers")
    graph = program(name)
    checked = 0
    for call in graph.backwards:
        for leaf in call.leaf_grads:
            chain = chain_rule(graph, call, leaf)
            assert chain.ok and all(join.ok or join.note for join in chain.joins)
            json.dumps(chain.as_dict(), allow_nan=False)
            checked += sum(join.ok is True for join in chain.joins)
    assert checked


def test_tied_weights_are_counted_for_every_use():
    chain = chain_to(program("right/gpt2.py"), "model.wte.weight")
    sent = {chain.steps[i].label for i, _ in chain.joins[-1].contributions}
    assert sent == {"t", "embedding"} and chain.joins[-1].ok and chain.paths > 16 and paths(chain) == []


def test_many_paths_are_counted_exactly():
    def doubling():
        x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y = x
        for _ in range(70):
            y = y + y
        loss = y * 2.0**-70
        loss.backward()

    chain = chain_to(recorded(doubling), "x")
    assert chain.paths == 2**70 and chain.product == scalar(chain.gradient) == 1.0


def test_a_result_on_the_way_has_a_chain_too():
    chain = chain_to(program("chapter/gradients.py"), "z")
    assert [s.label for s in chain.steps] == ["binary_cross_entropy", "sigmoid"]
    assert scalar(chain.gradient) == pytest.approx(-0.0817, abs=5e-5) and chain.ok


def test_a_seed_is_part_of_the_product():
    def seeded():
        w = torch.tensor(2.0, requires_grad=True)
        loss = w**3
        loss.backward(torch.tensor(0.5))

    chain = chain_to(recorded(seeded), "w")
    assert (chain.seed, chain.product, scalar(chain.gradient)) == (0.5, 6.0, 6.0)


def test_a_hook_that_changes_a_gradient_is_named():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    w.register_hook(tenfold := lambda g: g * 10)

    def hooked():
        loss = (w * 3).sum()
        loss.backward()

    graph = recorded(hooked)
    chain = chain_rule(graph, graph.backwards[0], next(iter(graph.backwards[0].leaf_grads)))
    join = chain.joins[-1]
    assert join.ok is None and chain.gradient.data == [30.0, 30.0] and join.total == [3.0, 3.0]
    line = tenfold.__code__.co_firstlineno
    assert f"test_chain.py:{line} changed the sum" in join.note and chain.product is None


def test_several_backward_calls_and_a_folded_loop():
    def loop():
        w = torch.tensor(1.0, requires_grad=True)
        for _ in range(5):
            loss = (w - 3) ** 2
            loss.backward()

    graph = recorded(loop)
    assert graph.repeats[0].times >= 4
    chain = chain_to(graph, "w")
    assert scalar(chain.gradient) == -4.0 and chain.product == -4.0
    assert any("ran the same operations" in note for note in chain.notes)


def test_without_a_row_the_numbers_are_autograds():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    def custom():
        w = torch.tensor(3.0, requires_grad=True)
        loss = Square.apply(w) * 2
        loss.backward()

    chain = chain_to(recorded(custom), "w")
    step = chain.steps[-1]
    assert step.label == "Square" and step.note == "no closed form: the numbers are autograd's"
    assert step.links[0].local == 6.0 and step.links[0].formula == "" and chain.product == 12.0


def _detached(w, x):
    return (w.detach() * 2) * x


def _no_grad(w, x):
    with torch.no_grad():
        y = w * 2
    return y * x


def _through_a_choice(w, x):
    return (w > 0).to(x.dtype) * x


def _through_data(w, x):
    return w.data * x


def _beside(w, x):
    w * 3
    return x * 2


def _unused(w, x):
    return x * 2


WHY = [
    (_detached, r"detached at .*test_chain.py:\d+"),
    (_no_grad, r"mul at .*test_chain.py:\d+ ran under torch.no_grad"),
    (_through_a_choice, r"gt at .*test_chain.py:\d+ gives bool\[\], which has no derivative"),
    (_through_data, r"(detached|read through .data) at .*test_chain.py:\d+"),
    (_beside, r"used at .*test_chain.py:\d+, but the loss does not depend"),
    (_unused, r"no operation before it used this tensor"),
]


@pytest.mark.parametrize("function, reason", WHY, ids=[f.__name__ for f, _ in WHY])
def test_why_a_leaf_has_no_gradient(function, reason):
    def run():
        w = torch.tensor(1.5, requires_grad=True)
        x = torch.tensor(2.5, requires_grad=True)
        loss = function(w, x)
        loss.backward()
        w.add(1)

    with pytest.raises(NoPath, match=reason):
        chain_to(recorded(run), "w")


def test_tensors_that_can_have_no_gradient():
    def run():
        ids = torch.tensor([1, 0])
        fixed = torch.ones(2)
        table = torch.ones(2, 2, requires_grad=True)
        loss = (table[ids] * fixed).sum()
        loss.backward()

    graph = recorded(run)
    with pytest.raises(NoPath, match=r"int64\[2\], and only floating-point"):
        chain_to(graph, "ids")
    with pytest.raises(NoPath, match="requires"):
        chain_to(graph, "fixed")


def test_the_table_of_tensors():
    def run():
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(3, 4))
        x = torch.randn(2, 3)
        y = (x @ w).t()
        z = y.clone()
        loss = z.exp().sum()
        loss.backward()

    rows = {r["name"]: r for r in tensors(recorded(run)) if r["name"]}
    json.dumps(list(rows.values()), allow_nan=False)
    assert rows["w"]["shape"] == [3, 4] and rows["w"]["bytes"] == 48 and rows["w"]["rank"] == "matrix"
    assert rows["y"]["strides"] == [1, 4] and rows["y"]["view_of"] and rows["z"]["copy_of"] == "y"
    assert "mm at" in rows["x"]["saved_by"][0] and rows["loss"]["made_by"] == "sum"


UNARY = [torch.sin, torch.tanh, torch.sigmoid, torch.square, torch.neg, torch.nn.functional.softplus]
BINARY = [torch.add, torch.sub, torch.mul]
NODE = st.tuples(st.integers(0, 8), st.integers(0, 10**6), st.integers(0, 10**6))


def _expression(nodes, leaves):
    values = list(leaves)
    for kind, first, second in nodes:
        a, b = values[first % len(values)], values[second % len(values)]
        values.append(UNARY[kind](a) if kind < len(UNARY) else BINARY[kind - len(UNARY)](a, b))
    return sum(values[len(leaves) :], start=torch.zeros((), dtype=torch.float64)) + values[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(NODE, min_size=1, max_size=8), st.lists(st.floats(-1.2, 1.2), min_size=2, max_size=3))
def test_the_sum_over_all_paths_is_the_gradient(nodes, numbers):
    """Of random expressions of scalars: the table's products, what autograd gave, and central differences agree."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]
    with Recorder() as recorder:
        loss = _expression(nodes, leaves)
        loss.backward()
    graph = recorder.graph
    for i, leaf in enumerate(leaves):
        if leaf.grad is None:
            continue
        chain = chain_rule(graph, graph.backwards[0], recorder.table.leaf(leaf))
        step = 1e-5
        sides = []
        for s in (step, -step):
            moved = [torch.tensor(x + s * (j == i), dtype=torch.float64) for j, x in enumerate(numbers)]
            sides.append(_expression(nodes, moved).item())
        difference = (sides[0] - sides[1]) / (2 * step)
        size = 1 + abs(leaf.grad.item()) + abs(sides[0])
        assert chain.ok and all(join.error <= 1e-12 for join in chain.joins)
        assert abs(chain.product - leaf.grad.item()) <= 1e-11 * size
        assert abs(difference - leaf.grad.item()) <= 1e-5 * size
        if chain.paths <= 16:
            assert len(paths(chain)) == chain.paths
            total = sum(math.prod(scalar(k.local) for _, k in path) for path in paths(chain))
            assert abs(total - leaf.grad.item()) <= 1e-11 * size
