"""A backward that is wrong by a factor is found in coarse types too, or it is said that the check was too coarse."""

import contextlib
import io
import warnings
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from kiem.inspect.record.recorder import Recorder
from kiem.inspect.verify.verifier import Verifier

FACTORS = (1.05, 1.1, 1.2, 1.5, 2.0, 0.0, -1.0)

# name -> (function of x (16, 24) and w (24, 24), in the type of both)
OPERATIONS = {
    "tanh": lambda x, w: torch.tanh(x), "exp": lambda x, w: torch.exp(x), "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x), "softmax": lambda x, w: x.softmax(-1), "matmul": lambda x, w: x @ w,
    "relu matmul": lambda x, w: F.relu(x @ w), "layer norm": lambda x, w: F.layer_norm(x, (24,)),
    "rms norm": lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
    "log softmax": lambda x, w: x.log_softmax(-1), "logsumexp": lambda x, w: x.logsumexp(-1),
    "mean": lambda x, w: x.mean(0), "square": lambda x, w: x.square(), "sigmoid": lambda x, w: torch.sigmoid(x),
    "product": lambda x, w: x * w[:16], "quotient": lambda x, w: x / (2 + w[:16].square()),
    "cumsum": lambda x, w: x.cumsum(-1), "sqrt": lambda x, w: (1 + x.square()).sqrt(),
    "attention": lambda x, w: (x @ w).softmax(-1) @ w, "transpose": lambda x, w: x.t() @ x,
    "gather": lambda x, w: x[:, [3, 1, 1]], "max": lambda x, w: x.amax(-1), "cat": lambda x, w: torch.cat((x, w)),
    "conv": lambda x, w: F.conv1d(x.view(2, 8, 24), w.view(8, 8, 9)), "scale": lambda x, w: 3 * x,
}  # fmt: skip
FAST = ("tanh", "softmax", "matmul")


def mutated(operation, factor, hidden):
    """A Function that computes the operation, whose backward is `factor` times what is due. `hidden`: computed outside
    of torch, so that nothing of its inside is recorded."""

    class Mutated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            if not hidden:
                return operation(x, w)
            wide = [torch.from_numpy(t.detach().float().numpy()).double() for t in (x, w)]
            return torch.from_numpy(_unseen(operation, *wide).numpy()).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
                grads = torch.autograd.grad(operation(x, w), (x, w), g, allow_unused=True)
            return tuple(None if grad is None else grad * factor for grad in grads)

    return Mutated


def _unseen(operation, x, w):
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        return operation(x, w)


def verdict_of(name, dtype, factor, hidden=False, seed=0):
    """The verdict on the mutated Function: wrong, coarse, ok, ..."""
    torch.manual_seed(seed)
    x, w = torch.randn(16, 24, dtype=dtype), torch.randn(24, 24, dtype=dtype) / 4
    function = mutated(OPERATIONS[name], factor, hidden)
    verifier = Verifier(end_to_end=False)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with Recorder(observer=verifier, keep=None) as recorder:
            y = function.apply(x.requires_grad_(), w.requires_grad_())
            y.backward(torch.randn(y.shape).to(dtype))
    kinds = [v.verdict for v in verifier.ended().verdicts if recorder.graph.op(v.op).name == "Mutated"]
    assert len(kinds) == 1
    return kinds[0]


def outcomes(names, dtype, hidden=False):
    """factor -> how often which verdict."""
    return {
        factor: Counter(verdict_of(name, dtype, factor, hidden) for name in names) for factor in (1.0, *FACTORS)
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_factor_is_found_in_a_coarse_type(dtype):
    found = outcomes(FAST, dtype)
    assert found[1.0] == {"ok": len(FAST)}
    for factor in (1.1, 1.2, 1.5, 2.0, 0.0, -1.0):
        assert found[factor] == {"wrong": len(FAST)}, factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_factor_is_found_where_only_the_number_is_known(dtype):
    found = outcomes(FAST, dtype, hidden=True)
    # In bfloat16 a number along one random direction does not show that nothing is missing.
    assert found[1.0] == {"coarse" if dtype == torch.bfloat16 else "ok": len(FAST)}
    for factor in (1.5, 2.0, 0.0, -1.0):
        assert found[factor] == {"wrong": len(FAST)}, factor


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wrong_factors_of_many_operations(dtype, hidden):
    """A factor of 1.5 or more, zero and a sign are found in all, a smaller one if the type allows. At ties (amax)
    the backward of torch is one of many, so it is left out."""
    names = [name for name in OPERATIONS if name != "max"]
    found = outcomes(names, dtype, hidden)
    assert set(found[1.0]) <= {"ok", "coarse"} and found[1.0]["coarse"] <= (len(names) // 4 if hidden else 0)
    for factor in (1.5, 2.0, 0.0, -1.0):
        assert found[factor]["ok"] == 0, (factor, found[factor])
    if not hidden:
        assert found[1.2]["wrong"] == len(names) and found[1.1]["wrong"] >= len(names) - 2
