"""The judge finds one wrong element, lets the rounding of real arithmetic pass, and knows a kink."""

import math

import pytest
import torch

from kiem.inspect.verify.judge import Evidence, InputVerdict, Random, inner
from kiem.inspect.verify.judge import judge as judge_evidence
from kiem.inspect.verify.numeric import Derivative


def judge(result, *evidence):
    judge_evidence(result, Evidence(*evidence))


def test_random_numbers_are_those_of_the_seed():
    like = torch.empty(7, 50_000)
    one, two, other = Random(3).like(like), Random(3).like(like), Random(4).like(like)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == like.shape and one.dtype is torch.float32
    assert abs(float(one.mean())) < 0.01 and abs(float(one.std()) - 1) < 0.01
    first = Random(3)
    assert not torch.equal(first.like(like), first.like(like))
    assert Random(0).like(torch.empty(3, dtype=torch.complex128)).dtype is torch.complex128
    assert Random(0).like(torch.empty(0, 4)).shape == (0, 4) and Random(0).like(torch.tensor(1.0)).shape == ()


def test_noise_is_relative_and_leaves_zero_and_infinity():
    x = torch.tensor([1.0, -1e30, 0.0, math.inf, -math.inf, 1e-30], dtype=torch.float64)
    moved = Random(0).shaken(x)
    assert moved[2] == 0 and moved[3] == math.inf and moved[4] == -math.inf
    change = (moved / x - 1)[[0, 1, 5]].abs()
    assert (change > 0).all() and (change < 2.0**-23).all()
    strided = torch.randn(4, 6, dtype=torch.float64).t()
    assert Random(0).shaken(strided).shape == (6, 4) and Random(0).shaken(strided.to(torch.complex128)).is_complex()


def judged(got, reference, dtype=torch.float32, moved=None, bound=8.0, unit=None, seed=0, slope=None):
    """The verdict on a gradient, the number being that of the reference along a random direction (or `slope`)."""
    reference = reference.double()
    direction = Random(seed).like(reference)
    unit = torch.finfo(dtype).eps / 2 if unit is None else unit
    size = float((reference.abs() * direction.abs()).sum())

    def numeric(along):
        value = inner(reference, along)
        return Derivative(value, 1e-12 * size, value, value)

    result = InputVerdict("x", 0, "ok", dtype, bound=bound)
    number = numeric(direction) if slope is None else Derivative(slope, 1e-12 * size, slope, slope)
    moved = reference.abs() if moved is None else moved
    both = (reference, reference)
    judge(result, got.double(), reference, moved.clone(), unit, direction, number, numeric, lambda: both)
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_results_pass_and_one_wrong_element_does_not(dtype):
    torch.manual_seed(0)
    reference = torch.randn(1000, 400, dtype=torch.float64)
    got = reference.to(dtype)
    right = judged(got, reference, dtype)
    assert right.verdict == "ok" and right.units < right.bound
    broken = got.double().clone()
    broken[417, 33] += 0.5
    wrong = judged(broken, reference, dtype)
    assert wrong.verdict == "wrong" and wrong.wrong_elements == 1 and wrong.element == (417, 33)
    assert wrong.expected == reference[417, 33] and wrong.got == broken[417, 33]


@pytest.mark.parametrize(("change", "count"), [
    (lambda g: g.mul_(-1), 600), (lambda g: g.zero_(), 600), (lambda g: g.mul_(2), 600), (lambda g: g[5].zero_(), 30),
    (lambda g: g[0, 0].fill_(math.nan), 1), (lambda g: g[0, 0].fill_(math.inf), 1),
])  # fmt: skip
def test_what_is_plainly_wrong(change, count):
    torch.manual_seed(1)
    reference = torch.randn(20, 30, dtype=torch.float64)
    got = reference.float()
    change(got)
    result = judged(got, reference)
    assert result.verdict == ("wrong" if got.isfinite().all() else "nonfinite") and result.wrong_elements == count


@pytest.mark.parametrize("count", [10, 1000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_of_sums_passes(dtype, count):
    """Sums of `count` terms one after the other in float32 and rounded once to the type: what kernels do."""
    generator = torch.Generator().manual_seed(count)
    terms = torch.randn(12, count, generator=generator, dtype=torch.float32)
    total = torch.cumsum(terms, 1, dtype=torch.float32)[:, -1].to(dtype)
    reference = terms.double().sum(1)
    # What one rounding of each term moves: as their root sum of squares.
    moved = terms.double().square().sum(1).sqrt()
    fine, coarse = torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps / 2
    bound = 8 + count / 4 * fine / coarse
    result = judged(total, reference, dtype, moved, bound)
    assert result.verdict == "ok", (result.units, bound)


def test_the_number_decides_between_a_wrong_reference_and_a_wrong_gradient():
    reference = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    true = reference * 3
    slope = inner(true, Random(0).like(reference))
    agrees = judged(true.float(), reference, slope=slope)
    assert agrees.verdict == "ok" and agrees.reference == ""
    assert judged(reference.float(), reference, slope=slope).verdict == "wrong"


def test_without_a_reference_the_number_judges():
    truth = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    direction = Random(0).like(truth)
    number = Derivative(inner(truth, direction), 1e-9, inner(truth, direction), inner(truth, direction))
    for got, verdict in ((truth.float().double(), "ok"), (truth * 1.01, "wrong"), (-truth, "wrong")):
        result = InputVerdict("x", 0, "ok", torch.float32, bound=8.0)
        judge(result, got, None, None, 2.0**-24, direction, number, lambda d: number, lambda: (truth, truth))
        assert result.verdict == verdict


def test_at_a_kink_any_value_between_the_sides_is_right():
    x = torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    left, right = (x > 0).double(), (x >= 0).double()
    direction = Random(1).like(x)

    def numeric(along):
        one, two = inner(right, along.clamp_min(0)) + inner(left, along.clamp_max(0)), 0.0
        two = inner(left, along.clamp_min(0)) + inner(right, along.clamp_max(0))
        return Derivative((one + two) / 2, 1e-9, min(one, two), max(one, two), abs(one - two))

    for zero, verdict in ((0.0, "kink"), (0.5, "kink"), (1.0, "kink"), (1.5, "wrong"), (-0.1, "wrong")):
        got = torch.tensor([1.0, zero, 0.0, zero], dtype=torch.float64)
        result = InputVerdict("x", 0, "ok", torch.float32, bound=8.0)
        judge(result, got, left, left.abs(), 2.0**-24, direction, numeric(direction), numeric, lambda: (left, right))
        assert result.verdict == verdict, zero
    off = torch.tensor([0.9, 0.0, 0.0, 0.0], dtype=torch.float64)
    result = InputVerdict("x", 0, "ok", torch.float32, bound=8.0)
    judge(result, off, left, left.abs(), 2.0**-24, direction, numeric(direction), numeric, lambda: (left, right))
    assert result.verdict == "wrong" and result.element == (0,)


def test_complex_and_empty_gradients():
    reference = torch.randn(30, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    direction = Random(0).like(reference)
    number = Derivative(inner(reference, direction), 1e-9, *[inner(reference, direction)] * 2)
    rounded = reference.to(torch.complex64).to(torch.complex128)
    for got, verdict in ((rounded, "ok"), (reference.conj().resolve_conj(), "wrong")):
        result = InputVerdict("x", 0, "ok", torch.complex64, bound=8.0)
        judge(result, got, reference, reference.abs(), 2.0**-24, direction, number, lambda d: number,
              lambda: (reference, reference))  # fmt: skip
        assert result.verdict == verdict
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert judged(empty, empty).verdict == "ok"
