"""Files and folders whose names are not UTF-8 work as any other: read, written down readably, and found again."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from kiem.cli import main as cli
from kiem.config.run import Source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
LATIN = os.fsdecode(b"caf\xe9")
SHOWN = r"caf\udce9"  # in JSON, YAML and on a terminal
TINY = ["model.vocab_size=257", "model.context_length=32", "model.emb_dim=16", "model.n_heads=2", "model.n_layers=1",
        "data.tokenizer=bytes", "train.batch_tokens=64", "train.tokens=256", "seed=1"]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a text of such a name."""
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kiem.runtime.matmul_rate", lambda *_, **__: 1e9)
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"line {i}: the quick brown fox number {i * i % 97} jumps\n" for i in range(400))
    (tmp_path / f"{LATIN}.txt").write_text(lines)
    return tmp_path


@pytest.fixture
def kiem(folder, capfd):
    """kiem(arguments...) -> (standard output, standard error) of a command that succeeds."""

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert code == 0 and "Traceback" not in err, err
        return out, err

    return call


def test_a_text_alone_is_prepared(kiem):
    out, _ = kiem("prepare", f"{LATIN}.txt", "--tokenizer", "bytes", "--json")
    assert f"{SHOWN}.txt" in out
    assert json.loads(out)["sources"][0]["path"] == f"{LATIN}.txt"


@pytest.mark.parametrize("form", ["jsonl", "parquet", "ipynb", "txt.gz"])
def test_every_form_of_text(kiem, folder, form):
    file, text = folder / f"{LATIN}.{form}", "a line of text\n" * 200
    if form == "jsonl":
        file.write_text(json.dumps({"text": text}) + "\n")
    elif form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        with open(file, "wb") as opened:
            parquet.write_table(pyarrow.table({"text": [text]}), opened)
    elif form == "ipynb":
        file.write_text(json.dumps({"cells": [{"cell_type": "code", "source": text}]}))
    else:
        import gzip

        file.write_bytes(gzip.compress(text.encode()))
    out, _ = kiem("prepare", file, "--tokenizer", "bytes", "--json")
    assert json.loads(out)["bytes"] >= len(text)


def test_a_run_trains_resumes_and_is_used(kiem, folder):
    """Its text, its folder and its configuration have such names; the tokens in the cache are gone meanwhile."""
    (folder / f"{LATIN}.json").write_text(json.dumps({"train": {"save_every": 2}}))
    train = ["train", f"{LATIN}.json", "--data", f"{LATIN}.txt", "--out", LATIN, *TINY]
    out, _ = kiem(*train)
    config = (folder / LATIN / "config.yaml").read_bytes().decode("utf-8")
    assert r"caf\uDCE9.txt" in config
    assert "resumed from" in kiem(*train, "-q")[1] + kiem(*train)[1]  # the same command
    shutil.rmtree(folder / "cache")
    _, err = kiem("train", LATIN, "tokens=512")
    assert "saved checkpoints/step-00000008" in err
    assert json.loads(kiem("eval", LATIN, "--json")[0])["tokens"] > 0
    assert json.loads(kiem("eval", LATIN, "--data", f"{LATIN}.txt", "--json")[0])["tokens"] > 0
    kiem("generate", LATIN, "--max-tokens", 3)
    report = json.loads((folder / LATIN / "report.json").read_bytes().decode("utf-8"))
    assert report["name"] == LATIN
    assert SHOWN in (folder / LATIN / "report.html").read_bytes().decode("utf-8")
    # What is advised can be typed in.
    typed = re.search(r"train longer: kiem (train .*)", out)[1]
    bash = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, check=True)
    assert os.fsdecode(bash.stdout).split("\0")[:2] == ["train", LATIN]


def test_a_fork_of_a_run_with_such_a_name(kiem, folder):
    kiem("train", "--data", f"{LATIN}.txt", "--out", LATIN, "-q", *TINY)
    kiem("train", LATIN, "--fork", f"{LATIN}-2", "-q", "train.lr=0.001")
    assert json.loads(kiem("eval", f"{LATIN}-2", "--json")[0])["tokens"] > 0


@pytest.mark.parametrize("gpt2", [False, True], ids=["tokenizer.json", "vocab.json and merges.txt"])
def test_a_tokenizer_in_such_a_folder(kiem, folder, gpt2):
    kiem("train", "--data", f"{LATIN}.txt", "--out", "run", "-q", *TINY)
    tokenizer = folder / f"{LATIN}-tokenizer"
    shutil.copytree(folder / "run" / "tokenizer", tokenizer)
    if gpt2:
        spec = json.loads((tokenizer / "tokenizer.json").read_text())
        (tokenizer / "tokenizer.json").unlink()
        (tokenizer / "vocab.json").write_text(json.dumps(spec["model"]["vocab"] | {"th": 256}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\nt h\n")
    out, _ = kiem("prepare", f"{LATIN}.txt", "--tokenizer", tokenizer, "--json")
    assert json.loads(out)["vocab_size"] == (258 if gpt2 else 257)


def test_a_name_that_no_file_can_have():
    with pytest.raises(ValueError, match="no file can have this name"):
        Source(path="caf\ud800")


@pytest.mark.parametrize("redirect", ["< bytes", "<&-"])
def test_a_prompt_that_is_no_text_is_one_message(kiem, folder, monkeypatch, redirect):
    kiem("train", "--data", f"{LATIN}.txt", "--out", "run", "-q", *TINY)
    (folder / "bytes").write_bytes(b"caf\xe9")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    command = shlex.join([sys.executable, "-m", "kiem", "generate", "run", "--prompt", "-"])
    done = subprocess.run(["bash", "-c", f"{command} {redirect}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --prompt -: standard input cannot be read"), done
