"""Correct programs whose numbers are hard to check: computed where nobody looks on, normalised over one or two
elements, with several right results, of a rank that rounding decides. None may be called wrong; what says `checked` is
checked to the end, operation by operation and as a whole."""

import pytest
import torch
from tests.inspect.verify.test_corners import verified
from torch import nn
from torch.nn import functional as F


def _kernel(x):
    """As a compiled kernel: it writes into memory, and torch sees nothing of it."""
    y = torch.empty_like(x)
    y.numpy()[...] = x.detach().numpy() ** 3
    return y


def _by_hand(x):
    y = torch.empty_like(x)
    source, target = x.detach().view(-1), y.view(-1)
    with torch._C._DisableTorchDispatch():
        torch.mul(source, source, out=target)
        target.mul_(source)
    return y


def _by_numpy(x):
    return torch.from_numpy(x.detach().double().numpy() ** 3).float()


def cube(forward, factor=1.0):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return factor * 3 * x * x * g

    def program():
        w = torch.randn(4, 3, requires_grad=True)
        (Cube.apply(w * 1.5) * torch.randn(4, 3)).sum().backward()

    return program


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def weighed(y):
    (y * torch.randn_like(y)).sum().backward()


def normalised(norm, *shape):
    return lambda: weighed(norm(leaf(*shape) * 1.0))


def norm_of_the_leaf(norm, *shape):
    return lambda: weighed(norm(leaf(*shape)))


def ratio_of_itself():
    x = leaf(5)
    y = x * 1.0
    weighed(y / y)


def ratio_of_a_leaf():
    x = leaf(5)
    weighed(x / x)


def covariance(n=4):
    a = torch.randn(n, n)
    return (a @ a.mT + n * torch.eye(n)).requires_grad_()


def cholesky_of_a_leaf():
    weighed(torch.linalg.cholesky(covariance()))


def normal_with_a_covariance():
    mean = leaf(4)
    normal = torch.distributions.MultivariateNormal(mean, covariance())
    (-normal.log_prob(torch.randn(6, 4)).mean()).backward()


def normal_sampled():
    normal = torch.distributions.MultivariateNormal(leaf(4), covariance())
    normal.rsample((5,)).tanh().sum().backward()


def kl_of_normals():
    one = torch.distributions.MultivariateNormal(leaf(4), covariance())
    other = torch.distributions.MultivariateNormal(leaf(4), covariance())
    torch.distributions.kl_divergence(one, other).backward()


def cholesky_solve_of_a_leaf():
    b, factor = leaf(4, 2), torch.linalg.cholesky(covariance().detach()).requires_grad_()
    weighed(torch.cholesky_solve(b, factor))


def eigenvalues_of_a_leaf():
    weighed(torch.linalg.eigvalsh(covariance()))


def log_probabilities(lengths_as_tensors=True):
    def program():
        log_probs = torch.randn(12, 2, 6).log_softmax(-1).requires_grad_()
        lengths = ((12, 10), (4, 3))
        if lengths_as_tensors:
            lengths = tuple(map(torch.tensor, lengths))
        F.ctc_loss(log_probs, torch.randint(1, 6, (2, 4)), *lengths).backward()

    return program


def leaf_coarser_than_its_outputs(narrow, wide):
    def program():
        w = torch.randn(6, 5).to(narrow).requires_grad_()
        x = torch.randn(7, 6, dtype=wide)
        (x @ w.to(wide)).tanh().square().mean().backward()

    return program


def two_leaves_of_different_types():
    w, b = torch.randn(6, 5).to(torch.bfloat16).requires_grad_(), torch.randn(5, dtype=torch.float64).requires_grad_()
    (torch.randn(7, 6, dtype=torch.float64) @ w.double() + b).tanh().square().mean().backward()


def projector(dtype=torch.float32):
    a = leaf(5, 5, dtype=dtype)
    _, vectors = torch.linalg.eigh(a @ a.mH)
    top = vectors[:, -2:]
    p = top @ top.mH
    weighed((p * torch.randn_like(p)).abs().square() if p.is_complex() else p)


def matrix_root():
    a = leaf(5, 5)
    values, vectors = torch.linalg.eigh(a @ a.mT + torch.eye(5))
    weighed((vectors * values.sqrt()) @ vectors.mT)


def projector_of_a_leaf():
    _, vectors = torch.linalg.eigh(covariance())
    weighed(vectors[:, -2:] @ vectors[:, -2:].mT)


def polar(of_a_product=True):
    def program():
        a = leaf(5, 3)
        u, _, vh = torch.linalg.svd(a * 1.0 if of_a_product else a, full_matrices=False)
        weighed(u @ vh)

    return program


def low_rank():
    u, s, vh = torch.linalg.svd(leaf(6, 4) * 1.0, full_matrices=False)
    weighed((u[:, :2] * s[:2]) @ vh[:2])


def projector_of_eig():
    values, vectors = torch.linalg.eig(leaf(4, 4) * 1.0)
    first = values.real.argmax()
    p = vectors[:, first, None] @ torch.linalg.inv(vectors)[None, first]
    weighed(p.real)


def function_of_eig():
    values, vectors = torch.linalg.eig(leaf(4, 4) * 1.0)
    weighed((vectors @ torch.diag(values.exp()) @ torch.linalg.inv(vectors)).real)


def spectral_radius():
    torch.linalg.eigvals(leaf(4, 4) * 1.0).abs().amax().backward()


def lu(n, m, dtype=torch.float32):
    def program():
        p, l, u = torch.linalg.lu(leaf(n, m, dtype=dtype) * 1.0)
        weighed(l.abs().square() if dtype.is_complex else l)
        del p, u

    return program


def lu_both(n, m, dtype=torch.float32):
    def program():
        _, lower, upper = torch.linalg.lu(leaf(n, m, dtype=dtype) * 1.0)
        part = (lower * torch.randn_like(lower)).sum() + (upper * torch.randn_like(upper)).sum()
        (part.abs() if part.is_complex() else part).backward()

    return program


def lu_unpacked(n, m):
    def program():
        factors, pivots = torch.linalg.lu_factor(leaf(n, m) * 1.0)
        _, lower, upper = torch.lu_unpack(factors, pivots)
        ((lower * torch.randn_like(lower)).sum() + (upper * torch.randn_like(upper)).sum()).backward()

    return program


def lu_upper_only(n, m):
    def program():
        factors, pivots = torch.linalg.lu_factor(leaf(n, m) * 1.0)
        weighed(torch.lu_unpack(factors, pivots)[2])

    return program


def pseudoinverse(rank):
    def program():
        a, b = leaf(4, max(rank, 1)), leaf(max(rank, 1), 3)
        weighed(torch.linalg.pinv(a @ b if rank else (a @ b) * 0.0))

    return program


def pseudoinverse_of_zeros():
    weighed(torch.linalg.pinv(torch.zeros(4, 3, requires_grad=True)))


def partial_view():
    x = leaf(6, 4) * 1.0
    weighed(x[1:4, ::2].as_strided((2, 2), (4, 2), 4))


def partial_view_and_beyond():
    """It shows memory that the view itself does not."""
    x = leaf(6, 4) * 1.0
    weighed(x[1:3].as_strided((3, 2), (4, 1), 4))


def windows():
    x = leaf(12)
    weighed(x.as_strided((5, 4), (2, 1)).square())


# Checked operation by operation; where a Function is called again as a whole, or all that is left of the loss is its
# rounding, the whole cannot be run again in float64, and that is said.
IN_PART = {
    "kernel into empty_like": cube(_kernel),
    "kernel into empty_like, by torch": cube(_by_hand),
    "numpy": cube(_by_numpy),
    "GroupNorm of 1": normalised(nn.GroupNorm(3, 3), 2, 3, 1),
}
CHECKED = {
    "BatchNorm1d of 2": normalised(nn.BatchNorm1d(3), 2, 3),
    "BatchNorm1d of a leaf": norm_of_the_leaf(nn.BatchNorm1d(3), 2, 3),
    "LayerNorm of 1": normalised(nn.LayerNorm(1), 4, 1),
    "LayerNorm of 2": normalised(nn.LayerNorm(2), 4, 2),
    "LayerNorm of 1, leaf": norm_of_the_leaf(nn.LayerNorm(1), 4, 1),
    "LayerNorm of 2, leaf": norm_of_the_leaf(nn.LayerNorm(2), 4, 2),
    "GroupNorm of 2": normalised(nn.GroupNorm(2, 4), 2, 4),
    "InstanceNorm of 2": normalised(nn.InstanceNorm1d(3), 2, 3, 2),
    "InstanceNorm of 2, leaf": norm_of_the_leaf(nn.InstanceNorm1d(3, affine=True), 2, 3, 2),
    "x/x": ratio_of_itself,
    "x/x of a leaf": ratio_of_a_leaf,
    "cholesky of a leaf": cholesky_of_a_leaf,
    "normal": normal_with_a_covariance,
    "normal sampled": normal_sampled,
    "kl of normals": kl_of_normals,
    "cholesky_solve of a leaf": cholesky_solve_of_a_leaf,
    "eigenvalues of a leaf": eigenvalues_of_a_leaf,
    "projector of a leaf": projector_of_a_leaf,
    "log-probabilities": log_probabilities(),
    "log-probabilities, lengths as tuples": log_probabilities(False),
    "float32 leaf, float64 inside": leaf_coarser_than_its_outputs(torch.float32, torch.float64),
    "bfloat16 leaf, float32 inside": leaf_coarser_than_its_outputs(torch.bfloat16, torch.float32),
    "bfloat16 leaf, float64 inside": leaf_coarser_than_its_outputs(torch.bfloat16, torch.float64),
    "float16 leaf, float32 inside": leaf_coarser_than_its_outputs(torch.float16, torch.float32),
    "leaves of two types": two_leaves_of_different_types,
    "projector": projector,
    "complex projector": lambda: projector(torch.complex64),
    "matrix root": matrix_root,
    "polar": polar(),
    "polar of a leaf": polar(False),
    "low rank": low_rank,
    "eig projector": projector_of_eig,
    "eig function": function_of_eig,
    "spectral radius": spectral_radius,
    **{f"lu {n}x{m}": lu(n, m) for n, m in ((3, 3), (4, 2), (2, 4))},
    "lu complex": lu(3, 3, torch.complex64),
    **{f"lu both {n}x{m}": lu_both(n, m) for n, m in ((3, 3), (4, 2), (2, 4))},
    "lu both complex": lu_both(3, 3, torch.complex64),
    **{f"lu_unpack {n}x{m}": lu_unpacked(n, m) for n, m in ((3, 3), (4, 2), (2, 4))},
    **{f"lu_unpack, upper {n}x{m}": lu_upper_only(n, m) for n, m in ((3, 3), (4, 2), (2, 4))},
    "pinv of rank 2": pseudoinverse(2),
    "pinv of rank 1": pseudoinverse(1),
    "pinv of rank 0": pseudoinverse(0),
    "pinv of zeros": pseudoinverse_of_zeros,
    "as_strided of a partial view": partial_view,
    "as_strided beyond a view": partial_view_and_beyond,
    "windows": windows,
}


@pytest.mark.parametrize("name", [*CHECKED, *IN_PART])
def test_a_right_program_is_not_called_wrong(name):
    for seed in range(3):
        recorder, result = verified(CHECKED.get(name) or IN_PART[name], seed)
        told = [(recorder.graph.op(v.op).name, v.verdict, v.text) for v in result.verdicts]
        assert result.wrong == [] and result.wrong_parameters == [], told
        if name in CHECKED:
            assert result.ok is True, (told, result.gaps, [(v.verdict, v.sharpness) for _, v in result.parameters])
        else:
            assert {v.verdict for v in result.verdicts} <= {"ok", "kink", "zero"}, told
            assert {gap.kind for gap in result.gaps} == (set() if result.ok else {"end to end"})


@pytest.mark.parametrize("name", ["kernel into empty_like", "kernel into empty_like, by torch", "numpy"])
def test_what_computes_outside_of_torch_is_found_wrong(name):
    forward = {"kernel into empty_like": _kernel, "numpy": _by_numpy}.get(name, _by_hand)
    for factor in (0.9, 1.05, -1.0, 0.0):
        recorder, result = verified(cube(forward, factor))
        assert [recorder.graph.op(v.op).name for v in result.wrong] == ["Cube"], factor


def test_a_wrong_gradient_of_a_matrix_that_counts_as_symmetric_is_found():
    class Cholesky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            factor = torch.linalg.cholesky(a)
            ctx.save_for_backward(factor)
            return factor

        @staticmethod
        def backward(ctx, g):
            (factor,) = ctx.saved_tensors
            inverse = torch.linalg.inv(factor)
            middle = (factor.mT @ g).tril()
            middle.diagonal().mul_(0.5)
            s = inverse.mT @ middle @ inverse
            return (s + s.mT) / 2 * 1.01

    def program():
        (Cholesky.apply(covariance()) * torch.randn(4, 4)).sum().backward()

    _, result = verified(program)
    assert len(result.wrong) == 1 and len(result.wrong_parameters) == 1
