"""Every row of the table of derivatives against autograd and against difference quotients, in float64."""

# ruff: noqa: E501  (a table of cases)

import itertools
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from kiem.inspect.graph.schema import signature
from kiem.inspect.rules import RULES, Call, find, formula, local_derivative, substituted
from kiem.inspect.rules.table import find_key

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def x(*shape, low=None, high=None):
    """Normal numbers, or uniform ones from low to high."""
    t = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    return t if low is None else low + (high - low) * torch.rand(shape, generator=GENERATOR, dtype=torch.float64)


def pos(*shape):
    return x(*shape, low=0.3, high=2.0)


def unit(*shape):
    return x(*shape, low=0.1, high=0.9)


def z(*shape):
    return torch.complex(x(*shape), x(*shape))


def like(t):
    return z(*t.shape) if t.is_complex() else x(*t.shape)


def ints(*shape, below):
    return torch.randint(0, below, shape, generator=GENERATOR)


def mask(*shape):
    return torch.rand(shape, generator=GENERATOR) > 0.5


class fixed:
    """A floating-point tensor that is no variable here: running moments, a target's weights, what torch does not differentiate."""

    def __init__(self, tensor):
        self.tensor = tensor


def away(*shape, points=(0.0,)):
    """Numbers not near the points, where there is no derivative."""
    t = 2 * x(*shape)
    for p in points:
        t = torch.where((t - p).abs() < 0.1, t + 0.3, t)
    return t


BATCH_NORM = (fixed(torch.zeros(3).double()), fixed(torch.ones(3).double() * 0.7))
SDPA = (x(2, 4, 5, 3), x(2, 2, 5, 3), x(2, 2, 5, 3))
SAME = (x(2, 2, 4, 3), x(2, 2, 5, 3), x(2, 2, 5, 3))


def sdpa(q, k, v, *_, attn_mask=None, attn_bias=None, is_causal=False, scale=None, **__):
    """The definition, for kernels that this machine has not."""
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    return (scores + (0 if attn_bias is None else attn_bias)).softmax(-1) @ v


def lstm(x_TBI, w, u, b, c, hx, cx, reverse, sizes, *_):
    """One layer by torch's other implementation, which has float64."""
    y, h, c = torch.lstm(x_TBI.flip(0) if reverse else x_TBI, (hx, cx), [w, u, b, c], True, 1, 0.0, False, False, False)
    return y.flip(0) if reverse else y, h, c, torch.zeros(0, dtype=torch.uint8)


def lstm_cell(a, b, c, d=0, e=0):
    """The definition, of which torch has a kernel for the GPU only."""
    i, f, new, o = (a + d + b + e).chunk(4, -1)
    cell = f.sigmoid() * c + i.sigmoid() * new.tanh()
    return o.sigmoid() * cell.tanh(), cell, torch.zeros(0, dtype=torch.uint8)


def gru_cell(a, b, h, d=0, e=0):
    """The same of the GRU."""
    (ar, au, an), (br, bu, bn) = (a + d).chunk(3, -1), (b + e).chunk(3, -1)
    r, u = (ar + br).sigmoid(), (au + bu).sigmoid()
    return (1 - u) * (an + r * bn).tanh() + u * h, torch.zeros(0, dtype=torch.uint8)


def batch_norm(input, weight, bias, running_mean, running_var, *_, **__):
    return F.batch_norm(input, None, None, weight, bias, True, 0.1, 1e-5)


# operation, arguments, keyword arguments, and instead of the operation a function where this machine cannot run it
CASES = [
    # pointwise: two arguments, with numbers and broadcasting
    *((op, (x(2, 3), pos(*shape))) for op in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "atan2", "hypot", "logaddexp", "maximum", "minimum") for shape in ((2, 3), (3,), (2, 1), ())),
    *((op, (x(2, 3), 1.7)) for op in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar")),
    ("add.Tensor", (x(0, 3), x(3))), ("mul.Tensor", (x(2, 3), mask(3))), ("mul.Tensor", (ints(3, below=4), x(3))),
    ("add.Tensor", (x(3), x(2, 3)), {"alpha": 2.5}), ("sub.Tensor", (x(3), x(2, 3)), {"alpha": 2.5}), ("rsub.Tensor", (x(3), x(2, 1)), {"alpha": 2}),
    ("add_.Tensor", (x(2, 3), x(3))), ("mul_.Tensor", (x(2, 3), x(3))), ("div_.Tensor", (x(2, 3), pos(3))), ("sub_.Tensor", (x(2, 3), x(1))),
    ("div.Tensor_mode", (x(3), pos(3)), {"rounding_mode": None}), ("div.Tensor_mode", (x(3) * 9, pos(3)), {"rounding_mode": "floor"}),
    ("div.Scalar_mode", (x(3) * 9, 2.0), {"rounding_mode": "trunc"}),
    *(("pow.Tensor_Scalar", (pos(3), p)) for p in (2, 3.5, -1, 0, 0.5, 1)), ("pow.Tensor_Scalar", (x(3), 2)), ("pow.Tensor_Tensor", (pos(2, 3), x(3))),
    ("pow.Scalar", (1.7, x(3))), ("pow.Tensor_Tensor", (pos(3), ints(3, below=3))),
    ("addcmul", (x(2, 3), x(3), x(2, 1)), {"value": 0.7}), ("addcdiv", (x(2, 3), x(3), pos(2, 1)), {"value": 0.7}),
    ("lerp.Scalar", (x(2, 3), x(3), 0.3)), ("lerp.Tensor", (x(2, 3), x(3), unit(2, 1))),
    ("fmod.Scalar", (x(5) * 4, 1.3)), ("fmod.Tensor", (torch.tensor([5.1, -4.2]).double(), torch.tensor([1.5, 1.1]).double())), ("remainder.Scalar", (x(5) * 4, 1.3)),
    ("remainder.Tensor", (torch.tensor([5.1, -4.2]).double(), torch.tensor([1.5, 1.1]).double())), ("xlogy.Tensor", (x(3), pos(3))), ("xlogy.Scalar_Other", (x(3), 1.5)),
    # pointwise: one argument
    *((op, (x(2, 3),)) for op in ["neg", "exp", "exp2", "expm1", "sin", "cos", "tanh", "sinh", "cosh", "asinh", "atan", "erf", "erfc", "sigmoid", "silu", "mish", "square", "positive", "log_sigmoid_forward", "frac"]),
    *((op, (x(),)) for op in ("exp", "sigmoid", "tanh")),
    *((op, (pos(2, 3),)) for op in ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma"]),
    *((op, (unit(2, 3),)) for op in ["tan", "asin", "acos", "atanh", "erfinv", "logit"]), ("acosh", (pos(3) + 1,)),
    *((op, (away(2, 3),)) for op in ["abs", "relu", "sign", "floor", "ceil", "round", "trunc", "nan_to_num"]),
    ("relu_", (away(4),)), ("hardswish", (away(9, points=(-3, 3)),)), ("hardsigmoid", (away(9, points=(-3, 3)),)),
    ("gelu", (x(2, 3),)), ("gelu", (x(2, 3),), {"approximate": "tanh"}), ("softplus", (x(6), 2.0, 1.0)), ("softplus", (x(6),)),
    ("leaky_relu", (away(5), 0.2)), ("_prelu_kernel", (away(2, 3), x(1, 3))), ("elu", (away(6), 1.6, 1.05, 0.8)), ("elu", (away(6),)), ("celu", (away(6), 1.5)),
    ("hardtanh", (away(9, points=(-1, 1)),)), ("softshrink", (away(9, points=(-0.5, 0.5)),)), ("hardshrink", (away(9, points=(-0.5, 0.5)),)),
    ("threshold", (away(9, points=(0.4,)), 0.4, 7.0)), ("glu", (x(2, 4, 3), 1)), ("glu", (x(2, 4),)),
    ("clamp", (away(9, points=(-1, 1)), -1, 1)), ("clamp", (away(9, points=(1,)), None, 1)), ("clamp.Tensor", (x(9), x(9) - 1, x(1) + 1)), ("clamp.Tensor", (x(9), x(9), x(9))),
    ("clamp_min", (away(9), 0)), ("clamp_min.Tensor", (x(2, 3), x(3))), ("clamp_max", (away(9), 0)), ("clamp_max.Tensor", (x(2, 3), x(3))),
    ("where.self", (mask(2, 3), x(2, 3), x(3))), ("where.self", (mask(2, 3), x(), x(3))),
    ("masked_fill.Scalar", (x(2, 3), mask(3), 7.0)), ("masked_fill.Tensor", (x(2, 3), mask(2, 3), x())), ("masked_fill_.Scalar", (x(2, 3), mask(2, 1), -math.inf)),
    ("native_dropout", (x(4, 5), 0.3, True)), ("native_dropout", (x(4, 5), 0.3, False)),
    # reductions
    *((op, (x(2, 3, 4),)) for op in ["sum", "mean", "max", "min", "median", "prod"]),
    *((op, (x(2, 3, 4), dim, keep)) for op in ("sum.dim_IntList", "mean.dim") for dim, keep in (([1], False), ([-1], True), ([0, 2], False), (None, False), ([], True))),
    *((op, (x(2, 3, 4), dim, keep)) for op in ("amax", "amin", "logsumexp") for dim, keep in (([1], False), ([-1, 0], True))), ("amin", (x(3),)),
    ("sum", (x(),)), ("mean", (x(),)), ("sum.dim_IntList", (x(0, 3), [0])), ("sum", (x(0),)),
    ("aminmax", (x(2, 3),), {"dim": 1}), ("aminmax", (x(2, 3),), {}),
    *((op, (x(2, 3, 4), dim, keep)) for op in ("max.dim", "min.dim", "median.dim") for dim, keep in ((1, False), (-1, True))),
    ("kthvalue", (x(2, 5), 2)), ("mode", (x(2, 5), 1)), ("max.dim", (x(), 0)), ("sort", (x(2, 5), 0)), ("sort.stable", (x(2, 5),), {"stable": True}), ("topk", (x(2, 5), 3)),
    *((op, (x(2, 3, 4), dim), {"correction": k, "keepdim": keep}) for op in ("var.correction", "std.correction", "var_mean.correction", "std_mean.correction") for dim, k, keep in (([1], 1, False), ([0, 2], 0, True), (None, 1, False))),
    ("var", (x(5), False)), ("std", (x(5), True)), ("prod.dim_int", (x(2, 3), 1)), ("prod.dim_int", (torch.tensor([[0.0, 2, 3], [0, 0, 1]]).double(), -1, True)), ("prod", (torch.tensor([0.0, 2, 3]).double(),)),
    ("cumsum", (x(2, 3), 1)), ("cumsum", (x(2, 3), -2)), ("cumprod", (x(2, 3), 1)), ("cumprod", (torch.tensor([1.5, 0, 3, 0]).double(), 0)), ("logcumsumexp", (x(2, 4), 1)),
    *(("linalg_vector_norm", (away(2, 3), p, dim, keep)) for p in (1, 2, 3, math.inf) for dim, keep in ((None, False), ([1], True))), ("linalg_vector_norm", (x(3), 0)), ("linalg_vector_norm", (x(3),)),
    ("norm.Scalar", (x(2, 3),)), ("norm.ScalarOpt_dim", (x(2, 3), 2, [1], True)), ("trace", (x(3, 4),)),
    # matrices
    ("mm", (x(2, 3), x(3, 4))), ("mm", (x(0, 3), x(3, 4))), ("bmm", (x(5, 2, 3), x(5, 3, 4))),
    ("addmm", (x(4), x(2, 3), x(3, 4))), ("addmm", (x(2, 1), x(2, 3), x(3, 4)), {"beta": 0.5, "alpha": 2}), ("addmm_", (x(2, 4), x(2, 3), x(3, 4))),
    ("baddbmm", (x(5, 1, 4), x(5, 2, 3), x(5, 3, 4)), {"alpha": 0.3}), ("addbmm", (x(2, 4), x(5, 2, 3), x(5, 3, 4)), {"beta": 2, "alpha": 0.3}),
    ("dot", (x(3), x(3))), ("vdot", (x(3), x(3))), ("mv", (x(2, 3), x(3))), ("addmv", (x(2), x(2, 3), x(3)), {"beta": 2, "alpha": 3}), ("addr", (x(2, 3), x(2), x(3)), {"alpha": 3}),
    ("linear", (x(5, 2, 3), x(4, 3), x(4))), ("linear", (x(3), x(4, 3))), 
    *(("matmul", (x(*a), x(*b))) for a, b in (((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((5, 2, 3), (3, 4)), ((5, 1, 2, 3), (6, 3, 4)), ((3,), (5, 3, 2)), ((5, 2, 3), (3,)))),
    ("_trilinear", (x(5, 2), x(4, 2, 3), x(5, 3), [1, 3], [0], [1, 2], [2, 3])),
    ("convolution", (x(2, 4, 9), x(6, 4, 3), x(6), [1], [0], [1], False, [0], 1)),
    ("convolution", (x(2, 4, 9, 8), x(6, 2, 3, 2), x(6), [2, 3], [1, 2], [2, 1], False, [0, 0], 2)),
    ("convolution", (x(2, 4, 5), x(4, 3, 3), x(6), [2], [1], [1], True, [1], 2)), ("convolution", (x(2, 4, 5, 4), x(4, 3, 3, 2), None, [1, 2], [0, 1], [2, 1], True, [0, 1], 1)),
    ("convolution", (x(1, 2, 4, 3, 3), x(2, 2, 2, 2, 2), None, [1, 1, 1], [1, 0, 0], [1, 1, 1], False, [0, 0, 0], 1)),
    ("_convolution", (x(2, 4, 9), x(4, 1, 3), x(4), [2], [1], [1], False, [0], 4, False, False, False, False)),
    ("linalg_inv_ex", (x(2, 3, 3) + 3 * torch.eye(3),)), ("_linalg_det", (x(2, 3, 3),)), ("_linalg_slogdet", (x(2, 3, 3),)),
    ("_linalg_solve_ex", (x(3, 3) + 3 * torch.eye(3), x(3))), ("_linalg_solve_ex", (x(2, 3, 3) + 3 * torch.eye(3), x(2, 3, 4))), ("_linalg_solve_ex", (x(3, 3) + 3 * torch.eye(3), x(4, 3)), {"left": False}),
    ("_euclidean_dist", (x(2, 4, 3), x(2, 5, 3))),
    ("linalg_cross", (x(2, 3), x(2, 3))), *(("_cdist_forward", (x(2, 4, 3), x(2, 5, 3), p, 2 if p != 2 else None)) for p in (1.0, 2.0, 3.0)),
    ("linalg_cholesky_ex", (x(3, 3),), {}, lambda a: torch.linalg.cholesky((a + a.mH) / 2 + 9 * torch.eye(3))),
    ("linalg_cholesky_ex", (x(3, 3),), {"upper": True}, lambda a, upper: torch.linalg.cholesky((a + a.mH) / 2 + 9 * torch.eye(3), upper=upper)),
    # shapes
    ("view", (x(2, 6), [3, 4])), ("_unsafe_view", (x(2, 6), [3, -1])), ("reshape", (x(2, 6), [12])), ("_reshape_alias", (x(2, 6), [3, 4], [4, 1])),
    ("unsqueeze", (x(2, 3), -1)), ("squeeze", (x(1, 3, 1),)), ("squeeze.dim", (x(1, 3), 0)), ("squeeze.dims", (x(1, 3, 1), [0, 2])), ("flatten.using_ints", (x(2, 3),)), ("unflatten.int", (x(6), 0, [2, 3])),
    ("clone", (x(2, 3),)), ("contiguous", (x(2, 3).mT,)), ("alias", (x(3),)), ("_to_copy", (x(3),)), ("to.dtype", (x(3), torch.float64)), ("lift_fresh", (x(3),)), 
    ("expand", (x(3, 1), [2, 3, 4])), ("expand", (x(), [2])), ("t", (x(2, 3),)), ("t", (x(2),)), ("numpy_T", (x(2, 3, 4),)), ("transpose.int", (x(2, 3, 4), 0, -1)), ("permute", (x(2, 3, 4), [2, 0, -2])),
    ("select.int", (x(2, 3), 1, -1)), *(("slice.Tensor", (x(5, 3), 0, a, b, s)) for a, b, s in ((1, 4, 2), (None, None, 1), (-3, -1, 1), (-9, 99, 3), (4, 2, 1))), ("slice.Tensor", (x(5, 3), -1, 1)), ("narrow", (x(5, 3), 0, 1, 2)),
    ("diagonal", (x(3, 4), 1)), ("diagonal", (x(2, 3, 4), -1, -1, 0)), ("diagonal_copy", (x(3, 3),)), ("diag_embed", (x(2, 3), 1)),
    ("split.Tensor", (x(5, 3), 2)), ("unsafe_split.Tensor", (x(3, 5), 2, -1)), ("split_with_sizes", (x(5, 3), [1, 4])), ("unsafe_split_with_sizes", (x(5, 3), [2, 3])), ("chunk", (x(5, 3), 2)), ("unbind.int", (x(2, 3), -1)),
    ("cat", ([x(2, 3), x(1, 3)],)), ("cat", ([x(2, 3), x(2, 1), ints(2, 2, below=3)], -1)), ("cat", ([x(0), x(2, 3)],)), ("stack", ([x(2), x(2)],)), ("stack", ([x(2), x(2)], -1)),
    ("index.Tensor", (x(4, 3), [torch.tensor([0, 2, 0])])), ("index.Tensor", (x(4, 3, 2), [None, torch.tensor([[0, 2], [1, -1]])])), ("index.Tensor", (x(4, 3), [mask(4, 3)])), ("index.Tensor", (x(4, 3, 2), [torch.tensor([0, 1]), None, torch.tensor([1, 1])])),
    ("_unsafe_index.Tensor", (x(4, 3), [torch.tensor([0, 2, 0]), torch.tensor([1, 1, 2])])), ("index_select", (x(4, 3), -1, torch.tensor([2, 0, 2]))), ("gather", (x(3, 4), 1, ints(2, 3, below=4))),
    ("masked_select", (x(4, 3), mask(3))), ("masked_select", (x(3), mask(4, 3))), ("scatter.src", (x(3, 4), 1, torch.tensor([[0, 2], [1, 3]]), x(2, 2))), ("scatter.value", (x(3, 4), 0, torch.tensor([[0, 2]]), 7.0)), ("scatter_.src", (x(4), 0, torch.tensor([2, 0]), x(2))),
    ("scatter_add", (x(3, 4), 1, ints(2, 3, below=4), x(2, 3))), *(("scatter_reduce.two", (x(3), 0, torch.tensor([0, 1, 1, 0]), x(4), kind), {"include_self": own}) for kind in ("sum", "mean", "amax", "amin") for own in (True, False)),
    ("index_put", (x(4, 3), [torch.tensor([0, 2])], x(2, 3))), ("index_put", (x(4, 3), [torch.tensor([0, 0])], x(3), True)), ("index_put", (x(4, 3), [None, torch.tensor([2])], x())), ("index_put_", (x(4, 3), [mask(4, 3)], x())),
    ("_index_put_impl", (x(4), [torch.tensor([0, 2])], x(2))), ("_unsafe_index_put", (x(4), [torch.tensor([0, 2])], x(2))),
    ("index_add", (x(4, 3), 0, torch.tensor([1, 1, 0]), x(3, 3)), {"alpha": 0.5}), ("index_copy", (x(4, 3), 1, torch.tensor([2, 0]), x(4, 2))), ("index_fill.int_Scalar", (x(4, 3), 0, torch.tensor([1, 1]), 7.0)), ("index_fill.int_Tensor", (x(4, 3), 0, torch.tensor([1, 2]), x())),
    ("masked_scatter", (x(4, 3), mask(4, 3), x(13))), ("tril", (x(3, 4), 1)), ("triu", (x(3, 4), -1)), ("roll", (x(3, 4), [1, -2], [0, 1])), ("roll", (x(3, 4), [5])), ("flip", (x(3, 4), [0, -1])), ("rot90", (x(3, 4), 3)), ("repeat", (x(2, 3), [2, 1, 2])), ("unfold", (x(2, 9), 1, 3, 2)),
    ("pixel_shuffle", (x(1, 4, 2, 3), 2)), ("pixel_unshuffle", (x(1, 1, 4, 2), 2)), ("channel_shuffle", (x(1, 4, 2), 2)),
    *((f"{kind}_pad{n}d", (x(1, 2, *[4] * n), [1, 2] * n)) for kind in ("reflection", "replication") for n in (1, 2, 3)), ("reflection_pad1d", (x(2, 4), [1, 2])),
    ("constant_pad_nd", (x(2, 4), [1, -1, 0, 2], 3.0)), ("im2col", (x(1, 2, 5, 4), [2, 2], [1, 1], [1, 0], [2, 1])), ("col2im", (x(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    ("copy_", (x(2, 3), x(3))), ("fill.Scalar", (x(3), 2.0)), ("fill_.Tensor", (x(3), x())), ("zero", (x(3),)), ("zero_", (x(3),)),
    *((f"{op}", (x(4),)) for op in ["normal_", "uniform_", "bernoulli_.float", "exponential_", "log_normal_", "cauchy_", "random_"]), ("geometric_", (x(4), 0.4)),
    # networks
    ("_softmax", (x(2, 3), -1, False)), ("_softmax", (x(2, 3, 2), 1, False)), ("softmax.int", (x(3), 0)), ("_safe_softmax", (x(2, 3), 1)), ("_log_softmax", (x(2, 3), 1, False)), ("log_softmax.int", (x(2, 3), 0)),
    ("native_layer_norm", (x(2, 3, 4), [4], x(4), x(4), 1e-5)), ("native_layer_norm", (x(2, 3, 4), [3, 4], None, None, 1e-5)), ("native_layer_norm", (x(2, 4), [4], x(4), None, 0.1)),
    ("_fused_rms_norm", (x(2, 3, 4), [4], x(4), 1e-5)), ("_fused_rms_norm", (x(2, 4), [4], None, None)), ("rms_norm", (x(2, 4), [4], x(4), 1e-3)),
    ("native_group_norm", (x(2, 4, 3), x(4), x(4), 2, 4, 3, 2, 1e-5)), ("native_group_norm", (x(2, 4, 3), None, None, 2, 4, 3, 2, 1e-5)),
    *((f"{op}", (x(4, 3, 2), x(3), x(3), *BATCH_NORM, train, 0.1, 1e-5)) for op in ("native_batch_norm", "_native_batch_norm_legit") for train in (True, False)), ("_native_batch_norm_legit.no_stats", (x(4, 3), x(3), None, True, 0.1, 1e-5)),
    ("_native_batch_norm_legit_functional", (x(4, 3), x(3), x(3), *BATCH_NORM, True, 0.1, 1e-5)), ("_native_batch_norm_legit_no_training", (x(4, 3), x(3), x(3), *BATCH_NORM, 0.1, 1e-5)),
    ("_batch_norm_with_update", (x(4, 3), x(3), x(3), *BATCH_NORM, 0.1, 1e-5)), ("_batch_norm_no_update", (x(4, 3), x(3), x(3), *BATCH_NORM, 0.1, 1e-5)),
    ("cudnn_batch_norm", (x(4, 3), x(3), x(3), *BATCH_NORM, True, 0.1, 1e-5), {}, batch_norm), ("miopen_batch_norm", (x(4, 3), x(3), x(3), *BATCH_NORM, True, 0.1, 1e-5), {}, batch_norm),
    ("embedding", (x(5, 3), ints(2, 4, below=5))),
    *(("_embedding_bag", (x(5, 3), ints(6, below=5), torch.tensor([0, 2, 2]), False, mode)) for mode in (0, 1, 2)), ("_embedding_bag", (x(5, 3), ints(6, below=5), torch.tensor([0, 0, 4]), False, 0, False, x(6))),
    ("_embedding_bag", (x(5, 3), ints(6, below=5), torch.tensor([0, 4, 6]), False, 1, False, None, True)),
    *(("nll_loss_forward", (x(4, 3), torch.tensor([0, 2, -100, 0]), w, reduction, -100)) for w in (None, fixed(pos(3))) for reduction in (0, 1, 2)), ("nll_loss_forward", (x(3), torch.tensor(1), None, 1, -100)),
    ("nll_loss2d_forward", (x(2, 3, 2, 2), ints(2, 2, 2, below=3), fixed(pos(3)), 1, 0)), ("nll_loss2d_forward", (x(2, 3, 2, 2), ints(2, 2, 2, below=3), None, 0, 0)), ("nll_loss", (x(4, 3), ints(4, below=3))), ("nll_loss2d", (x(2, 3, 2, 2), ints(2, 2, 2, below=3))),
    *((op, (x(4, 3), x(4, 3), reduction)) for op in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss") for reduction in (0, 1, 2)),
    ("mse_loss", (x(4, 3), fixed(x(4, 3)))), ("smooth_l1_loss", (x(4), x(4), 1, 0.0)), ("huber_loss", (x(9), x(9), 1, 0.5)),
    *(("binary_cross_entropy", (unit(4, 3), unit(4, 3), w, r)) for w in (None, fixed(pos(3))) for r in (0, 1, 2)), *(("binary_cross_entropy_with_logits", (x(4, 3), unit(4, 3), w, q, r)) for w, q, r in ((None, None, 1), (fixed(pos(3)), fixed(pos(3)), 0), (None, fixed(pos(3)), 2))),
    ("soft_margin_loss", (x(4, 3), fixed(x(4, 3).sign()))), ("multi_margin_loss", (x(4, 3), ints(4, below=3))), ("multi_margin_loss", (x(4, 3), ints(4, below=3), 2, 1.5, fixed(pos(3)))),
    ("max_pool2d_with_indices", (x(2, 3, 6, 5), [3, 2], [2, 1], [1, 1])), ("max_pool2d_with_indices", (x(3, 6, 5), [2, 2])), ("max_pool3d_with_indices", (x(1, 2, 4, 4, 4), [2, 2, 2])), ("adaptive_max_pool2d", (x(1, 2, 7, 5), [3, 2])), ("adaptive_max_pool3d", (x(1, 2, 4, 5, 4), [3, 2, 2])),
    ("avg_pool2d", (x(2, 3, 6, 5), [3, 2], [2, 1], [1, 1])), ("avg_pool2d", (x(2, 3, 6, 5), [3], [2], [1], True, False)), ("avg_pool2d", (x(3, 6, 5), [2, 2], [], [0, 0], False, True, 7)), ("avg_pool2d", (x(1, 1, 7, 7), [3, 3], [2, 2], [1, 1], True)), ("avg_pool3d", (x(1, 2, 4, 4, 5), [2, 2, 2])),
    ("_adaptive_avg_pool2d", (x(1, 2, 7, 5), [3, 2])), ("_adaptive_avg_pool3d", (x(1, 2, 4, 5, 4), [3, 2, 1])),
    *((f"{kind}{n}d", (x(1, 2, *range(3, 3 + n)), [7, 5, 6][:n])) for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)), ("upsample_nearest2d", (x(1, 2, 3, 4), [6, 8], 2.0, 2.0)),
    *((f"upsample_{kind}", (x(1, 2, *range(3, 3 + n)), [7, 2, 6][:n], corners)) for n, kind in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")) for corners in (True, False)),
    *(("mkldnn_rnn_layer", (x(4, 2, 3), x(20, 3), x(20, 5), x(20), x(20), x(1, 2, 5), x(1, 2, 5), reverse, [], 2, 5, 1, True, False, False, True), {}, lstm) for reverse in (False, True)),
    *(("_thnn_fused_lstm_cell", (x(2, 12), x(2, 12), x(2, 3), *bias), {}, lstm_cell) for bias in ((), (x(12), x(12)))), *(("_thnn_fused_gru_cell", (x(2, 9), x(2, 9), x(2, 3), *bias), {}, gru_cell) for bias in ((), (x(9), x(9)))),
    # attention
    *(("_scaled_dot_product_flash_attention_for_cpu", (*qkv, 0.0, causal), {"scale": scale}) for qkv, causal, scale in ((SDPA, True, None), (SAME, False, 0.3), (SAME, True, None))),
    ("_scaled_dot_product_flash_attention_for_cpu", (*SAME, 0.0, False), {"attn_mask": fixed(torch.zeros(4, 5).double().masked_fill(torch.ones(4, 5).triu(2).bool(), -math.inf))}),
    ("_scaled_dot_product_attention_math", (*SAME, x(4, 5))), ("scaled_dot_product_attention", (*SAME, mask(4, 5) | torch.eye(4, 5).bool())), ("_scaled_dot_product_attention_math", (*SDPA,), {"enable_gqa": True, "is_causal": True}),
    ("scaled_dot_product_attention", (*SAME,)), ("_scaled_dot_product_fused_attention_overrideable", (*SAME, x(4, 5)), {}, lambda q, k, v, b: sdpa(q, k, v, attn_bias=b)), ("_scaled_dot_product_flash_attention", (*SAME, 0.0, True), {}, lambda q, k, v, p, causal: sdpa(q, k, v, is_causal=causal)),
    ("_scaled_dot_product_efficient_attention", (*SAME, x(2, 2, 4, 5), True), {}, lambda q, k, v, b, c: sdpa(q, k, v, attn_bias=b)), ("_scaled_dot_product_cudnn_attention", (*SAME, None, True), {}, lambda q, k, v, b, c: sdpa(q, k, v)),
    # complex numbers
    *((op, (z(2, 3),)) for op in ("_conj", "conj", "_conj_physical", "conj_physical", "resolve_conj", "resolve_neg", "_neg_view", "real", "imag", "view_as_real", "angle", "sgn")),
    ("angle", (away(3),)), ("sgn", (away(3),)), ("view_as_complex", (x(3, 2),)), ("complex", (x(2, 3), x(3))), ("polar", (pos(2, 3), x(2, 3))),
    *((op, (z(2, 3), number)) for op in ("add.Tensor", "sub.Scalar", "mul.Tensor", "div.Scalar", "rsub.Scalar", "pow.Tensor_Scalar") for number in (0.7 - 1.3j,)), *((op, (x(2, 3), 0.7 - 1.3j)) for op in ("mul.Scalar", "div.Tensor")),
    ("add.Tensor", (z(3), x(2, 3)), {"alpha": 0.5j}), ("pow.Tensor_Scalar", (pos(3), 0.7 - 1.3j)), ("pow.Scalar", (0.7 - 1.3j, x(3))), ("_to_copy", (x(3),), {"dtype": torch.complex128}), ("_to_copy", (z(3),), {"dtype": torch.float64}),
    ("copy_", (z(2, 3), x(3))), ("acosh", (-2 - z(3) ** 2,)),
    *(("_fft_c2c", (z(2, 5, 3), dim, norm, forward)) for dim, norm, forward in (([1], 0, True), ([2, 1], 1, False), ([0, 1, 2], 2, True))),
    *(("_fft_r2c", (x(2, n, 3), dim, norm, half)) for n in (4, 5) for dim, norm, half in (([1], 0, True), ([0, 1], 1, True), ([1], 2, False))),
    *(("_fft_c2r", (z(2, 3, 3), dim, norm, n)) for n in (4, 5) for dim, norm in (([1], 0), ([0, 1], 1), ([2, 1], 2))), ("_fft_c2r", (z(2, 1), [1], 0, 1)),
]  # fmt: skip

# At a kink, or where torch departs from the mathematics by agreement: compared with autograd only.
AGREED = [
    ("amax", (torch.ones(2, 3).double(), [1])), ("max", (torch.ones(3).double(),)), ("amin", (torch.zeros(3).double(),)), ("aminmax", (torch.ones(2, 3).double(),), {"dim": 0}),
    *((op, (torch.tensor([1.0, 2, 3]).double(), torch.tensor([3.0, 2, 1]).double())) for op in ("maximum", "minimum")),
    *((op, (torch.zeros(3).double(),)) for op in ["abs", "sgn", "angle", "relu", "leaky_relu", "elu", "gelu", "hardswish", "softshrink", "hardshrink", "sign"]), ("_prelu_kernel", (torch.zeros(3).double(), x(3))),
    *((op, (torch.tensor([-3.0, -1, -0.5, 0, 0.5, 1, 3]).double(),)) for op in ("hardtanh", "hardsigmoid", "hardswish", "softshrink", "hardshrink")), ("elu", (torch.zeros(1).double(), 1.5, 1.1, 0.9)), ("celu", (torch.zeros(1).double(), 2.0)),
    *(("clamp", (torch.tensor([-1.0, 0, 1]).double(), -1, 1)), ("clamp_min", (torch.zeros(1).double(), 0)), ("clamp_max", (torch.zeros(1).double(), 0)), ("clamp_min.Tensor", (torch.zeros(1).double(), torch.zeros(1).double()))),
    *((op, (torch.zeros(2, 3).double(), torch.zeros(2, 3).double())) for op in ("l1_loss", "smooth_l1_loss", "huber_loss")), ("linalg_vector_norm", (torch.zeros(3).double(),)), ("linalg_vector_norm", (torch.ones(3).double(), math.inf)),
    ("pow.Tensor_Tensor", (torch.zeros(3).double(), torch.tensor([0.0, 1, 2]).double())), ("xlogy.Tensor", (fixed(torch.zeros(2).double()), torch.tensor([0.5, 1]).double())), ("std", (torch.ones(3).double(), True)),
    ("binary_cross_entropy", (torch.tensor([0.0, 1, 0, 1]).double(), torch.tensor([0.0, 1, 1, 0]).double())), ("embedding", (x(5, 3), ints(2, 4, below=5), 1, True)), *((op, (z(3) * 0,)) for op in ("abs", "sgn", "angle", "linalg_vector_norm")),
    *(("_embedding_bag", (x(5, 3), torch.tensor([1, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 3]), False, mode, False, s, False, 1)) for mode, s in ((0, x(6)), (0, None), (1, None), (2, None))), ("_cdist_forward", (torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), 2.0, None)),
]  # fmt: skip
# Of these only the first output is for use; torch has a derivative of the others too.
FIRST = ("native_group_norm", "_fused_rms_norm", "_scaled_dot_product_attention_math")

# Those of which torch has a derivative of complex numbers.
COMPLEX = {
    "_convolution", "_fused_rms_norm", "_linalg_det", "_linalg_slogdet", "_linalg_solve_ex", "_reshape_alias", "_to_copy", "_unsafe_index", "_unsafe_index_put", "_unsafe_view", "abs", "acos", "acosh", "add", "add_",
    "addbmm", "addcdiv", "addcmul", "addmm", "addmm_", "addmv", "addr", "alias", "angle", "asin", "asinh", "atan", "atanh", "baddbmm", "bmm", "cat", "channel_shuffle", "chunk", "clone", "col2im", "constant_pad_nd",
    "contiguous", "convolution", "copy_", "cos", "cosh", "cumprod", "cumsum", "diag_embed", "diagonal", "diagonal_copy", "div", "div_", "dot", "exp", "exp2", "expand", "expm1", "fill", "fill_", "flatten", "flip", "gather", "im2col",
    "index", "index_add", "index_copy", "index_fill", "index_put", "index_put_", "index_select", "l1_loss", "lerp", "linalg_cholesky_ex", "linalg_cross", "linalg_inv_ex", "linalg_vector_norm", "linear", "log", "log10", "log1p",
    "log2", "logaddexp", "logcumsumexp", "logsumexp", "masked_fill", "masked_fill_", "masked_scatter", "masked_select", "matmul", "mean", "mm", "mul", "mul_", "mv", "narrow", "neg", "norm", "normal_", "numpy_T", "permute",
    "pixel_shuffle", "pixel_unshuffle", "positive", "pow", "prod", "reciprocal", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d", "reshape",
    "rms_norm", "roll", "rot90", "rsqrt", "rsub", "scatter", "scatter_", "scatter_add", "select", "sgn", "sigmoid", "sin", "sinh", "slice", "split", "split_with_sizes", "sqrt", "square", "squeeze",
    "stack", "std", "std_mean", "sub", "sub_", "sum", "t", "tan", "tanh", "to", "trace", "transpose", "tril", "triu", "unbind", "unflatten", "unfold", "uniform_", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "var",
    "var_mean", "vdot", "view", "where", "zero_",
}  # fmt: skip

# torch's constant (1/6, 1e-12) is rounded to float32 in its float64 derivative.
ROUNDED = ("hardsigmoid", "binary_cross_entropy")


def overload(name):
    packet, _, rest = name.partition(".")
    return getattr(getattr(aten, packet), rest or "default")


def flat(out):
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


class Case:
    """An operation with arguments; `variables` are those that it is differentiated by."""

    def __init__(self, name, args, kwargs=None, instead=None):
        self.name, self.func, self.instead = name, overload(name), instead
        template = (tuple(args), kwargs or {})
        kept = {id(a.tensor) for a in tree_leaves(template) if isinstance(a, fixed)}
        self.args, self.kwargs = tree_map(lambda a: a.tensor if isinstance(a, fixed) else a, template)
        self.tensors = signature(self.func).tensors(self.args, self.kwargs)
        self.variables = {
            n: t for n, t in self.tensors if (t.is_floating_point() or t.is_complex()) and id(t) not in kept
        }

    def run(self, values=None):
        """The outputs, for other values of the variables; nothing that is given is changed."""
        new = {id(self.variables[n]): v for n, v in (values or {}).items()}

        def own(a):
            return new.get(id(a), a).clone(memory_format=torch.preserve_format) if isinstance(a, torch.Tensor) else a

        args, kwargs = tree_map(own, (self.args, self.kwargs))
        torch.manual_seed(0)
        return tuple(flat((self.instead or self.func)(*args, **kwargs)))

    def call(self):
        outputs = tuple(t.detach() for t in self.run())
        return Call(dict(self.tensors), signature(self.func).attributes(self.args, self.kwargs), outputs)


def close(a, b, bound):
    return (a - b).norm() <= bound * max(1.0, a.norm(), b.norm())


def listed(rows):
    return [pytest.param(row, id=f"{i}-{row[0]}") for i, row in enumerate(rows)]


@contextmanager
def derivative_of(name):
    """Skips the test where torch, at the call or in backward, has no derivative for it."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" in str(error):
            pytest.skip(f"this torch has no derivative for {name}")
        raise


def against_autograd(case):
    """The row's gradients, and those of the outputs that they were made for."""
    GENERATOR.manual_seed(1)
    call, rule = case.call(), find(str(case.func))
    leaves = {n: t.clone().requires_grad_() for n, t in case.variables.items()}
    with derivative_of(case.name):
        outputs = case.run(leaves)
    wanted = outputs[:1] if case.name in FIRST else outputs
    g = tuple(like(t) if t.requires_grad and i < len(wanted) else None for i, t in enumerate(outputs))
    found = rule.vjp(call, g)
    assert set(found) >= set(leaves) and all(
        t.is_floating_point() or t.is_complex() for t in (call.inputs[n] for n in found)
    )
    with derivative_of(case.name):
        expected = torch.autograd.grad(
            [t for t in wanted if t.requires_grad],
            list(leaves.values()),
            [h for h in g if h is not None],
            allow_unused=True,
        )
    for (name, t), e in zip(leaves.items(), expected, strict=True):
        assert rule.derivatives[name.split("[")[0]]
        assert found[name].shape == t.shape and found[name].dtype == t.dtype
        assert close(found[name], torch.zeros_like(t) if e is None else e, 1e-7 if case.name in ROUNDED else 1e-10), (
            name
        )
    return found, g


@pytest.mark.parametrize("case", listed(CASES))
def test_a_row_equals_autograd_and_the_difference_quotient(case):
    slope, told = slopes(Case(*case))
    assert abs(slope - told) <= 1e-7 * max(1.0, abs(slope), abs(told))


def slopes(case):
    """Along a random direction, by difference quotient and by the row; what the row gives equals autograd's."""
    found, g = against_autograd(case)
    direction, h = {n: like(t) for n, t in case.variables.items()}, 1e-4

    def loss(step):
        outputs = case.run({n: t + step * direction[n] for n, t in case.variables.items()})
        return sum(
            float((h.conj() * o).real.nan_to_num(0, 0, 0).sum())
            for h, o in zip(g, outputs, strict=True)
            if h is not None
        )

    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    return slope, sum(float((found[n].conj() * v).real.sum()) for n, v in direction.items())


def with_complex(name, args, kwargs=None, instead=None):
    """The case with each choice of its variables complex that torch can differentiate."""
    leaves, spec = tree_flatten((tuple(args), kwargs or {}))
    real = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for chosen in itertools.chain.from_iterable(itertools.combinations(real, n + 1) for n in range(len(real))):
        made = [torch.complex(a, like(a)) if i in chosen else a for i, a in enumerate(leaves)]
        case = Case(name, *tree_unflatten(made, spec), instead)
        try:
            outputs = case.run({n: t.clone().requires_grad_() for n, t in case.variables.items()})
            sum(t.abs().sum() for t in outputs if t.requires_grad).backward()
        except RuntimeError:
            continue
        yield case


@pytest.mark.parametrize("case", listed(c for c in CASES if c[0].split(".")[0] in COMPLEX))
def test_a_row_holds_for_complex_numbers(case):
    GENERATOR.manual_seed(2)
    made = list(with_complex(*case))
    for complex_case in made:
        slope, told = slopes(complex_case)
        assert abs(slope - told) <= 1e-7 * max(1.0, abs(slope), abs(told))
    if not made:
        pytest.skip("this torch has no derivative of these arguments as complex numbers")


@pytest.mark.parametrize("case", listed(AGREED))
def test_at_a_kink_a_row_chooses_as_torch_does(case):
    found, _ = against_autograd(Case(*case))  # equal to autograd's, element by element
    assert found and all(gradient.isfinite().all() for gradient in found.values())


def test_every_row_has_a_case():
    asked = {find_key(str(overload(c[0]))) for c in CASES}
    assert set(RULES) - asked == set()


def test_a_row_is_readable():
    for op, rule in RULES.items():
        assert op in rule.ops and rule.forward and rule.derivatives, op
        for text in (rule.forward, *rule.derivatives.values()):
            assert not {"*", "-"} & set(text), f"{op}: {text}"
        names = {n for c in CASES for n in signature(overload(c[0])).names if find_key(str(overload(c[0]))) in rule.ops}
        assert set(rule.derivatives) <= names, op
        assert {n for n in rule.symbols if not n.isdigit()} <= names, op


def scalar_call(name, *args, **kwargs):
    case = Case(name, tree_map(lambda v: torch.tensor(v).double() if isinstance(v, float) else v, args), kwargs)
    return find(str(case.func)), case.call()


def test_numbers_stand_in_the_formula():
    sigmoid = scalar_call("sigmoid", math.log(0.9183 / 0.0817))
    assert substituted(*sigmoid, "self") == "0.9183 · (1 − 0.9183)"
    assert substituted(*sigmoid, "self", 2.0) == "2 · 0.9183 · (1 − 0.9183)"
    assert local_derivative(*sigmoid, "self").item() == pytest.approx(0.9183 * 0.0817)
    product = scalar_call("mul.Tensor", 2.0, -0.3)
    assert substituted(*product, "self", -1.5) == "−1.5 · (−0.3)" and substituted(*product, "other") == "2"
    assert substituted(*scalar_call("pow.Tensor_Scalar", -0.3, 2), "self") == "2 · (−0.3)^(2 − 1)"
    assert substituted(*scalar_call("relu", -0.3), "self", 4.0) == "4 if −0.3 > 0, else 0"
    assert substituted(*scalar_call("sin", 0.5), "self") == "cos(0.5)"
    assert substituted(*scalar_call("log", -0.3), "self", 1.0) == "1 / (−0.3)"
    assert substituted(*scalar_call("neg", 0.3), "self") == "−1"


def test_factors_of_one_are_not_written():
    plain, scaled = scalar_call("add.Tensor", 1.0, 2.0), scalar_call("add.Tensor", 1.0, 2.0, alpha=3)
    assert formula(*plain) == "y = a + b" and formula(*plain, "other") == "g"
    assert formula(find("aten.addmm.default"), Case("addmm", (x(4), x(2, 3), x(3, 4))).call()) == "Y = C + A B"
    assert formula(*scaled) == "y = a + α · b" and substituted(*scaled, "other", 0.5) == "3 · 0.5"


def test_a_formula_reads_as_it_holds_for_the_call():
    half = fixed(torch.tensor(0.5).double())
    for reduction, text in ((0, "y = (−t · ln(x) − (1 − t) · ln(1 − x))"), (1, "y = mean of "), (2, "y = Σ ")):
        case = Case("binary_cross_entropy", (unit(3), unit(3), None, reduction))
        assert formula(find(str(case.func)), case.call()).startswith(text)
    case = Case("binary_cross_entropy", (torch.tensor([0.8]).double(), torch.tensor([1.0]).double()))
    assert substituted(find(str(case.func)), case.call(), "self", 1.0) == "1 · (0.8 − 1) / (0.8 · (1 − 0.8))"
    row = find("aten.binary_cross_entropy_with_logits.default")
    for weights, text in (
        ((None, None), "g · (σ(x) − t) / n"),
        ((half, None), "g · w · (σ(x) − t) / n"),
        ((None, half), "g · ((1 − t) · σ(x) − q · t · (1 − σ(x))) / n"),
    ):
        assert formula(row, Case("binary_cross_entropy_with_logits", (x(3), unit(3), *weights)).call(), "self") == text
    row = find("aten.native_layer_norm.default")
    assert (
        formula(row, Case("native_layer_norm", (x(2, 4), [4], None, None, 1e-5)).call()) == "y = x̂, x̂ = (x − ⟨x⟩) · r"
    )
    assert formula(row, Case("native_layer_norm", (x(2, 4), [4], x(4), x(4), 1e-5)).call()) == row.forward


def test_what_is_no_scalar_has_no_numbers():
    for name, args in (
        ("mul.Tensor", (x(3), x(3))),
        ("sum", (x(3),)),
        ("mm", (x(2, 2), x(2, 2))),
        ("_softmax", (x(3), 0, False)),
    ):
        case = Case(name, args)
        assert substituted(find(str(case.func)), case.call(), "self") is None
    case = Case("mul.Tensor", (x(2, 3), x(3)))
    rule, call = find("aten.mul.Tensor"), case.call()
    assert torch.equal(local_derivative(rule, call, "self"), call.inputs["other"].expand(2, 3))
    assert local_derivative(rule, call, "other") is None
    case = Case("_softmax", (x(3), 0, False))
    assert local_derivative(find(str(case.func)), case.call(), "self") is None


def test_no_gradient_in_no_gradient_out():
    case = Case("split.Tensor", (x(5), 2))
    rule, call = find("aten.split.Tensor"), case.call()
    assert rule.vjp(call, (None, None, None)) == {}
    assert rule.vjp(call, (None, torch.ones(2).double(), None))["self"].tolist() == [0, 0, 1, 1, 0]


def test_a_gradient_of_what_a_row_does_not_treat_is_not_called_zero():
    for name, args, g, *instead in (
        ("native_layer_norm", (x(2, 4), [4], None, None, 1e-5), (None, x(2, 1), None)),
        ("native_layer_norm", (x(2, 4), [4], None, None, 1e-5), (x(2, 4), None, x(2, 1))),
        ("native_group_norm", (x(2, 4, 3), None, None, 2, 4, 3, 2, 1e-5), (None, None, x(2, 2))),
        ("native_batch_norm", (x(4, 3), x(3), x(3), *BATCH_NORM, True, 0.1, 1e-5), (None, x(3), None)),
        ("_linalg_slogdet", (x(3, 3),), (None, x(), x(3, 3), None)),
        ("scatter_reduce.two", (x(3), 0, torch.tensor([0, 1, 1, 0]), x(4), "prod"), (x(3),)),
        ("_embedding_bag", (x(5, 3), ints(4, below=5), torch.tensor([0, 2]), True), (x(2, 3), None, None, None)),
        (
            "mkldnn_rnn_layer",
            (
                x(4, 2, 3),
                x(20, 3),
                x(20, 5),
                x(20),
                x(20),
                x(1, 2, 5),
                x(1, 2, 5),
                False,
                [],
                1,
                5,
                1,
                True,
                False,
                False,
                True,
            ),
            (x(4, 2, 5), None, None, None),
            lstm,
        ),
        ("_thnn_fused_lstm_cell", (x(2, 12), x(2, 12), x(2, 3)), (None, x(2, 3), x(2, 12)), lstm_cell),
        ("scaled_dot_product_attention", (*SAME, None, 0.3), (x(2, 2, 4, 3),)),
    ):
        case = Case(name, args, {}, *instead)
        row = find(str(case.func))
        with pytest.raises(KeyError, match="no closed form"):
            row.vjp(case.call(), g)
        assert row.vjp(case.call(), (None,) * len(g)) == {}


def test_a_gradient_has_the_place_and_type_of_its_input():
    row, g = find("aten.add.Tensor"), z(3)
    call = Call({"self": torch.zeros((), device="meta"), "other": torch.zeros(3)}, {}, (z(3),))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = row.vjp(call, (g,))
    finally:
        torch.set_warn_always(always)
    assert found["self"].device.type == "meta" and found["self"].shape == ()
    assert torch.equal(found["other"], g.real.float())


def test_formulas_of_complex_numbers_say_what_is_conjugated():
    row, case = find("aten.mul.Tensor"), Case("mul.Tensor", (z(2), x(2)))
    assert (
        formula(row, case.call()) == "y = a · b" and formula(row, case.call(), "self") == "g · b, all but g conjugated"
    )
    assert local_derivative(row, case.call(), "self") is None and substituted(row, case.call(), "other") is None
    for name in ("sum", "abs"):
        case = Case(name, (z(2),))
        assert "conjugated" not in formula(find(str(case.func)), case.call(), "self")


def test_what_is_unknown_has_no_row():
    assert find("aten._ctc_loss.default") is None and find("mylib.mul.Tensor") is None and find("Square") is None


# Operations whose outputs are not differentiable, whatever their inputs.
CONSTANT = {"detach", "zeros_like", "ones_like", "empty_like", "new_empty", "new_zeros", "gt", "lt", "ge", "le", "eq", "ne", "isnan", "argmax", "_local_scalar_dense", "rand_like", "randn_like"}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Names of the operations that autograd differentiates."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = flat((args, kwargs or {}))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self.names.add(str(func))
        return func(*args, **kwargs or {})


def rowless(run):
    with Dispatched() as mode:
        run()
    assert mode.names
    return {n for n in mode.names if find(n) is None and n.split(".")[1] not in CONSTANT}


IDS = torch.randint(0, 50, (2, 8), generator=GENERATOR)


@pytest.mark.parametrize("family", ["gpt2", "default"])
@pytest.mark.parametrize("docs", [False, True])
def test_kiem_trains_on_operations_with_rows(family, docs):
    from kiem.config.model import ModelConfig
    from kiem.model.transformer import Transformer

    small = {"vocab_size": 50, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2}
    llama = {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "qk_norm": True,
        "n_kv_heads": 1,
        "bias": False,
    }
    config = ModelConfig(**small, drop_rate=0.1, qkv_bias=True) if family == "gpt2" else ModelConfig(**small, **llama)
    model = Transformer(config).initialize(0).train()
    docs_BT = torch.tensor([[0] * 4 + [1] * 4, [2] * 8]) if docs else None

    def run():
        logits = model(IDS, docs_BT=docs_BT).view(-1, model.config.vocab_size)
        torch.nn.functional.cross_entropy(logits, IDS.view(-1), reduction="sum")

    assert rowless(run) == set()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_transformers_trains_on_operations_with_rows(family, attention):
    import transformers

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 16,
    }
    if family.startswith("GPT2"):
        sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    cls = getattr(transformers, family)
    model = cls(cls.config_class(vocab_size=50, attn_implementation=attention, **sizes)).train()
    padded = torch.tensor([[0] + [1] * 7, [1] * 8])
    assert rowless(lambda: (model(IDS, labels=IDS), model(IDS, labels=IDS, attention_mask=padded))) == set()


LAYERS = {
    "RMSNorm": lambda v: nn.RMSNorm(8)(v), "LayerNorm": lambda v: nn.LayerNorm(8)(v), "GroupNorm": lambda v: nn.GroupNorm(2, 4)(v), "BatchNorm": lambda v: nn.BatchNorm1d(4)(v),
    "InstanceNorm": lambda v: nn.InstanceNorm1d(4)(v), "MultiheadAttention": lambda v: nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)(v, v, v),
    "TransformerEncoderLayer": lambda v: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)(v), "LSTM": lambda v: nn.LSTM(8, 5, 2)(v), "GRU": lambda v: nn.GRU(8, 5, bidirectional=True)(v), "RNN": lambda v: nn.RNN(8, 5)(v),
    "LSTMCell": lambda v: nn.LSTMCell(8, 5)(v[0]), "GRUCell": lambda v: nn.GRUCell(8, 5)(v[0]), "Conv1d": lambda v: nn.Conv1d(4, 6, 3, padding="same")(v), "Conv2d": lambda v: nn.Conv2d(2, 4, 3, stride=2, padding_mode="circular", padding=1)(v[None]),
    "ConvTranspose2d": lambda v: nn.ConvTranspose2d(2, 4, 3)(v[None]), "pools": lambda v: (F.max_pool1d(v, 2), F.max_pool2d(v, 2), F.avg_pool1d(v, 2), F.avg_pool2d(v, 2), F.adaptive_avg_pool1d(v, 3), F.adaptive_avg_pool2d(v, 3), F.adaptive_max_pool1d(v, 3)),
    "resize": lambda v: (F.interpolate(v[None], scale_factor=2), F.interpolate(v[None], size=(5, 5), mode="bilinear"), F.pixel_shuffle(v.view(1, 4, 4, 4), 2), F.pad(v, (1, 1), "reflect"), F.unfold(v[None], 2)),
    "activations": lambda v: [getattr(F, a)(v) for a in ["relu", "relu6", "gelu", "silu", "mish", "softplus", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "tanh", "sigmoid", "logsigmoid", "softsign", "tanhshrink", "softshrink", "hardshrink", "glu"]] + [nn.PReLU()(v)],
    "dropout": lambda v: (F.dropout(v), F.alpha_dropout(v), F.dropout1d(v)), "softmax": lambda v: (F.softmax(v, 0), F.softmin(v, 0), F.log_softmax(v, 0), F.gumbel_softmax(v), F.normalize(v), F.cosine_similarity(v, v)),
    "losses": lambda v: [f(v, torch.rand_like(v)) for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.hinge_embedding_loss)] + [F.binary_cross_entropy(v.sigmoid(), torch.rand_like(v)), F.triplet_margin_loss(v, v + 1, v * 2)],
    "cross_entropy": lambda v: (F.cross_entropy(v, torch.zeros(2, 8).long(), label_smoothing=0.1), F.cross_entropy(v[0], torch.softmax(torch.rand(4, 8), 1)), F.cross_entropy(v[0], torch.zeros(4).long(), weight=torch.ones(8))),
    "einsum": lambda v: (torch.einsum("bij,bkj->bik", v, v), torch.einsum("i,j->ij", v[0, 0], v[0, 1]), v @ v.mT, v[0] @ v[0, 0], v[0, 0] @ v[0, 1]),
    "indexing": lambda v: (v[0], v[:, None, 1:], v[torch.tensor([1])], v[v > 0], v[..., ::2], v.gather(1, torch.zeros(2, 1, 8).long()), v.masked_fill(v > 0, 0.0), torch.where(v > 0, v, 0.0)),
    "in place": lambda v: ((w := v * 1).add_(1).mul_(v).relu_(), w.__setitem__(0, v[1]), w.__setitem__((slice(None), 1), 0.0), w.__setitem__(w > 0, 1.0), w.clamp_(min=0), w.zero_()),
    "statistics": lambda v: (v.std(), v.var(0), v.norm(), v.norm(dim=1), v.max(), v.max(0), v.sort(), v.topk(2), v.median(), v.cumsum(0), v.logsumexp(0), v.prod(0)),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_what_programs_use_has_rows(layer):
    assert rowless(lambda: LAYERS[layer](torch.randn(2, 4, 8, requires_grad=True))) == set()
