"""A small run, the folder that it was made in, and the command line called in this process."""

import shutil

import pytest
from small_run import FIRST

from kiem.cli import main as cli


def furnish(folder):
    lines = [f"line {i}: the quick brown fox number {i * i % 97} jumps\n" for i in range(300)]
    (folder / "text.txt").write_text("".join(lines))


def hurry(patch):
    """Leave out what takes seconds and is compared with nothing: the speed of this machine, and most of the samples."""
    from kiem import api
    from kiem.planning import predict

    plan = predict.plan
    patch.setattr("kiem.runtime.matmul_rate", lambda *_, **__: 1e9)
    patch.setattr(predict, "plan", lambda config, measure: plan(config, measure=False))
    patch.setattr(api, "SAMPLES_AT_ENDS", 1)
    patch.setattr(api, "SAMPLE_TOKENS", 8)


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
