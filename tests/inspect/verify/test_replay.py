"""Operations run again in float64 are those of the program: the same signs, order, rank, memory, and roundings."""

import pytest
import torch
import torch.nn.functional as F

from kiem.inspect.trace import Trace
from kiem.inspect.verify.ties import chooses


def verdicts(program):
    """By operation, the last of each name; end to end, by leaf; the trace."""
    torch.manual_seed(0)
    with Trace(verify=True) as trace:
        program()
    result = trace.verify().result
    assert not result.wrong and not result.wrong_parameters
    return {trace.graph.op(v.op).label: v for v in result.verdicts}, [v.verdict for _, v in result.parameters], result


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


def clamped_unseen(x):
    with torch.no_grad():
        return x.clamp_(-1, 1)


PROGRAMS = {
    "gradients go by the number of the output": lambda: backward(*torch.linalg.lu(leaf(5, 5))[1:]),
    "signs of singular vectors": lambda: backward(*torch.linalg.svd(leaf(3, 6, 5), full_matrices=False)),
    "signs of eigenvectors": lambda: backward(*torch.linalg.eigh((m := leaf(6, 6)) + m.mT)),
    "order of eigenvalues": lambda: backward(*(t.abs() for t in torch.linalg.eig(leaf(7, 7)))),
    "rank of a pseudoinverse": lambda: backward(torch.linalg.pinv((m := leaf(6, 2)) @ m.mT)),
    "rank 0": lambda: backward(torch.linalg.pinv(leaf(3, 2) * 0)),
    "a number by itself": lambda: backward((x := leaf(4).sum()) / x),
    "one number normalized": lambda: backward(F.layer_norm(leaf(3, 1) * 100, (1,), leaf(1), leaf(1))),
    "two numbers normalized": lambda: backward(F.batch_norm(leaf(2, 3), None, None, leaf(3), leaf(3), True)),
    "clamped under no_grad": lambda: backward(F.cosine_similarity(leaf(4, 5), leaf(4, 5) + 1)),
    "a variance clamped": lambda: backward(F.gaussian_nll_loss(leaf(5), torch.zeros(5), leaf(5).abs())),
    "a leaf coarser than its use": lambda: backward(leaf(5).double().exp()),
    "memory beside a view": lambda: backward(torch.arange(9.0)[2:6].requires_grad_().as_strided((2, 2), (1, 2), 3)),
    "windows that overlap": lambda: backward(leaf(8).as_strided((2, 2, 2), (1, 1, 1))),
    "a circular padding": lambda: backward(F.pad(leaf(1, 2, 4), (1, 2), "circular")),
    "slopes that were drawn": lambda: backward(F.rrelu(leaf(20), training=True)),
    "a view clamped under no_grad": lambda: backward(clamped_unseen((leaf(6) * 1).view(2, 3)).exp()),
    "slopes in place": lambda: backward(F.rrelu_(leaf(20) * 1, training=True)),
    "slopes in place that were not drawn": lambda: backward(F.rrelu_(leaf(20) * 1)),
    "slopes of a part": lambda: backward((F.rrelu_((x := leaf(20) * 1)[3:9], training=True), x)[1]),
    "slopes that were not": lambda: backward(F.rrelu(leaf(20))),
    "a scalar": lambda: backward(leaf().logcumsumexp(0), leaf().t(), leaf(3).t()),
    "a mask among the outputs": lambda: backward(F.multilabel_margin_loss(leaf(1, 4), torch.tensor([[3, 0, -1, 1]]))),
    "a complex norm at 0": lambda: backward((leaf(3, dtype=torch.complex64) * 0).abs()),
    "a constant rounded to float32": lambda: backward(F.hardsigmoid(leaf(20, dtype=torch.float64))),
    "positions between pixels": lambda: backward(F.interpolate(leaf(2, 3, 7, 6), scale_factor=0.6, mode="bicubic")),
    "cells of a grid": lambda: backward(F.grid_sample(leaf(2, 3, 5, 9).bfloat16(), leaf(2, 9, 9, 2).bfloat16(),
                                                      align_corners=False)),
    "windows drawn at random": lambda: backward(*(
        F.fractional_max_pool2d(leaf(2, 3, 9, 9).bfloat16(), k, output_ratio=(0.5, 0.6)) for k in (2, 3, 4))),
    "a bounded logit": lambda: backward(torch.logit(leaf(50).sigmoid(), 0.2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_right_gradient_is_called_right(name):
    operations, leaves, result = verdicts(PROGRAMS[name])
    assert operations and leaves and set(leaves) <= {"ok", "kink"}, result.notes
    assert {v.verdict for v in operations.values()} <= {"ok", "kink", "zero"}, [v.text for v in operations.values()]


TIED = [3.0, -1.5, 3.0, -3.0, 0.5, -3.0]  # the largest twice, the smallest twice
UNTIED = [1.0, -1.5, 3.0, -3.5, 0.5, -2.0]
INDEX = torch.tensor([0, 1, 0, 1, 0, 1])


EXTREMES = {
    "amax": lambda x: x.amax(),
    "amin of columns": lambda x: torch.stack((x, x), 1).amin(0),
    "min": lambda x: x.min(),
    "max": lambda x: x.max(),
    "median": lambda x: x.median(),
    "infinite norm": lambda x: torch.linalg.vector_norm(x, float("inf")),
    "norm of order minus infinity": lambda x: torch.linalg.vector_norm(x[torch.tensor([0, 2, 3])], -float("inf")),
    "index_reduce amax": lambda x: torch.zeros(2).to(x).index_reduce(0, INDEX, x, "amax", include_self=False),
    "scatter_reduce amin": lambda x: torch.zeros(2).to(x).scatter_reduce(0, INDEX, x, "amin", include_self=False),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "max_pool": lambda x: F.max_pool1d(x[None, None], 3)[0, 0],
}


def gradients_times(factor, function, numbers, dtype):
    """The verdict of the operation with ties, and what it is where its gradient is some times what it was."""
    from kiem.inspect.verify.verifier import check_safely

    x = torch.tensor(numbers, dtype=dtype, requires_grad=True)
    state, checked = evidence(lambda: backward(function(x)))
    with state.pause():
        for call, step, op, into, out in checked:
            if not chooses(op):
                continue
            wrong = tuple(None if g is None else g * factor for g in out)
            yield check_safely(state.graph, call, op, step, state.kept.tensors, into, wrong).verdict


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numbers", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("name", EXTREMES)
def test_ties_are_kinks_and_no_wrong_factor_hides_in_them(name, numbers, dtype):
    right = list(gradients_times(1, EXTREMES[name], numbers, dtype))
    assert right and set(right) <= ({"ok", "kink"} if dtype == torch.float32 else {"ok", "kink", "coarse"})
    for factor in (2, 0.5, -1, 1.01 if dtype == torch.float32 else 1.5):
        assert set(gradients_times(factor, EXTREMES[name], numbers, dtype)) == {"wrong"}, factor


@pytest.mark.parametrize(("factor", "verdict"), [(1, "ok"), (1.01, "wrong"), (-1, "wrong")])
def test_distances_by_products_round_their_products(factor, verdict):
    from kiem.inspect.verify.verifier import check_safely

    a = torch.tensor([[-6.9]], requires_grad=True)
    b = torch.tensor([[-1.8], [-4.3], [-2.4], [-7.9], [-6.8]], requires_grad=True)
    state, checked = evidence(lambda: backward(torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")))
    with state.pause():
        for call, step, op, into, out in checked:
            if op.label == "_euclidean_dist":
                given = tuple(None if g is None else g * factor for g in out)
                found = check_safely(state.graph, call, op, step, state.kept.tensors, into, given)
                assert [i.verdict for i in found.inputs] == [verdict] * 2
                return
    raise AssertionError("no such operation was recorded")


@pytest.mark.parametrize("function", [torch.linalg.pinv, torch.linalg.inv, torch.linalg.svdvals])
def test_recording_changes_no_complex_number(function):
    """torch leaves lazy conjugates out below a dispatch mode, of which some kernels are made."""
    x = leaf(4, 4, dtype=torch.complex128)
    plain = function(x)
    (expected,) = torch.autograd.grad(plain.abs().sum(), x)
    with Trace():
        recorded = function(x)
        (got,) = torch.autograd.grad(recorded.abs().sum(), x)
    assert torch.equal(plain, recorded) and torch.equal(expected, got)


def evidence(program):
    """Of each operation that backward came to: what it takes to check it again, with another gradient."""
    torch.manual_seed(0)
    with Trace() as trace:
        program()
    state = trace._recorder.state
    return state, [e for e in state.evidence if e.op is not None]


@pytest.mark.parametrize("name", ["signs of singular vectors", "order of eigenvalues", "rank of a pseudoinverse",
                                  "signs of eigenvectors", "slopes that were drawn", "positions between pixels",
                                  "memory beside a view", "gradients go by the number of the output"])  # fmt: skip
@pytest.mark.parametrize("mutation", ["sign", "scale"])
def test_a_wrong_gradient_is_called_wrong(name, mutation):
    from kiem.inspect.verify.verifier import check_safely

    state, checked = evidence(PROGRAMS[name])
    tried = 0
    with state.pause():
        for call, step, op, into, out in checked:
            for position, gradient in enumerate(out):
                if gradient is None or not gradient.abs().max() > 0:
                    continue
                wrong = -gradient
                if mutation == "scale":
                    wrong = gradient.clone(memory_format=torch.contiguous_format)
                    wrong.view(-1)[gradient.abs().argmax()] *= 1.01
                given = (*out[:position], wrong, *out[position + 1 :])
                verdict = check_safely(state.graph, call, op, step, state.kept.tensors, into, given)
                assert verdict.verdict == "wrong", f"{op.label}: {verdict.verdict} {verdict.text}"
                tried += 1
    assert tried
