"""Correct programs in the idioms of the field in which a check is easily deceived: none may be called wrong, and every
gradient is checked."""

import contextlib
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kiem
from kiem.inspect.record.recorder import Recorder
from kiem.inspect.verify.verifier import Verifier


def masked_softmax(lowest):
    scores = torch.randn(2, 4, 4, requires_grad=True)
    masked = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), lowest)
    (masked.softmax(-1) * torch.randn(2, 4, 4)).sum().backward()


def added_mask():
    q = torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    ((q @ q.mT / 2 + mask).softmax(-1) @ q).tanh().square().mean().backward()


def padding():
    table = nn.Embedding(6, 4, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_()
    (table(torch.tensor([[3, 1, 0, 0]])) @ torch.randn(4)).sum().backward()


def tied_padding():
    table = nn.Embedding(6, 4, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_()
    logits = table(torch.tensor([3, 1, 0, 0])) @ table.weight.T
    F.cross_entropy(logits, torch.tensor([1, 2, 0, 3])).backward()


def gradient_penalty(norm):
    conv = nn.Conv2d(2, 4, 3, padding=1)
    x = torch.randn(3, 2, 5, 5, requires_grad=True)
    (g,) = torch.autograd.grad(torch.tanh(norm(conv(x))).sum(), x, create_graph=True)
    ((g.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()


def bias_that_a_norm_cancels():
    conv, norm = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)
    F.leaky_relu(norm(conv(torch.randn(6, 3, 20, 20))), 0.2).square().mean().backward()


def ctc():
    logits = torch.randn(12, 2, 6, requires_grad=True)
    lengths = torch.tensor([12, 10]), torch.tensor([4, 3])
    nn.CTCLoss(blank=0)(logits.log_softmax(-1), torch.randint(1, 6, (2, 4)), *lengths).backward()


def certain_targets():
    logits = torch.randn(4, requires_grad=True)
    F.binary_cross_entropy(logits.sigmoid(), torch.ones(4)).backward()


def inner_steps():
    w, rate = torch.randn(3, 2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    fast = w
    for _ in range(4):
        (g,) = torch.autograd.grad(((x @ fast - y) ** 2).mean(), fast, create_graph=True)
        fast = fast - rate * g
    ((x @ fast - y) ** 2).mean().backward()


def float_to_index():
    x = torch.randn(7, 3, requires_grad=True)
    torch.quantile(x * 2, torch.tensor([0.1, 0.5])).sum().backward()


def jagged():
    table, linear = nn.Embedding(20, 8), nn.Linear(8, 4)
    rows = torch.nested.nested_tensor([torch.randint(0, 20, (n,)) for n in (3, 6, 4)], layout=torch.jagged)
    F.gelu(linear(table(rows))).values().square().mean().backward()


def sparse():
    places = torch.tensor([[0, 1, 1, 3, 2], [1, 0, 2, 3, 3]])
    weights, w = torch.rand(5, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    hidden = torch.sparse.mm(torch.sparse_coo_tensor(places, weights, (4, 4)).coalesce(), torch.randn(4, 6) @ w)
    rows = torch.sparse_csr_tensor(torch.tensor([0, 2, 3]), torch.tensor([0, 3, 1]), torch.rand(3), (2, 4))
    ((rows @ hidden).square().mean() + hidden.sum()).backward()


def sparse_gradients():
    bag = nn.EmbeddingBag(20, 5, sparse=True)
    rows = torch.randn(6, 5).relu().to_sparse_csr().requires_grad_()
    w = torch.randn(5, 3, requires_grad=True)
    ((rows @ w).square().sum() + bag(torch.tensor([[1, 2, 2], [4, 1, 0]])).square().sum()).backward()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return CubeBackward.apply(x, g)


class CubeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x * x * g

    @staticmethod
    def backward(ctx, h):
        x, g = ctx.saved_tensors
        return 6 * x * g * h, 3 * x * x * h


def function_in_a_backward():
    x, linear = torch.randn(4, 3, requires_grad=True), nn.Linear(3, 3)
    (g,) = torch.autograd.grad(Cube.apply(linear(x)).sum(), x, create_graph=True)
    g.square().sum().backward()


def recurrent():
    nn.LSTM(3, 4)(torch.randn(5, 2, 3))[0].square().mean().backward()


def changed_in_place_and_kept():
    scores = torch.randn(5, 4, requires_grad=True)
    top, _ = scores.softmax(-1).topk(2)
    top /= top.sum(-1, keepdim=True)  # autograd clones what it changes
    top.square().sum().backward()


def networks_in_turn():
    """As in a GAN's loop: labels are filled anew, and one network changes between two passes of the other."""
    maker, labels = nn.Linear(3, 4), torch.ones(5)
    judge = nn.Sequential(nn.Linear(4, 6), nn.ReLU(True), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(judge.parameters(), 0.1)

    def loss(x):
        return F.binary_cross_entropy(judge(x).sigmoid().view(-1), labels)

    loss(torch.randn(5, 4)).backward()
    made = maker(torch.randn(5, 3)).tanh()
    labels.fill_(0.0)
    loss(made.detach()).backward()
    optimizer.step()
    labels.fill_(1.0)
    loss(made).backward()


def against_one_number():
    """Its gradient is a sum of many that nearly cancel, each rounded."""
    x, y = torch.randn(40, 5, requires_grad=True), torch.randn((), requires_grad=True)
    weights = torch.randn(40, 5)
    weights -= weights[x < y].mean()
    torch.maximum(x, y).backward(weights)


def tail_of_a_distribution():
    """In float64 as well, 1 + erf rounds to steps here, and its derivative does not."""
    torch.special.ndtr(torch.tensor(-8.4, requires_grad=True)).backward()


RIGHT = {
    "against one number": against_one_number, "tail of a distribution": tail_of_a_distribution,
    "networks in turn": networks_in_turn,
    "changed in place and kept": changed_in_place_and_kept,
    "mask -1e9": lambda: masked_softmax(-1e9), "mask -max": lambda: masked_softmax(-torch.finfo(torch.float32).max),
    "added mask": added_mask, "padding": padding, "tied padding": tied_padding,
    "penalty BatchNorm": lambda: gradient_penalty(nn.BatchNorm2d(4)),
    "penalty GroupNorm": lambda: gradient_penalty(nn.GroupNorm(2, 4)),
    "penalty LayerNorm": lambda: gradient_penalty(nn.LayerNorm([4, 5, 5])),
    "penalty InstanceNorm": lambda: gradient_penalty(nn.InstanceNorm2d(4, affine=True)),
    "canceled bias": bias_that_a_norm_cancels, "ctc": ctc, "certain targets": certain_targets,
    "inner steps": inner_steps, "float to index": float_to_index, "jagged": jagged, "sparse": sparse,
    "sparse gradients": sparse_gradients, "function in a backward": function_in_a_backward, "recurrent": recurrent,
}  # fmt: skip


def verified(program, seed=0):
    verifier = Verifier()
    torch.manual_seed(seed)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with Recorder(observer=verifier, keep=None) as recorder:
            program()
    return recorder, verifier.ended()


@pytest.mark.parametrize("name", RIGHT)
def test_a_correct_program_is_not_called_wrong(name):
    recorder, result = verified(RIGHT[name])
    assert [(recorder.graph.op(v.op).name, v.inputs) for v in result.wrong] == []
    assert result.wrong_parameters == []
    assert [v.text for v in result.verdicts if v.verdict == "unchecked"] == []
    assert result.parameters and not [note for note in result.notes if "not checked" in note]
    assert not [note for note in result.notes if "made by no recorded operation" in note]


def test_a_kink_near_the_point_is_no_error():
    """One call in 80 was: a wide step saw a kink that a narrow one does not."""

    def program():
        for f in (F.relu, F.leaky_relu):
            x = torch.randn(16, 32, requires_grad=True)
            (f(x) * torch.randn(16, 32)).sum().backward()

    for seed in (30, 74, 159, *range(8)):
        _, result = verified(program, seed)
        assert result.ok and not result.wrong


def test_a_hook_on_the_way_is_said_and_not_judged():
    first, second = nn.Linear(3, 4), nn.Linear(4, 1)

    def program():
        hidden = torch.tanh(first(torch.randn(5, 3)))
        hidden.register_hook(lambda g: 2 * g)
        second(hidden).sum().backward()

    recorder, result = verified(program)
    verdicts = {recorder.graph.value(v.value).numel: v.verdict for _, v in result.parameters}
    assert verdicts == {12: "hook", 4: "hook", 1: "ok"} or verdicts == {12: "hook", 4: "ok", 1: "ok"}
    assert sum(v.verdict == "hook" for _, v in result.parameters) == 2
    assert any("a hook changes its gradient" in note and __file__[-20:] in note for note in result.notes)


def test_contributions_that_cancel_are_no_hook():
    """In a stable log-sum-exp over time the maximum is taken off and comes back: its gradient is what is left of two
    that cancel, which rounds as they do."""

    def program():
        keys, values = torch.randn(12, 4, 8), torch.randn(12, 4, 8, requires_grad=True)
        weight = torch.randn(8, requires_grad=True)
        a = b = torch.zeros(4, 8)
        p = torch.full((4, 8), -1e30)
        for key, value in zip(keys * weight, values, strict=True):
            q = torch.maximum(p, key)
            old, new = torch.exp(p - q), torch.exp(key - q)
            a, b, p = old * a + new * value, old * b + new, q
        (a / b).square().sum().backward()

    for seed in range(4):
        recorder, result = verified(program, seed)
        assert not any(step.changed_by_hook for call in recorder.graph.backwards for step in call.steps)
        assert result.ok and {v.verdict for _, v in result.parameters} <= {"ok", "kink"}


def test_a_surrogate_gradient_that_is_declared_is_not_judged():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, g):
            return g

    def program():
        w = torch.randn(4, requires_grad=True)
        (Sign.apply(w * 2) * torch.randn(4)).sum().backward()

    assert not verified(program)[1].ok
    Sign.surrogate_gradient = True
    recorder, result = verified(program)
    assert result.ok and [v.verdict for _, v in result.parameters] == ["hook"]
    assert [recorder.graph.op(v.op).name for v in result.verdicts if v.verdict == "unchecked"] == ["Sign"]


def test_a_detach_in_a_backward_that_is_differentiated_again_is_found():
    class Act(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * (1 - y.detach() * y)

    def program():
        x = torch.randn(4, 3)
        w = torch.randn(3, 3, requires_grad=True)
        (g,) = torch.autograd.grad(Act.apply(x @ w).sum(), w, create_graph=True)
        g.square().sum().backward()

    assert [v.argument for v in verified(program)[1].wrong_parameters] == ["w"]


def test_a_coarse_sum_is_not_excused_by_its_length():
    def program():
        b = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, b):
                return b.expand(4096)

            @staticmethod
            def backward(ctx, g):
                total = torch.zeros(1, dtype=g.dtype)
                for part in g:
                    total += part
                return total

        Slow.apply(b).sum().backward()

    _, result = verified(program)
    assert len(result.wrong) == 1 and len(result.wrong_parameters) == 1


def test_backward_in_a_thread_of_its_own_numbers_its_nodes_anew():
    """Nodes that another thread made are not taken for the operations of this one that have the same number."""
    import threading

    w, v = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)

    def program():
        x, parts = torch.randn(4, 3), []

        def branch():
            parts.append(torch.tanh(x @ v) * 3)

        thread = threading.Thread(target=branch)
        thread.start()
        thread.join()
        (torch.tanh(x @ w) + parts[0]).square().sum().backward()

    recorder, result = verified(program)
    assert result.verdict == "incomplete" and result.ok is None
    assert [gap.kind for gap in result.gaps].count("node") == 3
    assert {recorder.graph.op(v.op).label for v in result.verdicts} == {"mm", "tanh", "add", "pow", "sum"}
    assert sum("made by no recorded operation" in note for note in result.notes) == 3


def test_what_is_written_out_keeps_the_programs_order_in_memory(monkeypatch):
    """Fused attention gives (B, T, H, K) in memory, and then `contiguous` is no operation and `view` works; attention
    written out in float64, as for CUDA's kernels, must not break that."""
    from kiem.inspect.verify import float64, replay

    def attention(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        return float64.attention(q, k, v, attn_mask, is_causal, scale)

    monkeypatch.setitem(replay.WRITTEN_OUT, "_scaled_dot_product_flash_attention_for_cpu", attention)
    with kiem.record(verify=True) as trace:
        q, k, v = (torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_() for _ in range(3))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.transpose(1, 2).contiguous().view(2, 5, 12).square().sum().backward()
    assert trace.verify().ok is True, str(trace.verify())


def test_a_backward_hook_of_a_module_is_said_and_not_judged():
    def program(factor):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        net[1].register_full_backward_hook(lambda module, into, out: (into[0] * factor,))
        net(torch.randn(5, 3)).square().sum().backward()

    _, result = verified(lambda: program(0.5))
    assert result.ok and "hook" in {v.verdict for v in result.verdicts}
    assert sorted(v.verdict for _, v in result.parameters) == ["hook", "hook", "ok", "ok"]
    _, result = verified(lambda: program(1.0))
    assert result.ok and {v.verdict for _, v in result.parameters} == {"ok"}


def test_a_second_derivative_through_a_saved_intermediate_is_checked_end_to_end():
    class Softplus(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            e = x.exp()
            ctx.save_for_backward(e)  # neither input nor output: autograd takes it for a constant
            return e.log1p()

        @staticmethod
        def backward(ctx, g):
            (e,) = ctx.saved_tensors
            return g * e / (1 + e)

    def program():
        x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        (g,) = torch.autograd.grad(Softplus.apply(x * 1.0).pow(3).sum(), x, create_graph=True)
        g.square().sum().backward()

    _, result = verified(program)
    assert [v.argument for v in result.wrong_parameters] == ["x"]
