"""The manifest of prepared data, and the notes on the way to it, are read as anything that somebody else may have
written."""

import copy
import json
import os
import random
import shutil

import pytest

from kiem.config.run import DataConfig, Source
from kiem.data import shards
from kiem.data.prepare import prepare
from kiem.errors import DataError

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration, cache, prepared data)."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text("".join(f"line {i}, some text\n" for i in range(300)))
    data = DataConfig(sources=[Source(path=str(folder / "a.txt"))], tokenizer="bytes")
    return data, folder / "cache", prepare(data, 257, folder / "cache")


@pytest.fixture
def again(made, tmp_path):
    """(the folder of a copy, a function that prepares with it)."""
    data, cache, dataset = made
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache" / "data" / dataset.path.name, lambda: prepare(data, 257, tmp_path / "cache")


def signed(body):
    return body | {"checksum": shards._checksum(body)}


def test_a_manifest_that_is_a_pipe_giant_or_no_json(made, again):
    folder, prepare_again = again
    manifest = folder / shards.MANIFEST
    for content in (None, DEEP, "", "null", "[]", "1", '"x"', "\0", "{}", '{"checksum": 1}'):
        manifest.unlink()
        if content is None:
            os.mkfifo(manifest)
        else:
            manifest.write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json: damaged|data of format None"):
            shards.open_dataset(folder)
        assert prepare_again().fingerprint == made[2].fingerprint
    manifest.unlink()
    with open(manifest, "wb") as file:
        file.truncate(300 << 20)  # a file with a hole: nothing of it is on the disk
    with pytest.raises(DataError, match="more than 256 MiB"):
        shards.open_dataset(folder)


def test_a_manifest_with_any_value_of_another_type_is_refused(made, again):
    """Each value in it, one after the other, becomes odd; the checksum is right."""
    folder, _ = again
    manifest = folder / shards.MANIFEST
    body = json.loads(manifest.read_text())
    body.pop("checksum")
    rng, odd = random.Random(3), [None, True, -1, 10**30, "x", [], {}, [[]], {"a": 1}, "../../etc/passwd"]
    refused = 0
    for path in _paths({key: value for key, value in body.items() if key != "options"}):
        changed = copy.deepcopy(body)
        group = changed
        for key in path[:-1]:
            group = group[key]
        group[path[-1]] = rng.choice(odd)
        manifest.write_text(json.dumps(signed(changed)))
        try:
            shards.open_dataset(folder, names=["a"]).verify()
        except DataError:
            refused += 1
    assert refused > 20


def _paths(value, path=()):
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _paths(inner, (*path, key))


@pytest.mark.parametrize("name", ["scan.json", "note-000-00000.json"])
@pytest.mark.parametrize(
    "content", [None, DEEP, "null", "[]", '{"shards": 1}', '{"scans": {}}', '{"shards": [], "next": 1}']
)
def test_a_note_that_is_none_is_made_again(made, again, monkeypatch, name, content):
    folder, prepare_again = again
    shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kiem.data.prepare.write_manifest", _interrupted)
        prepare_again()
    note = folder / name
    note.unlink()
    if content is None:
        os.mkfifo(note)
    else:
        note.write_text(content)
    assert prepare_again().fingerprint == made[2].fingerprint


def _interrupted(*_):
    raise KeyboardInterrupt
