"""The formula of a row says what the row computes: each is read as it stands, and computed."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from kiem.inspect.rules import RULES, find, formula
from kiem.inspect.rules.attention import repeated
from kiem.inspect.rules.reduce import axes, correction, count, spread

TABLE = runpy.run_path(str(Path(__file__).with_name("test_rules.py")))
NOTATION = runpy.run_path(str(Path(__file__).with_name("formulas.py")))
Formula, words = NOTATION["Formula"], NOTATION["words"]

# In words, because the derivative is none of arithmetic (the first name of each row).
WORDS = {
    "elements are moved: their gradient moves back": {
        "view", "expand", "transpose", "permute", "select", "slice", "narrow", "diagonal", "diag_embed", "split",
        "unbind", "cat", "stack", "tril", "triu", "roll", "flip", "rot90", "repeat", "unfold", "pixel_shuffle",
        "pixel_unshuffle", "channel_shuffle", *(f"{kind}_pad1d" for kind in ("reflection", "replication")),
        "constant_pad_nd", "im2col", "col2im", "index", "index_select", "gather", "masked_select", "scatter.src",
        "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "index_fill", "masked_scatter",
        "embedding", "_embedding_bag", "trace", "sort", "max.dim", "amax", "aminmax", "max_pool2d_with_indices",
        "nll_loss_forward", "view_as_real", "view_as_complex",
    },
    "a sum over windows or neighbors": {
        "convolution", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest1d", "_upsample_nearest_exact1d",
        "upsample_linear1d", "_trilinear",
    },
    "a sum over running indices": {
        "prod", "cumsum", "cumprod", "logcumsumexp", "_cdist_forward", "_euclidean_dist", "multi_margin_loss",
    },
    "an algorithm": {
        "mkldnn_rnn_layer", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "linalg_cholesky_ex", "glu",
        "_fft_c2c", "_fft_r2c", "_fft_c2r", "linalg_cross", "_linalg_slogdet",
    },
}  # fmt: skip
IN_WORDS = set().union(*WORDS.values())
READ = {rule.ops[0] for rule in RULES.values()} - IN_WORDS
REDUCTIONS = ("sum", "mean", "var", "std", "var_mean", "std_mean", "logsumexp", "linalg_vector_norm")
CHANNELS = ("native_group_norm", "native_batch_norm")
# Of whose formula a part is in words: by running moments; of a real number.
IN_PARTS = ("native_batch_norm", "angle")


def number(value):
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64)


def by_running_moments(call):
    """Whether a batch norm normalizes by moments from before."""
    trains = call["training"] if call["training"] is not None else call["momentum"] is None or len(call.outputs[1]) > 0
    return call["running_mean"] is not None and not trains


def of_norm(row, call, letters):
    """Adds x̂ and r; gives what ⟨ ⟩ and Σ run over."""
    x, eps = call["input"], call["eps"] if call["eps"] is not None else call["epsilon"]
    by_channel = (1, -1, *[1] * (x.ndim - 2))
    shape, over = x.shape, list(range(x.ndim - len(call["normalized_shape"] or ()), x.ndim))
    if row in CHANNELS:
        letters["w"] = 1.0 if call["weight"] is None else call["weight"].reshape(by_channel)
        grouped = "group" in call.attributes
        shape, over = ((call["N"], call["group"], -1), [2]) if grouped else (shape, [0, *range(2, x.ndim)])

    def mean(t):
        t = t.expand(x.shape).reshape(shape)
        return t.mean(over, keepdim=True).expand(t.shape).reshape(x.shape)

    if row == "_fused_rms_norm":
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        letters["r"] = (mean(x * x) + eps).rsqrt()
        letters["x̂"] = x * letters["r"]
        return mean, lambda t: t
    center, variance = mean(x), mean(x * x) - mean(x) ** 2
    if by_running_moments(call):
        center, variance = (call[name].reshape(by_channel) for name in ("running_mean", "running_var"))
    letters["r"] = (variance + eps).rsqrt().expand(x.shape)
    letters["x̂"] = (x - center) * letters["r"]
    return mean, (lambda t: t.sum([0, *range(2, x.ndim)])) if row in CHANNELS else (lambda t: t)


def of_reduction(call, letters):
    """Adds n, k, p and x̄; what was reduced gets its axes back."""
    x = call["self"]
    letters |= {"n": count(call), "k": correction(call), "p": order(call)}
    letters |= {name: spread(t, call) for name, t in letters.items() if name[0] in "gyG"}
    letters["x̄"] = x.mean(axes(call), keepdim=True) if x.ndim else x


def order(call):
    return call["ord"] if call["ord"] is not None else call.get("p", 2)


def letters_of(rule, call, gradients):
    """What the letters of a formula stand for in a call, and what Σ and ⟨ ⟩ mean there."""
    row, total, mean = rule.ops[0], lambda t: t, None
    letters = {}
    for name, letter in rule.symbols.items():
        value = call.outputs[int(name)] if name.isdigit() else call[name]
        if value is not None or letter not in letters:
            letters[letter] = value
    given = [torch.zeros_like(y) if g is None else g for g, y in zip(gradients, call.outputs, strict=True)]
    letters |= {"g": given[0], "G": given[0]} | {f"g{'₀₁₂₃'[i]}": g for i, g in enumerate(given[:4])}
    letters |= {f"y{'₀₁₂₃'[i]}": y for i, y in enumerate(call.outputs[:4])}
    if "self" in call.inputs:
        letters["n"] = call["self"].numel()
    if row in REDUCTIONS:
        of_reduction(call, letters)
    elif row == "fmod":
        letters["n"] = ((call["self"] - call.y) / call["other"]).round()
    elif row in ("_softmax", "_log_softmax"):
        total = lambda t: t.sum(call["dim"], keepdim=True)  # noqa: E731
    elif "attention" in row:
        letters |= {name: repeated(letters[name], call["query"].shape[1]) for name in "KV"}
        letters["s"] = call.get("scale", call["query"].shape[-1] ** -0.5)
        total = lambda t: t.sum(-1, keepdim=True)  # noqa: E731
    elif row == "linear":
        letters |= {name: letters[name].reshape(-1, letters[name].shape[-1]) for name in "GX"}
    elif row == "_linalg_det":
        letters |= {name: letters[name][..., None, None] for name in "gy"}
    elif row == "clamp":
        letters |= {n: bound for n, bound in (("l", -math.inf), ("h", math.inf)) if letters[n] is None}
    elif "norm" in row and "input" in call.inputs:
        mean, total = of_norm(row, call, letters)
    kept = {name: number(value) for name, value in letters.items() if value is not None and not isinstance(value, str)}
    return kept, total, mean


def said(rule, call, name):
    """The formula as it holds for this call, and whether all but g is conjugated in it."""
    text, conjugated, _ = formula(rule, call, name).partition(", all but g conjugated")
    if rule.ops[0] == "native_batch_norm" and name == "input":
        text = text.split("; by running moments ")[by_running_moments(call)]
    if rule.ops[0] == "angle":
        text = text.split("; ")[0] if call["self"].is_complex() else "0"
    return text, bool(conjugated)


def exempt(rule, call):
    """Calls of which the formula does not speak: what it leaves to `kink`, vectors among matrices, masks."""
    row = rule.ops[0]
    if row == "linalg_vector_norm":
        return order(call) in (0, math.inf)
    if row == "gelu":
        return call["approximate"] == "tanh"
    if row == "clamp":
        return isinstance(call["min"], torch.Tensor) and bool((call["min"] > call["max"]).any())
    if row in ("matmul", "linear", "_linalg_solve_ex"):
        return not call.get("left", True) or any(t.ndim == 1 and n != "bias" for n, t in call.inputs.items())
    if "attention" in row:
        mask = call.get("attn_mask", call["attn_bias"])
        return call.get("is_causal", False) or (mask is not None and mask.dtype == torch.bool)
    return (row == "t" and call["self"].ndim > 2) or (row == "native_dropout" and not call["train"])


def cases():
    return TABLE["listed"](c for c in TABLE["CASES"] if find(str(TABLE["overload"](c[0]))).ops[0] in READ)


@pytest.mark.parametrize("case", cases())
def test_a_formula_says_what_its_row_computes(case):
    TABLE["GENERATOR"].manual_seed(3)
    case = TABLE["Case"](*case)
    rule, call = find(str(case.func)), case.call()
    gradients = tuple(TABLE["like"](t) if t.is_floating_point() or t.is_complex() else None for t in call.outputs)
    if rule.ops[0] not in ("var_mean", "std_mean"):
        gradients = (gradients[0], *[None] * (len(gradients) - 1))
    if exempt(rule, call):
        pytest.skip("said in words")
    for name, expected in rule.vjp(call, gradients).items():
        text, conjugated = said(rule, call, name)
        letters, total, mean = letters_of(rule, call, gradients)
        if conjugated:
            letters = {n: t.conj() if t.is_complex() and n[0] not in "gG" else t for n, t in letters.items()}
        found = Formula(text, formula(rule, call), letters, total, mean).value()
        if found.is_complex() and not expected.is_complex():
            found = found.real
        if rule.ops[0] == "linear":
            found = found.sum(0) if name == "bias" else found.reshape(expected.shape)
        if "attention" in rule.ops[0] and name in ("key", "value"):  # heads share keys and values
            found = found.unflatten(1, (expected.shape[1], -1)).sum(2)
        found = found.expand(torch.broadcast_shapes(found.shape, expected.shape)).sum_to_size(expected.shape)
        assert torch.allclose(found.to(expected.dtype), expected, rtol=1e-9, atol=1e-11), f"{name}: {text}"


def test_only_what_moves_or_runs_is_said_in_words():
    assert {rule.ops[0] for rule in RULES.values()} >= IN_WORDS
    for rule in RULES.values():
        if rule.ops[0] in READ - set(IN_PARTS):
            assert not any(words(part.partition(": ")[2] or part) for text in rule.derivatives.values()
                           for part in text.split("; with ")), rule.ops  # fmt: skip


def test_a_wrong_formula_is_found():
    call = TABLE["Case"]("mul.Tensor", (TABLE["x"](3), TABLE["x"](3))).call()
    letters, *_ = letters_of(find("aten.mul.Tensor"), call, (torch.ones(3).double(),))
    assert torch.equal(Formula("g · b", "y = a · b", letters).value(), call["other"])
    assert not torch.allclose(Formula("g · a", "y = a · b", letters).value(), call["other"])
    with pytest.raises(AssertionError, match="expected"):
        Formula("g · b, to each", "y = a · b", letters).value()
