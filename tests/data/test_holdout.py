"""What is held out: a fair sample of all the text, copies together, by nothing but the text and the configuration."""

import json
import random

import pytest
from corpora import config, contents, folder_of, texts

from kiem.config.run import Source
from kiem.data import holdout
from kiem.data.formats import Rule
from kiem.data.holdout import cuts, scan_sources
from kiem.data.prepare import prepare
from kiem.data.sources import list_items

WORDS = [
    f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "ei", "o", "u") for c in ("ld", "nt", "rk", "s", "th", "v")
]


def prose(seed, lines, words=10):
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=words)) + "\n" for _ in range(lines))


def split(data, cache):
    dataset = prepare(data, 0, cache)
    return dataset, texts(dataset, dataset.train[0][0]), texts(dataset, dataset.validation)


def test_of_many_documents_whole_ones_are_held_out_by_their_text(tmp_path):
    folder = folder_of(tmp_path / "text", 300, lambda i: prose(i, 1 + i % 5))
    (folder / "copy.txt").write_text((folder / "0007.txt").read_text())
    data = config(folder, validation_fraction=0.1)
    dataset, train, held = split(data, tmp_path / "cache")
    written = [file.read_text() for file in sorted(folder.iterdir())]
    assert sorted(train + held) == sorted(written) and train == [text for text in written if text not in held]
    assert 12 <= len(held) <= 50 and not set(train) & set(held)
    report = dataset.report
    assert (report["documents"], report["n_problems"]) == (301, 0)
    assert report["bytes"] == sum(map(len, written)) and report["tokens"] == report["bytes"] + 301 + 2
    assert report["validation"]["rule"] == (
        f"{folder}: {len(held)} of 301 documents, by a hash of their text; copies and near copies together"
    )
    # neither other documents, nor their names or order, nor a second source move a document to the other side
    other = folder_of(tmp_path / "other", 0)
    for number, text in enumerate(reversed(written)):
        (other / f"x{number:03d}.txt").write_text(text)
    more = folder_of(tmp_path / "more", 200, lambda i: prose(1000 + i, 2))
    second = prepare(config(more, other, validation_fraction=0.1), 0, tmp_path / "cache")
    assert set(held) == set(texts(second, second.validation)) & set(written)


@pytest.mark.parametrize("count", [57, 300, 2000])
def test_copies_and_near_copies_are_never_parted(tmp_path, count):
    """Among few documents as among many: each is there three times, once with another word in it."""
    folder = folder_of(tmp_path / "text", 0)
    for i in range(count // 3):
        text = prose(i, 12)
        for name, copy in (("a", text), ("b", text), ("c", text.replace(text.split()[40], "replaced", 1))):
            (folder / f"{name}{i:04d}.txt").write_text(copy)
    _, train, held = split(config(folder, validation_fraction=0.05), tmp_path / "cache")
    kept = {line for document in train for line in document.splitlines()}
    lines = [line for document in held for line in document.splitlines()]
    assert len(lines) > 20
    shared = [line for line in lines if line in kept]
    # Of a passage of a near copy only what is not in the original's passage may stay.
    assert len(shared) == 0


def test_a_shifted_copy_of_a_file_is_never_parted_either(tmp_path):
    folder = folder_of(tmp_path / "text", 0)
    text = prose(1, 900)
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(prose(2, 30) + text[: len(text) // 2] + prose(3, 7) + text[len(text) // 2 :])
    (folder / "c.txt").write_text(prose(4, 900))
    dataset, train, held = split(config(folder), tmp_path / "cache")
    assert "copies and near copies together" in dataset.report["validation"]["rule"]
    kept = {line for document in train for line in document.splitlines()}
    lines = [line for document in held for line in document.splitlines()]
    # Cut places are the same again within a block or two after an insertion.
    assert sum(line in kept for line in lines) <= 0.05 * len(lines)


def test_of_a_small_folder_passages_of_all_of_it_are_held_out(tmp_path):
    """57 notes of four kinds: each kind has its share of the held-out text, not only the last in the alphabet."""
    folder = folder_of(tmp_path / "notes", 0)
    for i in range(57):
        kind = "abcd"[i * 4 // 57]
        (folder / f"{kind}{i:02d}.txt").write_text("".join(f"{kind}: {line}\n" for line in prose(i, 40).splitlines()))
    dataset, train, held = split(config(folder), tmp_path / "cache")
    total = sum(file.stat().st_size for file in folder.iterdir())
    size = sum(map(len, held))
    assert sum(map(len, train)) + size == total and 0.8 * total / 10 < size < 1.3 * total / 10
    assert all(text.endswith("\n") for text in train + held), "passages are whole lines"
    lines = [line for text in held for line in text.splitlines()]
    for kind in "abcd":
        assert 0.1 < sum(line.startswith(kind) for line in lines) / len(lines) < 0.45
    rule = f"{len(held)} passages spread over all of it, {size:,} of {total:,} bytes; copies and near copies together"
    assert dataset.report["validation"]["rule"] == f"{folder}: {rule}"
    assert dataset.report["documents"] == 57 and dataset.report["sources"][0]["documents"] == 57


def test_one_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(prose(0, 4000))
    dataset, train, held = split(config(tmp_path / "a.txt"), tmp_path / "cache")
    assert dataset.report["documents"] == 1 and len(held) > 5 and len(train) > 5
    assert dataset.validation.document_names(0, 5) == [str(tmp_path / "a.txt")]
    text = (tmp_path / "a.txt").read_text()
    assert sorted("".join(train + held).splitlines()) == sorted(text.splitlines())
    at = [text.index(passage) / len(text) for passage in held]
    assert at == sorted(at) and at[0] < 0.2 and at[-1] > 0.8


def test_rows_of_a_table_are_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [prose(i, 3) for i in range(400)]}), tmp_path / "a.parquet")
    assert prepare(config(tmp_path / "a.parquet"), 0, tmp_path / "cache").report["documents"] == 400


@pytest.mark.parametrize("text", ["no line end at all " * 500, "ünïcödé" * 400, "\n" * 3000, "ab", "one line\n" * 2000])
def test_texts_without_lines_or_of_equal_lines_are_divided_too(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    dataset, train, held = split(config(tmp_path / "a.txt"), tmp_path / "cache")
    assert sorted("".join(train + held)) == sorted(text) and train and held
    repeats = "the text repeats itself, so the training text holds copies of them"
    assert (repeats in dataset.report["validation"]["rule"]) == (len(text) > 2)


def test_large_groups_of_copies_do_not_become_the_held_out_text(tmp_path):
    folder = folder_of(tmp_path / "text", 200, lambda i: prose(i // 150, 30))
    _, train, held = split(config(folder), tmp_path / "cache")
    size, total = sum(map(len, held)), sum(file.stat().st_size for file in folder.iterdir())
    assert 0 < size < 0.3 * total and train


def test_blocks_of_pieces(tmp_path, monkeypatch):
    """A document that is read in pieces is cut as it would be alone, and an interrupted pass finds the same."""
    monkeypatch.setattr("kiem.data.formats.PIECE", 3000)
    (tmp_path / "a.txt").write_text(prose(0, 400))
    dataset, train, held = split(config(tmp_path / "a.txt"), tmp_path / "cache")
    assert sorted("".join(train + held).splitlines()) == sorted(prose(0, 400).splitlines())
    again = prepare(config(tmp_path / "a.txt"), 0, tmp_path / "other")
    assert contents(again.path) == contents(dataset.path)


def test_too_many_documents_for_near_copies_are_still_divided_by_their_text(tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "MOST_SKETCHES", 100)
    folder = folder_of(tmp_path / "text", 300, lambda i: prose(i % 290, 3))
    dataset, train, held = split(config(folder, validation_fraction=0.1), tmp_path / "cache")
    assert 12 <= len(held) <= 50 and not set(train) & set(held) and len(train) + len(held) == 300
    assert "too many documents to look for near copies" in dataset.report["validation"]["rule"]
    assert dataset.report["validation"]["documents"] == len(held)


def test_cuts_depend_on_the_lines_there():
    data = prose(0, 500).encode()
    ends = cuts(data, 600)
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == len(data) and all(300 <= size <= 900 for size in sizes)
    assert all(data[end - 1 : end] == b"\n" for end in ends)
    shifted = cuts(prose(9, 7).encode() + data, 600)
    moved = len(prose(9, 7))
    assert len(set(ends) & {end - moved for end in shifted}) > 0.9 * len(ends)
    assert cuts(b"", 10) == [0] and cuts("é".encode() * 40, 7)[-1] == 80
    assert all("é".encode() * 40 for end in cuts("é".encode() * 40, 7) if end % 2 == 0)


def test_the_sample_is_bounded_even_and_the_same_in_any_order(tmp_path):
    folder = folder_of(tmp_path / "text", 200)
    items = list_items(Source(path=str(folder)))

    def sampled(items):
        sample = holdout.Sample(limit=3000)
        scans = scan_sources([(items, "text")], Rule("error", print), ["none"], 0.1, sample)
        return list(sample.training_texts(scans))

    chosen = sampled(items)
    assert sampled(items[::-1]) == chosen and 2500 < sum(map(len, chosen)) <= 3000
    numbers = sorted(int(text.split()[1]) for text in chosen)
    assert numbers[0] < 40 and numbers[-1] > 160


def test_the_tokenizer_never_sees_a_held_out_passage(tmp_path):
    """Every line has a word of its own, which is one token only where the tokenizer was trained on it."""
    letters = "bcdfghjklmnpqrstvwxz"
    words = [f"{letters[i % 20]}a{letters[i // 20]}uqe" * 2 for i in range(400)]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "".join((f" {word}" * 40) + "\n" for word in words)}))
    dataset = prepare(config(file, tokenizer="bpe", validation_fraction=0.1), 4000, tmp_path / "cache")
    train, held = texts(dataset, dataset.train[0][0]), texts(dataset, dataset.validation)

    def known(documents):
        lines = [line for text in documents for line in text.splitlines()]
        return len(lines), sum(len(dataset.tokenizer.encode(" " + line.split()[0])) == 1 for line in lines)

    count, one_token = known(train)
    assert one_token == count > 300
    count, one_token = known(held)
    assert one_token == 0 < count
