"""A text, a small trained run, and the command line called in this process."""

from dataclasses import dataclass

import pytest

from kiem.cli import main as cli

TINY = ["data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=32", "model.emb_dim=16",
"model.n_heads=2", "model.n_layers=1", "train.batch_tokens=64", "train.tokens=256", "seed=1"]  # fmt: skip


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a text, and `run`, a run that was trained on it."""
    folder = tmp_path_factory.mktemp("place")
    lines = [f"line {i}: the quick brown fox number {i * i % 97} jumps\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIEM_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        code = cli.main(["train", "--data", "text.txt", "--out", "run", "--quiet", "--json", *TINY])
    assert code == 0
    return folder


@pytest.fixture
def kiem(place, monkeypatch, capfd):
    """kiem(arguments...) -> Result, in the folder `place`."""
    monkeypatch.setenv("KIEM_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call
