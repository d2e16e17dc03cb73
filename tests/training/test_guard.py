"""The sentinels: a late explosion is recognized and healthy noise is not; the first bad number is found and named."""

import json
import math
import random

import pytest
import torch
from torch import nn

from kiem.config.model import ModelConfig
from kiem.data.loader import Batch
from kiem.errors import NumericsError
from kiem.model.transformer import Transformer
from kiem.training.guard import CONFIRM, PATIENCE, Watch, first_nonfinite, nonfinite, require_finite
from kiem.training.objective import NextToken

# Curves ---------------------------------------------------------------------------------------------------------------


def healthy_curve(seed, steps=500):
    """Loss and gradient norm as runs have them: power-law fall, Gaussian or heavy-tailed noise, single odd batches,
    short spikes that come back, a fall of the learning rate at the end, fine-tuning that hardly learns."""
    rng = random.Random(seed)
    start = rng.choice([math.log(50_257), math.log(256), 2.5, 0.7])
    floor = start * rng.uniform(0.2, 0.95)
    power, noise = rng.uniform(0.1, 0.8), rng.choice([0.01, 0.05, 0.2, 0.1 * start])
    heavy = rng.random() < 0.3
    norm = rng.uniform(0.1, 5.0)
    spike_at = rng.randrange(100, steps - 50) if rng.random() < 0.5 else None
    for step in range(steps):
        loss = floor + (start - floor) * (1 + step) ** -power
        draw = rng.gauss(0, 1)
        if heavy:
            draw /= math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(3)) / 3)  # Student t with 3 degrees of freedom
        loss += noise * draw
        if rng.random() < 0.005:
            loss += rng.uniform(0, 1.5 * start)
        if spike_at is not None and 0 <= step - spike_at < 40:
            loss += (start - floor) * 0.5 ** ((step - spike_at) / 6)
        grad_norm = norm * (1 + step) ** -0.2 * math.exp(rng.gauss(0, 0.4)) * (20 if rng.random() < 0.01 else 1)
        yield step, max(loss, 1e-4), grad_norm


def run(curve, watch=None):
    watch = watch or Watch()
    return [verdict for step, loss, norm in curve if (verdict := watch.add(step, loss, norm))]


def test_no_false_alarm_on_200_healthy_curves():
    assert [seed for seed in range(200) if any(v.stop for v in run(healthy_curve(seed)))] == []


def exploding(seed, kind, at=300, steps=450):
    rng = random.Random(1000 + seed)
    for step, loss, norm in healthy_curve(seed, steps):
        late = step - at
        if late >= 0:
            if kind == "jump":
                loss = 11.0 + rng.gauss(0, 0.3)
            elif kind == "climb":
                loss += 0.15 * late
            else:
                norm *= 1e4
        yield step, loss, norm


@pytest.mark.parametrize("kind", ["jump", "climb", "norm"])
def test_explosions_are_recognized(kind):
    """Each within the patience and the time a climb needs to leave the noise; the trouble's first step is named."""
    for seed in range(40):
        verdicts = run(exploding(seed, kind))
        stops = [verdict for verdict in verdicts if verdict.stop]
        assert stops, (seed, verdicts)
        assert 290 <= stops[0].since <= 385
        assert ("gradient norm" if kind == "norm" else "the loss (") in stops[0].reason


def test_a_jump_is_told_after_a_few_steps_and_stops_at_the_end_of_the_patience():
    watch, calm = Watch(), []
    for step in range(1000):
        loss, norm = (3.0, 1.0) if step < 500 else (7.5, 1.0)
        verdict = watch.add(step, loss + 0.01 * (step % 5), norm)
        calm.append(watch.calm)
        if verdict and not verdict.stop:
            assert step == 500 + CONFIRM - 1
            assert verdict.reason == (
                "the loss (7.5300 nats per token) has been above 3.5200 since step 500; before that it was about 3.0200"
            )
        if verdict and verdict.stop:
            break
    assert step == 500 + PATIENCE - 1
    assert verdict.since == 500
    assert all(calm[:500])
    assert not any(calm[500:])


def test_a_spike_that_comes_back_is_told_but_does_not_stop():
    losses = [4.0 + 0.02 * (i % 3) for i in range(300)] + [9.0] * (PATIENCE - 1) + [4.0] * 300
    verdicts = run((i, loss, 1.0) for i, loss in enumerate(losses))
    assert [verdict.stop for verdict in verdicts] == [False]


def test_divergence_from_the_start():
    """A learning rate far too high: the loss never learns and leaves the level it began at."""
    verdicts = run((i, 10.8 if i < 20 else min(10.8 + 0.1 * (i - 20), 16.0), 1.0) for i in range(200))
    assert verdicts[-1].stop
    assert "above 11.8" in verdicts[-1].reason


FROM_THE_FIRST_STEP = {
    "explodes and comes down": lambda i: 5.5 if i == 0 else max(24_563 * 0.9**i, 497.0),
    "one step later": lambda i: 5.5 if i < 2 else 30.0,
    "a plateau above": lambda i: 5.5 + 2.5 * min(i, 10) / 10,
    "from a trained model": lambda i: 2.0 if i == 0 else 40.0,
}


@pytest.mark.parametrize("name", FROM_THE_FIRST_STEP)
def test_divergence_from_the_first_step_is_no_measure_of_itself(name):
    """The watch's picture of the start does not hold the explosion."""
    watch = Watch(uniform_loss=math.log(257))
    curve = FROM_THE_FIRST_STEP[name]
    verdicts = run(((i, curve(i), 1.0) for i in range(120)), watch)
    assert [v.stop for v in verdicts] == [False, True]
    assert verdicts[0].since <= 10 and "the loss (" in verdicts[0].reason
    assert "began at" in watch.ending() and "diverged" in watch.ending()


def test_no_false_alarm_with_the_vocabulary_known():
    """Runs that begin at ln V, and trained models that begin far below it."""
    for seed in range(200):
        watch = Watch(uniform_loss=math.log(50_257))
        assert not any(v.stop for v in run(healthy_curve(seed), watch)), seed


UNIFORM = math.log(257)


def ended(losses, uniform=UNIFORM):
    watch = Watch(uniform_loss=uniform)
    run(((i, loss, 1.0) for i, loss in enumerate(losses)), watch)
    assert Watch(json.loads(json.dumps(watch.state())), uniform).ending() == watch.ending()
    return watch.ending()


def test_the_end_of_a_run_that_learned_nothing_is_said():
    assert ended([]) is None
    assert ended([5.55 * 0.99**i for i in range(30)]) is None
    assert ended([5.55, 5.54, 5.55, 5.5, 5.52, 5.53]) is None
    assert ended([2.1, 1.9, 2.3, 2.0, 2.2, 1.8, 2.1]) is None
    assert "ended at 8.0000 nats per token and began at 5.5500" in ended([5.55, 8.0, 8.0, 8.0, 8.0])
    assert "began at 2.0000" in ended([2.0] * 20 + [2.3] * 20)
    assert "above 5.5491 = ln(vocab_size)" in ended([12.0 - 0.1 * i for i in range(40)])


def test_slow_divergence_is_measured_against_the_best_level():
    """A creep that any moving window would follow."""
    falling = [8.0 * 0.99**i + 2 for i in range(500)]
    verdicts = run((i, loss, 1.0) for i, loss in enumerate(falling + [2 + 0.005 * i for i in range(1500)]))
    assert any(verdict.stop for verdict in verdicts)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_number_that_is_none_stops_at_once(loss, norm):
    verdict = Watch().add(17, loss, norm)
    assert verdict.stop
    assert "step 17" in verdict.reason


def test_zero_gradient_and_constant_loss_are_no_alarm():
    assert run((i, 0.0, 0.0) for i in range(300)) == []


@pytest.mark.parametrize("kind", ["jump", "norm"])
def test_it_resumes_exactly_where_it_was(kind):
    """Through JSON at every 7th step; verdicts and the whole state equal to those without interruption."""
    straight, resumed = Watch(), Watch()
    for step, loss, norm in exploding(3, kind):
        assert straight.add(step, loss, norm) == resumed.add(step, loss, norm)
        if step % 7 == 0:
            resumed = Watch(json.loads(json.dumps(resumed.state(), allow_nan=False)))
        assert straight.state() == resumed.state()


def test_state_is_a_copy():
    watch = Watch()
    watch.add(0, 1.0, 1.0)
    before = watch.state()
    copy = json.loads(json.dumps(before))
    watch.add(1, 2.0, 1.0)
    assert before == copy


# Tensors --------------------------------------------------------------------------------------------------------------


def test_which_tensor_holds_what_and_where():
    bad = torch.zeros(2, 3)
    bad[1, 2], bad[1, 0], bad[1, 1] = math.nan, math.inf, -math.inf
    named = {"fine": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "half": bad.bfloat16()[:1], "moment": bad}
    assert nonfinite(named) == ["moment has 1 NaN and 2 inf in 6 values, first at [1, 0]"]
    require_finite({"model": {"a": torch.ones(1)}}, "step 3")
    with pytest.raises(NumericsError, match=r"^step 3: optimizer: moment has 1 NaN and 2 inf.*newest checkpoint"):
        require_finite({"model": {"a": torch.ones(1)}, "optimizer": named}, "step 3")
    many = {f"t{i}": torch.full((1,), math.nan) for i in range(9)}
    with pytest.raises(NumericsError, match=r"t4 has .*\(and 4 more\)"):
        require_finite({"model": many}, "now")


# A failed step --------------------------------------------------------------------------------------------------------


def tiny(**changes):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=2, **changes)
    return Transformer(config).initialize(0)


def batch():
    tokens = torch.arange(16).reshape(2, 8) % 11
    return Batch(tokens, tokens.roll(-1, 1), torch.arange(8).expand(2, 8), torch.zeros(2, 8, dtype=torch.int32), 16)


class Scale(nn.Module):
    """y = factor * x, and the gradient times backward_factor."""

    def __init__(self, inner, factor=1.0, backward_factor=1.0):
        super().__init__()
        self.inner, self.factor, self.backward_factor = inner, factor, backward_factor

    def forward(self, x, *args):
        x = self.inner(x, *args) * self.factor
        return ScaleGradient.apply(x, self.backward_factor)


class FirstOf(nn.Module):
    """In the place of attention: x itself."""

    def forward(self, x, *args):
        return x


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_a_finite_step_has_nothing_to_find():
    assert first_nonfinite(NextToken(), tiny(), batch()).startswith("not found: ")


def test_a_parameter_that_is_nan_is_named_first():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 2] = math.nan
    assert first_nonfinite(NextToken(), model, batch()) == (
        "before the forward pass: blocks.1.mlp.up.weight has 1 NaN in 256 values, first at [3, 2]"
    )


def test_the_first_module_whose_output_overflows_is_named():
    model = tiny()
    model.blocks[1].mlp = Scale(model.blocks[1].mlp, math.inf)
    found = first_nonfinite(NextToken(), model, batch())
    assert found.startswith("forward: blocks.1.mlp (Scale): its output has ")
    assert found.endswith("its inputs and parameters are finite")


def test_an_overflow_in_the_code_between_modules_is_its_owners():
    """Two finite halves whose residual sum is not: the block's addition is the culprit, not the norm."""
    model = tiny()
    block = model.blocks[0]
    block.norm1 = nn.Identity()  # lets the huge values through
    block.attn = Scale(FirstOf(), 1.0)
    with torch.no_grad():
        model.tok_emb.weight[5, :] = 2e38
    assert first_nonfinite(NextToken(), model, batch()).startswith(
        "forward: blocks.0 (Block), in its own code: its input to blocks.0.norm2 (LayerNorm) has "
    )


class Infinite(NextToken):
    def loss(self, model, batch):
        nats, weight, metrics = super().loss(model, batch)
        return nats * math.inf, weight, metrics


def test_the_loss_alone():
    """The search follows the very objective that the step differentiates."""
    assert first_nonfinite(Infinite(), tiny(), batch()).startswith("forward: the loss has 1 ")


@pytest.mark.parametrize("where", ["blocks.0.attn", "blocks.1.mlp", "final_norm"])
def test_the_operation_whose_gradient_overflows_is_named(where):
    model = tiny()
    parent, _, name = where.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, Scale(getattr(owner, name), 1.0, math.inf))
    found = first_nonfinite(NextToken(), model, batch())
    assert found.startswith(f"backward: the gradient made by ScaleGradientBackward in {where} (Scale) has ")


def test_the_search_changes_nothing():
    model = tiny(drop_rate=0.5)
    model.blocks[1].mlp = Scale(model.blocks[1].mlp, 1.0, math.nan)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert first_nonfinite(NextToken(), model, batch()).startswith("backward: ")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_it_works_under_activation_checkpointing():
    model = tiny()
    model.checkpoint_blocks = True
    model.blocks[1].mlp = Scale(model.blocks[1].mlp, 1.0, math.inf)
    assert "gradient" in first_nonfinite(NextToken(), model, batch())
