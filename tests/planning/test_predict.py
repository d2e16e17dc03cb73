"""Plans: their keys, their sums, what is said without torch and without room, and the length for a time."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from kiem.config.model import ModelConfig
from kiem.config.presets import PRESETS, resolve
from kiem.config.run import RunConfig, TrainConfig
from kiem.errors import ConfigError
from kiem.planning import measure, predict
from kiem.planning.count import flops_per_token
from kiem.planning.devices import Machine

GIB = 2**30


def config(preset: str = "gpt2-124m", **train) -> RunConfig:
    usual = {"tokens": 20_480, "batch_tokens": 2_048, "micro_batch_tokens": 1_024}
    usual |= {"eval_every": 4, "eval_tokens": 1_000}
    return resolve(RunConfig(model=PRESETS[preset], train=TrainConfig(**usual | train)), 50_257)


@pytest.fixture
def speed(monkeypatch):
    """A machine whose speed is known: 2 s a micro-batch, 1 s an update, 1 ms a token of evaluation."""
    monkeypatch.setattr(measure, "measure_speed", lambda _: measure.Speed(2.0, 1.0, 0.001, 1.25, "by hand"))
    monkeypatch.setattr(measure, "load_all", lambda: None)


@pytest.fixture
def machine(monkeypatch):
    """Sets this machine's memory in bytes, all of it and what is free."""

    def set_memory(total: float, free: float | None = None) -> None:
        of = Machine("a processor", 2, int(total), int(total if free is None else free))
        monkeypatch.setattr(predict, "this_machine", lambda: of)

    set_memory(64 * GIB)
    return set_memory


def text_of(plan: predict.Plan) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(predict.render(plan))
    return console.export_text()


def test_the_sums_of_a_measured_plan(speed, machine):
    plan = predict.plan(config()).to_dict()
    assert plan["parameters"] == 124_439_808 == sum(plan["parameters_by_module"].values())
    assert (plan["steps"], plan["micro_steps_per_step"], plan["total_tokens"]) == (10, 2, 20_480)
    assert plan["step_seconds"] == 2 * 2.0 + 1.0
    assert plan["tokens_per_second"] == 2_048 / 5.0
    assert plan["evaluation_seconds"] == 3 * 1_000 * 0.001  # after steps 4 and 8, and at the end
    assert plan["total_seconds"] == 10 * 5.0 + 3.0
    assert plan["total_flops"] == 20_480 * flops_per_token(PRESETS["gpt2-124m"]).total
    assert plan["flops_per_token"]["total_flops"] == flops_per_token(PRESETS["gpt2-124m"]).total
    kinds = plan["memory"]
    assert plan["peak_memory_bytes"] == max(
        kinds["process_peak_bytes"], kinds["process_bytes"] + kinds["peak_bytes"] * 5 // 4
    )
    assert kinds["weights_bytes"] == kinds["gradients_bytes"] == 4 * 124_439_808
    h100 = next(of for of in plan["elsewhere"] if of["device"] == "H100")
    assert h100 == {"device": "H100", "fits": True, "least_seconds": plan["total_flops"] / 989e12}


def test_a_plan_is_json_with_units_in_its_keys(speed, machine):
    plan = predict.plan(config()).to_dict()
    assert json.loads(json.dumps(plan)) == plan
    units = ("_bytes", "_seconds", "_flops", "_tokens", "_per_second", "_per_step")
    counts = {"parameters", "steps", "cores"}

    def check(value, key):
        if isinstance(value, dict):
            for name, inner in value.items():
                if key != "parameters_by_module":
                    check(inner, name)
        elif isinstance(value, list):
            for inner in value:
                check(inner, key)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert key in counts or key.endswith(units), key

    check(plan, "")


def test_the_plan_as_shown(speed, machine):
    shown = text_of(predict.plan(config()))
    tokens = "10 steps x 2,048 tokens (2 micro-batches of 1,024 = 1 sequence)"
    for part in ("124,439,808", tokens, "5.00 s", "410 tokens/s", "53.0 s", "by hand", "2 cores"):
        assert part in shown


def test_the_share_of_an_accelerators_peak(speed, machine):
    plan = replace(predict.plan(config()), device="NVIDIA L4", process_bytes=0)
    flops_per_second = 2_048 / 5.0 * flops_per_token(PRESETS["gpt2-124m"]).total
    assert plan.share_of_peak == flops_per_second / 121e12
    assert "NVIDIA L4, 0.3 % of peak FLOP/s" in text_of(plan)
    assert replace(plan, device="NVIDIA Unheard").share_of_peak is None


def test_without_measuring_nothing_is_said_of_speed(machine):
    plan = predict.plan(config(), measure=False)
    assert plan.to_dict()["step_seconds"] is None
    assert plan.to_dict()["total_seconds"] is None
    assert "H100" in text_of(plan)


def test_a_plan_needs_no_torch():
    """Also where torch is not installed; and the message says what is missing and what to do."""
    code = """
import sys
sys.modules["torch"] = None
from kiem.config.presets import PRESETS, resolve
from kiem.config.run import RunConfig
from kiem.planning import predict
plan = predict.plan(resolve(RunConfig(model=PRESETS["gpt2-124m"]), 50257), measure=True)
print(plan.parameters, plan.memory.peak > 0, plan.flops.total > 0, plan.speed, *plan.notes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("124439808 True True None ")
    assert "torch is not installed (pip install torch)" in done.stdout


def test_a_run_that_does_not_fit_says_what_would(machine):
    big = config(batch_tokens=65_536, micro_batch_tokens=65_536, tokens=655_360)
    whole = predict.plan(big, measure=False)
    machine(whole.peak_memory_bytes - 1)
    (note,) = [n for n in predict.plan(big, measure=False).notes if "does not fit" in n]
    assert "It fits with train.micro_batch_tokens=32768" in note
    machine(8 * GIB)
    (note,) = [n for n in predict.plan(big, measure=False).notes if "does not fit" in n]
    advised = dict(part.split("=") for part in note.split("It fits with ")[1].split(" (")[0].split(" "))
    less = config(batch_tokens=65_536, tokens=655_360, micro_batch_tokens=int(advised["train.micro_batch_tokens"]))
    assert predict.plan(less, measure=False).peak_memory_bytes <= 8 * GIB  # the advice is good, and the largest that is
    more = config(batch_tokens=65_536, tokens=655_360, micro_batch_tokens=2 * int(advised["train.micro_batch_tokens"]))
    assert predict.plan(more, measure=False).peak_memory_bytes > 8 * GIB
    machine(GIB)
    (note,) = [n for n in predict.plan(big, measure=False).notes if "does not fit" in n]
    assert "No micro-batch makes it fit" in note


def test_recomputing_is_advised_where_one_row_is_too_much(machine):
    one = config("gpt2-355m", batch_tokens=1_024, micro_batch_tokens=1_024)
    recomputing = config("gpt2-355m", batch_tokens=1_024, micro_batch_tokens=1_024, activation_checkpointing=True)
    enough = predict.plan(recomputing, measure=False).peak_memory_bytes
    assert enough < predict.plan(one, measure=False).peak_memory_bytes
    machine(enough)
    assert "It fits with train.activation_checkpointing=true" in " ".join(predict.plan(one, measure=False).notes)


def test_a_run_that_does_not_fit_is_not_measured(speed, machine):
    machine(GIB)
    assert predict.plan(config()).speed is None


def test_memory_that_is_taken_is_noticed(machine):
    machine(64 * GIB, free=GIB)
    notes = " ".join(predict.plan(config(), measure=False).notes)
    assert "only 1.00 GiB of this machine's memory is free now" in notes


def test_tokens_for_minutes(speed, machine):
    run = config()
    for minutes in (2, 10, 60):
        tokens = predict.tokens_for_minutes(run, minutes)
        assert tokens % 2_048 == 0
        steps = tokens // 2_048
        most = 60 * minutes - predict.START_SECONDS
        spent = steps * 5.0 + predict.EVALUATIONS * 1_000 * 0.001
        assert spent <= most * (1 - predict.RESERVE) < spent + 2 * 5.0  # one more step, and a second for the planning
    with pytest.raises(ConfigError, match=r"one step takes 5\.00 s on this machine"):
        predict.tokens_for_minutes(run, 0.2)


def test_minutes_that_are_too_few_are_said_as_they_were_given(speed, machine):
    """What has passed counts, and as many minutes as are advised are enough."""
    with pytest.raises(ConfigError, match=r"--minutes 0\.5 is too short: 25\.\d s were spent on reading text") as error:
        predict.tokens_for_minutes(config(), 0.5, gone_seconds=25.0)
    advised = float(str(error.value).split("at least --minutes ")[1].split(",")[0])
    assert 0.6 < advised < 1.0
    assert predict.tokens_for_minutes(config(), advised, gone_seconds=25.0) == 2_048


def test_what_surely_does_not_fit_is_refused_before_anything_is_allocated(machine):
    machine(64 * GIB)
    predict.require_memory(predict.plan(config(), measure=False))
    needs = predict.plan(config(), measure=False)
    machine(needs.process_bytes + needs.memory.peak)  # only the allocator's share is missing: it may work
    close = predict.plan(config(), measure=False)
    assert any("does not fit" in note for note in close.notes)
    predict.require_memory(close)
    machine(needs.process_bytes + needs.memory.peak - 1)
    with pytest.raises(ConfigError, match="this run does not fit: it needs"):
        predict.require_memory(predict.plan(config(), measure=False))


def test_the_least_need_that_is_said_is_more_than_there_is(machine):
    """Not a part of it that would fit: I8."""
    machine(int(23.5 * GIB))
    (note,) = [n for n in predict.plan(config("gpt2-1558m"), measure=False).notes if "does not fit" in n]
    least = float(note.split("still needs ")[1].split(" GiB")[0])
    assert least > 23.5 and "Use a smaller model" in note


def test_no_time_without_speed(machine, monkeypatch):
    machine(GIB)
    with pytest.raises(ConfigError, match="speed was not measured: this run does not fit"):
        predict.tokens_for_minutes(config(), 10)


def test_the_peak_is_never_below_what_was_reached(machine):
    plan = predict.plan(config(), measure=False)
    assert replace(plan, process_peak_bytes=10**12).peak_memory_bytes == 10**12


def test_a_thinner_model_is_timed_for_a_deep_one(monkeypatch):
    """The cost at any depth from three thin models: exact when the cost is linear in blocks, rows and vocabulary."""
    model = ModelConfig(vocab_size=1_000, context_length=8, emb_dim=8, n_heads=2, n_layers=20)
    run = resolve(RunConfig(model=model, train=TrainConfig(tokens=320, batch_tokens=32, micro_batch_tokens=32)), 2)
    asked = []

    def cost(_config, shape, rows, repetitions=2):
        asked.append((shape.vocab_size, shape.n_layers, rows))
        blocks, entries = shape.n_layers, shape.vocab_size
        held = blocks * 100 + entries
        micro = rows * (blocks * 0.5 + entries * 0.001)
        return measure.Cost(micro, blocks * 0.25 + entries * 0.01, micro / 4, 2.5 * held, held)

    monkeypatch.setattr(measure, "_cost", cost)
    monkeypatch.setattr(measure.runtime, "matmul_rate", lambda *a, **k: 1e3)  # so slow that it is large
    speed = measure.measure_speed(run)
    assert asked == [(1_000, 1, 1), (128, 1, 1), (128, 3, 1)]
    assert speed.micro_step_seconds == pytest.approx(4 * (20 * 0.5 + 1.0))
    assert speed.update_seconds == pytest.approx(20 * 0.25 + 10.0)
    assert speed.heap_ratio == pytest.approx(2.5)
    assert speed.evaluation_seconds_per_token == pytest.approx(speed.micro_step_seconds / 4 / 32)
    monkeypatch.setattr(measure.runtime, "matmul_rate", lambda *a, **k: 1e12)
    assert measure.measure_speed(run).micro_step_seconds == pytest.approx(4 * (20 * 0.5 + 1.0))
    assert asked[3:] == [(1_000, 20, 4)]  # small: timed whole
