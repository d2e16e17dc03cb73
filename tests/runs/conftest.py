"""A small run, the folder that it was made in, and the command line called in this process."""

import shutil

import pytest

from kiem.cli import main as cli

TINY = [
    *("data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=16", "model.emb_dim=16", "model.n_heads=2"),
    *("model.n_layers=1", "train.batch_tokens=64", "train.save_every=2", "train.keep_checkpoints=2", "seed=1"),
]
FIRST = ["train", "--data", "text.txt", "--tokens", "1280", "--out", "run", "-q", *TINY]  # 20 steps


def furnish(folder):
    lines = [f"line {i}: the quick brown fox number {i * i % 97} jumps\n" for i in range(300)]
    (folder / "text.txt").write_text("".join(lines))


def hurry(patch):
    """Leave out what takes a third of a second and is compared with nothing."""
    patch.setattr("kiem.runtime.matmul_rate", lambda *_, **__: 1e9)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a text and `run`, a finished run on it."""
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setenv("KIEM_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert cli.main(FIRST) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a text."""
    hurry(monkeypatch)
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


@pytest.fixture
def kiem(capfd):
    """kiem(arguments...) -> (exit code, standard output, standard error)."""

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def run(trained, place):
    """A copy of a finished run of 20 steps."""
    shutil.copytree(trained / "cache", place / "cache")
    shutil.copytree(trained / "run", place / "run")
    return place / "run"


@pytest.fixture
def own_run(kiem, place):
    """A finished run of 20 steps on the text of the working folder."""
    code, _, err = kiem(*FIRST)
    assert code == 0, err
    return place / "run"
