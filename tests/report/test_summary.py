"""report.json: numbers by hand, every documented key, and runs that are not whole."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from kiem.errors import CheckpointError, StorageError
from kiem.report.facts import facts, headline
from kiem.report.schema import KEYS, OPAQUE, SCHEMA_VERSION, document
from kiem.report.summary import build_report, compression_baselines, held_out_text, write


def keys_of(value, path="") -> set[str]:
    """Dotted paths of everything in a report, as the documentation writes them."""
    if isinstance(value, dict) and path not in OPAQUE:
        found = set() if not path else {path}
        for key, inner in value.items():
            found |= keys_of(inner, f"{path}.{key}" if path else key)
        return found
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path}.union(*(keys_of(v, f"{path}[]") for v in value)) - {f"{path}[]"}
    return {path}


def test_every_key_is_documented_and_every_documented_key_is_there(make_run, dataset):
    found = keys_of(build_report(make_run(), dataset))
    found = {re.sub(r"^planned\.\w+\.", "planned.*.", key) for key in found} - {"planned", "compression", "curve"}
    assert found == set(KEYS)


def test_the_documentation_is_the_code():
    path = Path(__file__).parents[2] / "docs" / "report.md"
    text = path.read_text(encoding="utf-8")
    assert document(text) == text, "write docs/report.md anew with kiem.report.schema.document"
    assert text.count("<!-- table ") == 3


def test_numbers_by_hand(make_run, dataset):
    report = build_report(make_run(), dataset)
    assert report["schema_version"] == SCHEMA_VERSION
    assert (report["name"], report["status"], report["reason"], report["starts"]) == ("demo", "finished", "finished", 2)
    assert (report["started_at"], report["ended_at"]) == ("2026-11-24T08:00:00+00:00", "2026-11-24T08:04:00+00:00")
    assert (report["step"], report["steps_planned"], report["tokens"], report["tokens_planned"]) == (4, 4, 400, 400)
    # GPT-2 of width 8: 300*8 + 8*8 embeddings; a block of 4*8*8 + 8 (attention) + 2*8*32 + 32 + 8 + 2*16; a norm of 16.
    assert report["parameters"] == 2400 + 64 + (256 + 8 + 512 + 40 + 32) + 16
    assert report["seconds"] == 0.5 + 1.0 + 0.5 + 0.5
    assert report["last_start_seconds"] == 0.5 + 0.5 and "2.50 s in all, 1.00 s since the resume" in headline(report)
    assert report["tokens_per_second"] == 400 / 2.5
    assert report["matmul_share"] == pytest.approx((0.5 * 0.5 + 0.25 * 1.0 + 0.5 * 0.5 + 0.5 * 0.5) / 2.5)
    assert report["step_seconds"] == 0.5 and report["peak_memory_bytes"] == 1_000_004
    assert (report["eval_seconds"], report["save_seconds"]) == (0.5, 0.125)
    assert (report["loss"], report["bits_per_byte"], report["loss_step"]) == (2.75, 1.65, 4)
    assert (report["best_bits_per_byte"], report["best_step"]) == (1.5, 2)
    keep = 0.8  # the window is 5 steps
    weights = [keep**3, keep**2, keep, 1]
    mean = sum(w * x for w, x in zip(weights, (4, 3, 2, 1), strict=True)) / sum(weights)
    assert report["train_loss"] == pytest.approx(mean)
    assert report["planned"]["peak_memory_bytes"] == {
        "planned": 1_100_000,
        "measured": 1_000_004,
        "ratio": pytest.approx(1_100_000 / 1_000_004),
    }
    assert report["planned"]["step_seconds"]["ratio"] == 1.0
    assert report["planned"]["tokens_per_second"]["ratio"] == 200 / 160
    assert report["python_samples"][0] == {"step": 1, "judged": 2, "accepted": 1, "accepted_share": 0.5}
    assert report["curve"]["tokens"] == [100, 200, 300, 400] and report["curve"]["seconds"] == [0.5, 1.5, 2.0, 2.5]
    assert report["problems"] == []


def test_compressors_see_the_held_out_text_without_marks(make_run, dataset):
    report = build_report(make_run(), dataset)
    assert report["compression"] == compression_baselines(dataset.text)
    assert report["compression"]["text_bytes"] == 230
    assert held_out_text(dataset) == dataset.text
    assert [held_out_text(dataset, n) for n in (0, 1, 10, 11, 229, 230)] == [
        dataset.text[:n] for n in (0, 1, 10, 11, 229, 230)
    ]


def test_held_out_text_is_read_in_pieces(dataset, monkeypatch):
    monkeypatch.setattr("kiem.report.summary.TOKENS_AT_ONCE", 10)  # documents of 10, 100 (two-byte characters), 120
    assert held_out_text(dataset) == dataset.text


def test_what_only_the_data_knows_is_kept_when_the_report_is_written_again(make_run, dataset):
    folder = make_run()
    first = write(folder, dataset)
    again = write(folder)
    assert again["data"] == dataset.report and again["compression"] == first["compression"]
    assert again["environment"] == first["environment"] and first["environment"]["processor"] == "test"
    assert {**again, "written_at": ""} == {**first, "written_at": ""}
    assert json.loads((folder / "report.json").read_text()) == again


def test_a_run_that_is_still_going(make_run, records):
    folder = make_run(metrics=records.whole[:3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "tok')
    report = write(folder)
    assert (report["status"], report["reason"], report["ended_at"], report["step"]) == ("unfinished", None, None, 2)
    assert report["loss"] is None and report["compression"]["text_bytes"] is None and report["problems"] == []
    stopped = build_report(make_run(metrics=records.whole[:6], name="stopped"))
    assert (stopped["status"], stopped["reason"]) == ("stopped", "SIGTERM")


@pytest.mark.parametrize("missing", ["metrics", "samples", "config", "plan"])
def test_missing_parts(make_run, missing):
    report = write(make_run(**{missing: None}))
    assert (report["step"] == 0) == (missing == "metrics")
    assert (report["samples"] == []) == (missing == "samples")
    assert (report["parameters"] is None) == (missing == "config")
    named = {"config": ["config.yaml is missing"], "plan": ["plan.json is missing"]}
    assert report["problems"] == named.get(missing, [])


def test_only_steps_without_a_record_are_lost(make_run):
    folder = make_run()
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert build_report(folder)["problems"] == []
    (folder / "checkpoints" / "step-00000006").mkdir()
    report = build_report(folder)
    assert report["step"] == 6
    assert report["problems"] == ["metrics.jsonl has no record of steps 5 to 6: they are lost"]


@pytest.mark.parametrize(("losses", "told"), [((3, 2, 2.5), True), ((3, 2.5, 2.51), False), ((3, 2, 1), False)])
def test_a_held_out_loss_that_rises_is_told(make_run, records, losses, told):
    evals = [records.evaluation(n, loss, 1.0) for n, loss in enumerate(losses, 1)]
    report = build_report(make_run(metrics=[*(records.step(n, 4.0 - n) for n in (1, 2, 3)), *evals]))
    words = "the held-out loss was lowest at step 2 (2.0000) and has risen to 2.5000: the model overfits"
    assert [p.startswith(words) for p in report["problems"]] == [True] * told


def test_not_a_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has neither config\.yaml nor metrics\.jsonl"):
        build_report(tmp_path)
    with pytest.raises(CheckpointError, match="not a run folder"):
        write(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_spelled_as_in_the_log_and_named(make_run, records, tmp_path):
    metrics = [records.step(1), records.step(2, "NaN"), records.evaluation(2, "Infinity", "NaN")]
    report = write(make_run(metrics=metrics))
    assert (report["loss"], report["bits_per_byte"], report["best_bits_per_byte"]) == ("Infinity", "NaN", None)
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["evaluations"][0]["loss"] == "Infinity"
    assert dict(facts(report))["held-out loss"] == "inf nats per token"
    assert report["train_loss"] == 2.0
    assert report["problems"] == ["the loss at step 2 is NaN"]


def test_a_log_that_begins_late_or_skips_steps(make_run, records):
    # Each record stands for the steps since the one before it; what was before the first record is unknown.
    report = build_report(make_run(metrics=[records.step(11, seconds=1.0), records.step(21, seconds=2.0)]))
    assert report["seconds"] == 1.0 + 10 * 2.0
    assert report["tokens_per_second"] == 1100 / 21.0


WRONG = ["x", None, True, [], {}, "Infinity", -1, "NaN", 10**400]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: repr(x)[:12])
def test_odd_values_anywhere_do_not_stop_a_report(make_run, records, wrong):
    odd = [{key: (value if key == "kind" else wrong) for key, value in record.items()} for record in records.whole]
    strange = [{**sample, "step": wrong, "tokens": wrong, "prompt": wrong} for sample in records.samples]
    plan = dict.fromkeys(records.plan, wrong)
    report = write(make_run(metrics=records.whole[:3] + odd, samples=strange + records.samples, plan=plan))
    assert json.loads(json.dumps(report, allow_nan=False)).keys() == report.keys()


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "a: 1\n" * 300_000, "[" * 300, BOMB], ids=range(6))
def test_damaged_config_and_plan(make_run, text):
    folder = make_run()
    (folder / "config.yaml").write_text(text)
    (folder / "plan.json").write_text(text)
    report = write(folder)
    assert report["config"] == {} and len(report["problems"]) == 2
    assert all(p.startswith(("config.yaml:", "plan.json:")) for p in report["problems"])


def test_many_problems_are_shortened(make_run):
    folder = make_run()
    (folder / "samples.jsonl").write_text("no\n" * 50)
    assert build_report(folder)["problems"][-1] == "and 30 more problems of this kind"


def test_many_steps_of_samples_are_spread(make_run, records):
    drawn = [records.sample(step, f"x = {step}\n") for step in range(0, 101, 5)]
    steps = [s["step"] for s in build_report(make_run(samples=drawn))["samples"]]
    assert len(steps) == 8 and steps[0] == 0 and steps[-1] == 100 and steps == sorted(steps)


def test_a_write_that_fails_leaves_the_old_report(make_run, monkeypatch):
    folder = make_run()
    write(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"report\.json: No space left"):
        write(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_long_run_is_thinned_and_keeps_its_spike(make_run, records):
    steps = [records.step(n, loss=2.0 + (50.0 if n == 7777 else 0.0)) for n in range(1, 20_001)]
    folder = make_run(metrics=steps)
    report = write(folder)
    assert len(report["curve"]["tokens"]) <= 320
    assert math.isclose(report["seconds"], 10_000.0)
    page = (folder / "report.html").read_text()
    assert len(page) < 1_000_000 and "highest 52" in page
