"""Preparing: what ends up on which side, the cache, and that no interruption, rival or full disk leaves a trace."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import config, contents, folder_of, texts

from kiem.config.run import DataConfig, Source
from kiem.data import prepare as module
from kiem.data.prepare import prepare
from kiem.data.shards import open_dataset
from kiem.errors import DataError, StorageError


def test_long_records_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("kiem.data.formats.PIECE", 64)
    records = [f"{i} " * (1 + i * 7 % 90) for i in range(120)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    dataset = prepare(config(tmp_path / "b.jsonl", validation_fraction=0.2), 0, tmp_path / "cache")
    train, held = texts(dataset, dataset.train[0][0]), texts(dataset, dataset.validation)
    assert sorted(train + held) == sorted(records) and held


def test_validation_text_of_its_own(tmp_path):
    folder = folder_of(tmp_path / "text", 100)
    (tmp_path / "v.txt").write_text("held out\n")
    dataset = prepare(config(folder, folder, validation=[Source(path=str(tmp_path / "v.txt"))]), 0, tmp_path / "c")
    assert texts(dataset, dataset.validation) == ["held out\n"]
    assert [len(texts(dataset, split)) for split, _ in dataset.train] == [100, 100]
    assert dataset.report["validation"]["rule"] == f"{tmp_path}/v.txt: all of it"


@pytest.mark.parametrize(
    ("weights", "shares"), [((1, 1), [0.5, 0.5]), ((2, 2), [0.5, 0.5]), ((3, 1), [0.75, 0.25]), ((None, None), None)]
)
def test_weights_are_relative_and_none_means_by_size(tmp_path, weights, shares):
    large = folder_of(tmp_path / "large", 90, lambda i: f"document {i} of the large folder\n")
    small = folder_of(tmp_path / "small", 10, lambda i: f"small {i}\n")
    sources = [Source(path=str(path), weight=weight) for path, weight in zip((large, small), weights, strict=True)]
    dataset = prepare(config(*sources), 0, tmp_path / "c")
    found = [share for _, share in dataset.train]
    assert dataset.proportional == (shares is None)
    sizes = [split.n_tokens for split, _ in dataset.train]
    assert found == (shares or [size / sum(sizes) for size in sizes])


def test_weights_of_only_some_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"b has no weight and others have one: give every source a weight .*or none"):
        config(Source(path="a", weight=1.0), "b")


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path):
    words = [
        f"{'bcdfghjklmnpqrstvwxz'[i % 20]}a{'bcdfghjklmnpqrstvwxz'[i // 20]}uq{i % 7}".translate(
            str.maketrans("0123456", "efijouy")
        )
        * 2
        for i in range(200)
    ]
    folder = folder_of(tmp_path / "text", 200, lambda i: f" {words[i]}" * 40)
    dataset = prepare(config(folder, tokenizer="bpe", validation_fraction=0.1), 3000, tmp_path / "cache")
    train, held = (texts(dataset, split) for split in (dataset.train[0][0], dataset.validation))
    assert len(held) > 8

    def known(documents):
        return sum(len(dataset.tokenizer.encode(" " + text.split()[0])) == 1 for text in documents)

    assert known(train) == len(train) and known(held) == 0


def test_other_tokenizers(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("hello world\n" * 30 + "only at the end: ß\n")
    chars = prepare(config(file, tokenizer="chars"), 0, tmp_path / "cache")
    assert chars.tokenizer.vocab_size == len(set(file.read_text())) + 1
    bpe = prepare(config(file, tokenizer="bpe"), 300, tmp_path / "cache")
    own = prepare(config(file, tokenizer=str(bpe.path / "tokenizer")), 0, tmp_path / "cache")
    assert own.fingerprint == bpe.fingerprint and own.path != bpe.path
    with pytest.raises(DataError, match="tokenizer nowhere: it does not exist"):
        prepare(config(file, tokenizer="nowhere"), 0, tmp_path / "cache")
    only = prepare(config(file, tokenizer="bpe"), 260, tmp_path / "cache", tokenizer_only=True)
    assert only.tokenizer.vocab_size == 260 and only.train == [] and only.report["tokens"] == 0
    assert prepare(config(file, tokenizer="bpe"), 260, tmp_path / "cache").tokenizer.digest == only.tokenizer.digest


def test_the_cache_is_by_content(tmp_path, monkeypatch):
    folder, cache = folder_of(tmp_path / "text", 50), tmp_path / "cache"
    first = prepare(config(folder), 0, cache)
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(module, "_encode", lambda *_: pytest.fail("prepared again"))
    moved = prepare(config(tmp_path / "moved"), 0, cache)
    assert moved.fingerprint == first.fingerprint and moved.path == first.path
    assert moved.report["sources"][0]["path"] == str(tmp_path / "moved")
    monkeypatch.undo()
    changed = tmp_path / "moved" / "0003.txt"
    stat = changed.stat()
    changed.write_text(changed.read_text()[::-1])
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare(config(tmp_path / "moved"), 0, cache).fingerprint != first.fingerprint
    paths = {
        prepare(config(tmp_path / "moved", **fields), size, cache).path
        for fields, size in (
            ({}, 0),
            ({"validation_fraction": 0.2}, 0),
            ({"on_bad_text": "error"}, 0),
            ({"tokenizer": "bpe"}, 300),
            ({"tokenizer": "bpe"}, 301),
        )
    }
    assert len(paths) == 5


def test_a_damaged_cache_is_made_again(tmp_path):
    folder, cache = folder_of(tmp_path / "text", 50), tmp_path / "cache"
    first = prepare(config(folder), 0, cache)
    before = contents(first.path)
    (first.path / "train-000-00000.bin").write_bytes(b"zero")
    with pytest.raises(DataError, match="bytes where there should be"):
        open_dataset(first.path)
    assert prepare(config(folder), 0, cache).fingerprint == first.fingerprint
    assert contents(first.path) == before


def test_problems_are_in_the_report(tmp_path):
    folder, cache = folder_of(tmp_path / "text", 20), tmp_path / "cache"
    (folder / "!bad.txt").write_bytes("übe".encode() + b"caf\xe9")
    for _ in range(2):  # the second time from the cache
        report = prepare(config(folder), 0, cache).report
        assert report["n_problems"] == 1 and report["documents"] in (20, 21)
        assert report["problems"] == [
            {
                "origin": str(folder / "!bad.txt"),
                "line": 1,
                "action": "left out",
                "what": "not UTF-8 (byte 0xe9 at offset 7)",
                "kind": "not UTF-8",
            }
        ]
        assert report["notes"] == [
            f"1 document is not valid UTF-8 ({folder}/!bad.txt, line 1: not UTF-8 (byte 0xe9 at offset 7)): left out"
        ]
    replaced = prepare(config(folder, on_bad_text="replace"), 0, cache)
    assert "übecaf\ufffd" in texts(replaced, replaced.train[0][0])
    with pytest.raises(DataError, match=r"!bad\.txt, line 1: not UTF-8"):
        prepare(config(folder, on_bad_text="error"), 0, cache)
    with pytest.raises(DataError, match=r"it holds no usable text \(1 problem, such as: .*not UTF-8"):
        prepare(config(folder / "!bad.txt"), 0, cache)


class Stop(Exception):
    pass


def interrupting(after):
    calls = []

    def progress(documents, n_bytes, tokens):
        calls.append((documents, n_bytes, tokens))
        if len(calls) == after:
            raise Stop

    return progress


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 2500)
    monkeypatch.setattr(module, "SHOW_EVERY", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # against a loss of power, which is not tested
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr("kiem.data.formats.PIECE", 200)


def corpus(tmp_path):
    folder = folder_of(tmp_path / "text", 60, lambda i: f"document {i} says é\n" * (1 + i % 30))
    (tmp_path / "r.jsonl.gz").write_bytes(
        gzip.compress(
            "".join(json.dumps({"text": f"record {i}\n" * (i % 40)}) + "\n" for i in range(60)).encode(), mtime=0
        )
    )
    (tmp_path / "one.txt").write_text("".join(f"a line {i}\n" for i in range(300)))
    return config(folder, tmp_path / "r.jsonl.gz", tmp_path / "one.txt", validation_fraction=0.15)


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path, many_shards):
    data = corpus(tmp_path)
    calls = []
    undisturbed = prepare(data, 0, tmp_path / "a", progress=lambda *now: calls.append(now))
    expected = contents(undisturbed.path)
    assert len([name for name in expected if name.startswith("train-000") and name.endswith(".bin")]) > 5
    assert calls[-1] == tuple(undisturbed.report[key] for key in ("documents", "bytes", "tokens"))
    assert calls == sorted(calls)
    for after in range(1, len(calls), 31):
        cache = tmp_path / f"b{after}"
        with pytest.raises(Stop):
            prepare(data, 0, cache, progress=interrupting(after))
        [folder] = (path for path in (cache / "data").iterdir() if path.is_dir())
        with pytest.raises(DataError, match="not prepared data"):
            open_dataset(folder)
        kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
        result = prepare(data, 0, cache)
        assert contents(result.path) == expected
        again = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
        lost = [name for name in kept if name in again and again[name] != kept[name]]
        assert len(lost) <= 2, "only the shards that were being written are written again"
        shutil.rmtree(cache)


def test_a_half_written_shard_is_not_data(tmp_path, many_shards):
    data = corpus(tmp_path)
    expected = contents(prepare(data, 0, tmp_path / "a").path)
    with pytest.raises(Stop):
        prepare(data, 0, tmp_path / "b", progress=interrupting(60))
    [folder] = (path for path in (tmp_path / "b" / "data").iterdir() if path.is_dir())
    damaged = sorted(folder.glob("train-000-*.bin"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    sorted(folder.glob("note-*.json"))[0].write_text("{")
    assert contents(prepare(data, 0, tmp_path / "b").path) == expected


def test_a_full_disk_is_said_and_gone_on_from(tmp_path, many_shards, monkeypatch):
    data = corpus(tmp_path)
    expected = contents(prepare(data, 0, tmp_path / "a").path)
    close, closed = module.ShardWriter.close, []

    def full(self):
        closed.append(self.name)
        if len(closed) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder / self.name))
        return close(self)

    monkeypatch.setattr(module.ShardWriter, "close", full)
    with pytest.raises(StorageError, match=r"No space left on device.*preparing continues"):
        prepare(data, 0, tmp_path / "b")
    assert contents(prepare(data, 0, tmp_path / "b").path) == expected
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another folder"):
        prepare(data, 0, tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(tmp_path, many_shards, monkeypatch):
    data = corpus(tmp_path)
    expected = contents(prepare(data, 0, tmp_path / "a").path)
    added = []
    add = module.ShardWriter.add

    def full(self, *arguments):
        added.append(1)
        if len(added) == 50:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder / self.name))
        return add(self, *arguments)

    monkeypatch.setattr(module.ShardWriter, "add", full)
    with pytest.raises(StorageError):
        prepare(data, 0, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.tmp"))
    [folder] = (path for path in (tmp_path / "b" / "data").iterdir() if path.is_dir())
    (folder / "train-000-00077.bin.tmp").write_bytes(b"left by a process that was killed")
    other = tmp_path / "b" / "data" / "other"
    other.mkdir()
    (other / "train-000-00000.bin.tmp").write_bytes(b"of another text")
    assert contents(prepare(data, 0, tmp_path / "b").path) == expected
    assert not list((tmp_path / "b").rglob("*.tmp"))


def test_prepared_data_is_opened_though_its_text_is_gone(tmp_path):
    """A run whose text came from standard input can still be resumed and scored."""
    folder, cache = folder_of(tmp_path / "text", 50), tmp_path / "cache"
    first = prepare(config(folder), 0, cache)
    shutil.rmtree(folder)
    found = open_dataset(first.path, [None], [str(folder)])
    assert found.fingerprint == first.fingerprint and texts(found, found.validation) == texts(first, first.validation)
    assert found.report == first.report and found.proportional
    (first.path / "manifest.json").unlink()
    os.mkfifo(first.path / "manifest.json")
    with pytest.raises(DataError, match="not a regular file"):  # it is never opened
        open_dataset(first.path)


@pytest.mark.parametrize("character", ["a", " ", "\n", "漢", "ACGT", "!?"])
def test_a_long_line_takes_the_time_of_ordinary_text(tmp_path, character):
    """600,000 characters without a boundary; unbounded, merging them takes minutes."""
    rng = random.Random(0)
    several = len(character) > 1
    file = tmp_path / "a.txt"
    text = "".join(rng.choices(character, k=600_000)) if several else character * 600_000
    if character == "漢":
        text = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(200_000))
    file.write_text(text)
    began = time.process_time()
    dataset = prepare(config(file, tokenizer="bpe"), 400, tmp_path / "cache")
    assert time.process_time() - began < 20
    assert sorted("".join(texts(dataset, dataset.train[0][0]) + texts(dataset, dataset.validation))) == sorted(text)


def test_text_that_changes_meanwhile_leaves_no_data(tmp_path, many_shards):
    data = corpus(tmp_path)
    victim = tmp_path / "one.txt"

    def change(*_):
        victim.write_text("another text")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(data, 0, tmp_path / "cache", progress=change)
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    prepare(data, 0, tmp_path / "cache")


# -- other processes ---------------------------------------------------------------------------------------------------
# Scripts without a __main__ guard, as a user would write them.

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from kiem.config.run import DataConfig
from kiem.data import formats, prepare as module
options = json.loads(sys.argv[1])
if options.get("small"):
    os.fsync = lambda descriptor: None
    module.SHARD_BYTES, module.SHOW_EVERY, module.BATCH_CHARACTERS, formats.PIECE = 2500, 1, 300, 200
calls = []
def progress(*now):
    calls.append(now)
    if len(calls) == options.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
data = DataConfig.model_validate_json(json.dumps(options["data"]))
dataset = module.prepare(data, options.get("vocab_size", 0), Path(options["cache"]), progress)
assert "torch" not in sys.modules
# Not getrusage: what it says of a child begins with the memory of its parent.
status = Path("/proc/self/status")
peak = int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else None
print(json.dumps({"fingerprint": dataset.fingerprint, "peak": peak}))
"""


def start(data, cache, **options):
    options |= {"data": data.model_dump(), "cache": str(cache)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(options)], stdout=subprocess.PIPE, text=True)


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, json.loads(out) if out else None


def test_killed_it_goes_on_to_the_same_bytes(tmp_path, many_shards):
    data = corpus(tmp_path)
    expected = contents(prepare(data, 0, tmp_path / "a").path)
    for kill in (1, 40, 90):  # the same cache: killed three times
        assert finish(start(data, tmp_path / "b", small=True, kill=kill))[0] == -signal.SIGKILL
    assert contents(prepare(data, 0, tmp_path / "b").path) == expected


def test_two_processes_do_not_disturb_each_other(tmp_path, many_shards):
    data = corpus(tmp_path)
    expected = contents(prepare(data, 0, tmp_path / "a").path)
    results = [finish(process) for process in [start(data, tmp_path / "b", small=True) for _ in range(2)]]
    assert [code for code, _ in results] == [0, 0] and results[0][1]["fingerprint"] == results[1][1]["fingerprint"]
    assert contents(prepare(data, 0, tmp_path / "b").path) == expected


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for a process's peak memory")
@pytest.mark.parametrize("kind", ["text", pytest.param("jsonl", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """T17. If the text or its tokens were kept, the larger one would add at least 24 MB to about 94."""
    line = "The quick brown fox jumps over the lazy dog, and the cost of one more line is the same.\n"
    processes = []
    for megabytes in (8, 32):
        file = tmp_path / f"{megabytes}.{'txt' if kind == 'text' else 'jsonl'}"
        record = line if kind == "text" else json.dumps({"text": line * 40}) + "\n"
        with open(file, "w") as out:
            for _ in range(megabytes):
                out.write(record * (1_000_000 // len(record)))
        processes.append(start(config(file), tmp_path / "cache"))
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [0, 0]
    peaks = [result["peak"] for _, result in results]
    assert peaks[1] < 1.12 * peaks[0], peaks


def test_on_a_file_system_that_cannot_lock(tmp_path, monkeypatch):
    """One prepares at a time there too, by a marker file, and sweeps what a killed one has left."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOTSUP, "none here")

    monkeypatch.setattr(fcntl, "flock", missing)
    (tmp_path / "a.txt").write_text("some text, line by line\n" * 100)
    left = [tmp_path / "cache/data/killed" / name for name in ("x.bin.tmp", "tokenizer/.tmp-tokenizer.json-1a")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    data = DataConfig(sources=[Source(path=str(tmp_path / "a.txt"))], tokenizer="bytes")
    assert prepare(data, 257, tmp_path / "cache").report["tokens"] > 0
    assert not list((tmp_path / "cache").rglob("*.marker")) and not any(path.exists() for path in left)
