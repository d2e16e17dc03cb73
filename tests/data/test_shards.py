"""Shards: what is read is what was written, across shards, and damage of any kind is noticed."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.data import shards
from kiem.data.shards import MANIFEST, ShardWriter, Split, open_dataset, token_type, write_manifest
from kiem.data.tokenizer import bytes_tokenizer
from kiem.errors import DataError

BYTES = bytes_tokenizer()


def write_shard(folder, name, documents, continued=b"", end=False):
    """A shard of byte tokens; `continued` goes on with a document of the shard before."""
    writer = ShardWriter(folder, name, token_type(257))
    writer.add(np.frombuffer(continued, np.uint8), len(continued))
    for origin, data in documents:
        writer.start(256, origin)
        writer.add(np.frombuffer(data, np.uint8), len(data))
    if end:
        writer.start(256)
    return writer.close()


def write_dataset(folder):
    folder.mkdir(exist_ok=True)
    BYTES.save(folder / "tokenizer")
    train = [
        write_shard(folder, "train-0", [("a", b"one"), ("b", b"two")]),
        write_shard(folder, "train-1", [("c", b"three")], b"more", end=True),
    ]
    validation = [write_shard(folder, "validation-0", [("v", b"xyz")], end=True)]
    total = {"documents": 4, "bytes": 18, "tokens": 24}
    report = {
        **total,
        "sources": [{"path": "here", "files": 1, "documents": 4, "bytes": 18, "held_out": "1 of 4"}],
        "training": total,
        "validation": total,
        "tokenizer": {"lossless": True, "unknown_share": 0.0},
        "notes": [],
        "problems": [],
        "n_problems": 0,
        "problem_counts": {},
    }
    write_manifest(folder, [train], validation, BYTES, {}, report)
    return folder


def test_reading_back_by_hand(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path))
    [(split, share)] = dataset.train
    assert share == 1.0 and (split.n_tokens, split.n_documents, split.n_bytes) == (19, 3, 15)
    expected = [256, *b"one", 256, *b"two", *b"more", 256, *b"three", 256]
    assert split.tokens(0, 19).tolist() == expected and split.tokens(0, 19).dtype == np.uint16
    assert split.tokens(6, 10).tolist() == [*b"wo", *b"mo"]  # over the end of a shard
    assert split.document_starts(0, 19).tolist() == [0, 4, 12]  # the last end of text begins no document
    assert split.document_starts(4, 12).tolist() == [4] and split.document_starts(5, 12).tolist() == []
    assert split.document_names(0, 19) == ["a", "b", "c"]
    assert split.document_names(9, 11) == ["b"], "the second shard goes on with the document of the first"
    assert split.document_names(3, 5) == ["a", "b"] and split.document_names(18, 19) == ["c"]
    assert dataset.validation.tokens(0, 5).tolist() == [256, *b"xyz", 256]
    assert dataset.report["validation"]["rule"] == "here: 1 of 4"
    for bad in ((-1, 3), (3, 20), (5, 4)):
        with pytest.raises(IndexError, match="of 19"):
            split.tokens(*bad)


PARTS = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4)


@given(parts=PARTS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_range_over_any_shards(tmp_path_factory, parts, data):
    folder, ids, starts, written = tmp_path_factory.mktemp("s"), [], [], []
    for number, lengths in enumerate(parts):
        documents = [(f"{number}/{i}", bytes(range(length))) for i, length in enumerate(lengths)]
        for _, text in documents:
            starts.append(len(ids))
            ids += [256, *text]
        written.append(write_shard(folder, f"s{number}", documents))
    split = Split(folder, "s", written, token_type(257))
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert split.tokens(start, stop).tolist() == ids[start:stop]
    assert split.document_starts(start, stop).tolist() == [s for s in starts if start <= s < stop]
    ends = [*starts[1:], len(ids)] if starts else []
    touched = [a < stop and start < b for a, b in zip(starts, ends, strict=True)]
    assert len(split.document_names(start, stop)) == sum(touched) * (start < stop)


def test_an_empty_shard_between_others(tmp_path):
    """It has no files: a range that goes over it must not look for them."""
    written = [
        write_shard(tmp_path, f"s{n}", [("x", text)] if text else []) for n, text in enumerate([b"a", b"", b"b"])
    ]
    split = Split(tmp_path, "s", written, token_type(257))
    assert split.tokens(0, 4).tolist() == [256, *b"a", 256, *b"b"]
    assert split.document_starts(0, 4).tolist() == [0, 2]


def test_searching_many_documents(tmp_path):
    writer = ShardWriter(tmp_path, "s", token_type(257))
    for i in range(20_000):
        writer.start(256, str(i))
        writer.add(np.zeros(i % 3, np.uint8), 0)
    split = Split(tmp_path, "s", [writer.close()], token_type(257))
    starts = [i + i // 3 * 3 + (i % 3) * (i % 3 - 1) // 2 for i in range(20_000)]
    assert split.document_starts(0, split.n_tokens).tolist() == starts
    for i in (0, 1, 4095, 4096, 4097, 9_999, 12_345, 19_999):
        assert split.document_starts(starts[i], split.n_tokens)[0] == starts[i]
        assert split.document_names(starts[i], starts[i] + 1) == [str(i)]


def test_token_types():
    assert [token_type(size).str for size in (257, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]


def test_every_damaged_byte_is_noticed(tmp_path):
    folder = write_dataset(tmp_path / "d")
    assert open_dataset(folder).validation.n_tokens == 5
    for file in sorted(folder.iterdir()):
        if file.is_dir() or file.name == "tokenizer_config.json":
            continue
        whole = file.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            damaged = bytearray(whole)
            damaged[at] ^= 4
            file.write_bytes(damaged)
            with pytest.raises(DataError, match=file.name.replace(".", r"\.") + "|format"):
                open_dataset(folder)
        file.write_bytes(whole + b"x")
        with pytest.raises(DataError, match=r"bytes where there should be|damaged"):
            open_dataset(folder)
        file.unlink()
        with pytest.raises(DataError, match=r"missing|not prepared data"):
            open_dataset(folder)
        file.write_bytes(whole)
    assert open_dataset(folder).validation.n_tokens == 5


def test_another_tokenizer_or_format_is_refused(tmp_path):
    folder = write_dataset(tmp_path)
    body = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(body | {"format": 99}))
    with pytest.raises(DataError, match="data of format 99, this version reads format 2"):
        open_dataset(folder)
    (folder / MANIFEST).write_text(json.dumps(body))
    shards.Tokenizer(bytes_tokenizer().core, "a").save(folder / "tokenizer")
    with pytest.raises(DataError, match="not the tokenizer of this data"):
        open_dataset(folder)


def test_large_data_is_checked_in_full_on_request(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path)
    monkeypatch.setattr(shards, "VERIFY_UP_TO", 10)
    file = folder / "train-1.bin"
    file.write_bytes(b"\0" * file.stat().st_size)
    dataset = open_dataset(folder)
    with pytest.raises(DataError, match=r"damaged: train-1\.bin"):
        dataset.verify()
    file.write_bytes(b"")
    with pytest.raises(DataError, match="shorter than its manifest"):
        dataset.train[0][0].tokens(12, 14)


def test_weights(tmp_path):
    folder = write_dataset(tmp_path)
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("checksum")
    sources = [body["report"]["sources"][0] | {"path": name, "held_out": "none of it"} for name in "ab"]
    write_manifest(
        folder,
        [body["train"][0][:1], body["train"][0][1:]],
        body["validation"],
        BYTES,
        {},
        body["report"] | {"sources": sources},
    )

    def shares(weights):
        return [share for _, share in open_dataset(folder, weights).train]

    assert shares(None) == [8 / 19, 11 / 19]  # no weights: in proportion to the tokens
    assert shares([3.0, 1.0]) == [0.75, 0.25] and shares([2.0, 2.0]) == shares([1.0, 1.0]) == [0.5, 0.5]
    prints = {open_dataset(folder, weights).fingerprint for weights in (None, [3.0, 1.0])}
    assert len(prints) == 1
    with pytest.raises(DataError, match="1 weights for 2 sources"):
        open_dataset(folder, [2.0])
