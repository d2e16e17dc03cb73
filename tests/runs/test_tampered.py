"""Prepared data that somebody changed, with right checksums, and a run without its tokenizer: what is said is true, and
what is advised works."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from small_run import FIRST

from kiem.data import shards

LONGER = ["train", "run", "tokens=1920", "-q"]
OTHER = [*FIRST[:5], "--out", "other", *FIRST[7:]]  # a new run on the same tokens


def tokens_of(place):
    """The one prepared data set of the cache."""
    (folder,) = (path for path in (place / "cache/data").iterdir() if path.is_dir())
    return folder


def tamper(folder, suffix, change):
    """Change the files of a kind, and make the manifest say what they are now."""
    manifest = folder / shards.MANIFEST
    body = json.loads(manifest.read_text())
    body.pop("checksum")
    for shard in (shard for source in [*body["train"], body["validation"]] for shard in source):
        file = folder / f"{shard['name']}.{suffix}"
        file.write_bytes(change(file.read_bytes()))
        shard["files"][file.name] = {"bytes": file.stat().st_size, "sha256": shards._sha256(file)}
    manifest.write_text(json.dumps(body | {"checksum": shards._checksum(body)}))


def other_letters(data):
    return data.replace(b"q\0", b"z\0")


def beyond_the_vocabulary(data):
    return np.full(len(data) // 2, 60_000, "<u2").tobytes()


def score(kiem, *words):
    code, out, err = kiem("eval", *words, "--json")
    assert code == 0, err
    return json.loads(out)["loss"], err


def test_tokens_that_are_not_the_runs_though_its_text_is(kiem, own_run, place):
    """Nobody is told to bring back a text that is there. What is said helps: without the folder, all is as before."""
    before, _ = score(kiem, "run")
    tamper(tokens_of(place), "bin", other_letters)
    code, _, err = kiem(*LONGER)
    assert code == 3 and "its text has not changed" in err and "ring the text back" not in err
    changed, said = score(kiem, "run")
    assert changed != before and "its text has not changed" in said and "text as it is now" not in said
    assert [Path(path) for path in re.findall(r"Delete (\S+):", err + said)] == [tokens_of(place)] * 2
    shutil.rmtree(tokens_of(place))
    assert score(kiem, "run") == (before, "")
    assert kiem(*LONGER)[0] == 0


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("what", ["text", "tokens"])
def test_the_fork_that_is_advised_where_the_tokens_are_others(kiem, place, what, tokenizer):
    """It is trained on what is there now, with the tokenizer of the run, and is a run like any other: resumed and
    scored without a word."""
    tiny = [word for word in FIRST if "vocab_size" not in word and "data.tokenizer" not in word]
    code, _, err = kiem(*tiny, f"data.tokenizer={tokenizer}")
    assert code == 0, err
    if what == "text":  # with fewer characters
        (place / "text.txt").write_text((place / "text.txt").read_text().replace("quick", "slow"))
        shutil.rmtree(place / "cache")
    else:
        tamper(tokens_of(place), "bin", lambda data: data[200:] + data[:200])
    code, _, err = kiem(*LONGER)
    assert code == 3
    command = shlex.split(err[err.index("kiem train run --fork") :])[1:]
    code, _, err = kiem(*command, "-q")
    assert code == 0 and "It may have been trained on what is held out" in err, err
    assert score(kiem, "run-2")[1] == ""
    code, _, err = kiem("train", "run-2", "tokens=1920", "-q")
    assert code == 0 and "warning" not in err, err
    assert (place / "run-2/tokenizer/tokenizer.json").read_bytes() == (
        place / "run/tokenizer/tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("words", [LONGER, ["eval", "run"], OTHER], ids=["resume", "eval", "another run"])
def test_ids_beyond_the_vocabulary_are_one_message(kiem, own_run, place, words):
    tamper(tokens_of(place), "bin", beyond_the_vocabulary)
    code, _, err = kiem(*words)
    assert code == 3 and f"Delete {tokens_of(place)}" in err
    if words != LONGER:  # what is resumed is refused before it is read: they are not its tokens
        assert "60000" in err and "257 entries" in err
    shutil.rmtree(tokens_of(place))
    code, _, err = kiem(*words)
    assert code == 0, err


@pytest.mark.parametrize(
    "change",
    [
        lambda data: np.full(len(data) // 4, 2**32 - 1, "<u4").tobytes(),
        lambda data: np.arange(len(data) // 4, dtype="<u4")[::-1].tobytes(),
        lambda data: (np.arange(len(data) // 4, dtype="<u4")[::-1] * 300).tobytes(),
    ],
    ids=["beyond the end", "in no order", "far from order"],
)
def test_documents_that_begin_anywhere(kiem, place, change):
    (place / "docs.jsonl").write_text(
        "".join(json.dumps({"text": f"fox {i} jumps over {i}"}) + "\n" for i in range(400))
    )
    words = [word.replace("text.txt", "docs.jsonl") for word in FIRST]
    assert kiem(*words)[0] == 0
    tamper(tokens_of(place), "docs", change)
    for command in (["eval", "run"], [word if word != "run" else "other" for word in words]):
        code, _, err = kiem(*command)
        assert code in (0, 3), err
    split = shards.open_dataset(tokens_of(place)).train[0][0]
    for start in range(0, split.n_tokens - 64, 64):
        assert all(start <= place < start + 64 for place in split.document_starts(start, start + 64))
        assert split.document_names(start, start + 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"x" * 10,
        lambda _: zstandard.compress(b""),
        lambda _: zstandard.compress(bytes(1 << 29)),
    ],
    ids=["no zstd", "none", "giant"],
)
def test_names_of_documents_that_cannot_be_read(own_run, place, change):
    """They are wanted for messages about something else, which they do not replace."""
    tamper(tokens_of(place), "names.zst", change)
    split = shards.open_dataset(tokens_of(place), names=["text.txt"]).train[0][0]
    assert split.document_names(64, 128) == ["tokens 64 to 128 of source text.txt"]


@pytest.mark.parametrize("words", [["generate", "run", "--max-tokens", "3"], ["eval", "run"]], ids=["generate", "eval"])
@pytest.mark.parametrize("cached", [True, False], ids=["with the cache", "without it"])
def test_a_run_without_its_tokenizer(kiem, own_run, place, words, cached):
    before = (own_run / "tokenizer" / "tokenizer.json").read_bytes()
    shutil.rmtree(own_run / "tokenizer")
    if not cached:
        shutil.rmtree(place / "cache")
    code, _, err = kiem(*words)
    assert code == 4 and "run/tokenizer" in err and "missing" in err
    assert "Use bpe" not in err  # that is for a tokenizer that was chosen
    command = err[err.index("kiem train") :].split("\n")[0]
    code, _, said = kiem(*shlex.split(command)[1:])
    assert code == 0, said
    assert (own_run / "tokenizer" / "tokenizer.json").read_bytes() == before
    assert kiem(*words)[0] == 0
