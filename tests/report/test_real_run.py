"""The keys that a real run writes are the documented ones, and its report has nothing missing."""

from kiem.config.presets import resolve
from kiem.config.read import read_config, write_config
from kiem.report.schema import KEYS
from kiem.report.summary import build_report
from kiem.runs.metrics import RECORDS, SAMPLE_KEYS, read_metrics


def test_a_real_run_writes_the_documented_keys(tmp_path):
    import torch

    from kiem.data.prepare import prepare
    from kiem.planning.predict import plan
    from kiem.runs.run import Run
    from kiem.training.loop import train

    (tmp_path / "text.py").write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(300)))
    model = {"vocab_size": 257, "context_length": 16, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
    lengths = {"tokens": 64, "batch_tokens": 32, "micro_batch_tokens": 32}
    lengths |= {"eval_every": 1, "save_every": 1, "sample_every": 1}
    data = {"sources": [str(tmp_path / "text.py")], "tokenizer": "bytes"}
    config = read_config({"model": model, "data": data, "train": lengths})
    dataset = prepare(config.data, 257, tmp_path / "cache")
    config = resolve(config, dataset.tokenizer.vocab_size)
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    sample = {"prompt": "", "text": "x = 1\n", "seed": 0, "temperature": 0.8}
    try:
        train(
            config,
            Run(folder),
            dataset,
            plan=plan(config, measure=False).to_dict(),
            sampler=lambda model, step: [sample],
            quiet=True,
        )
    finally:
        torch.set_flush_denormal(False)  # a run sets it for its process; other tests live here too

    records = read_metrics(folder / "metrics.jsonl")
    assert {r["kind"] for r in records} == {"start", "step", "eval", "save", "end"}
    for record in records:
        assert set(record) - {"kind"} == set(RECORDS[record["kind"]]), record
    assert all(set(s) == set(SAMPLE_KEYS) for s in read_metrics(folder / "samples.jsonl"))

    last = [record for record in records if record["kind"] == "eval"][-1]
    report = build_report(folder, dataset)
    unknown = {key for key in KEYS if key in report and report[key] is None}
    assert unknown == set()
    assert report["problems"] == []
    assert (report["status"], report["step"], report["bits_per_byte"]) == ("finished", 2, last["bits_per_byte"])
    # The compressors and the model were given the same bytes.
    assert report["compression"]["text_bytes"] == report["eval_bytes"] == report["data"]["validation"]["bytes"]
    assert report["python_samples"][-1]["accepted_share"] == 1.0
