"""Text while it comes: the pieces joined are the text, in whole characters, up to the first stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models

from kiem.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from kiem.generation.text import TextStream

BYTES = bytes_tokenizer()
BPE = train_bpe(["the then thin 日本語 日本 naïve café " * 4], 300)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30) | st.text(
    "ab日é😀", max_size=30
)


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, tokenizer.eot_id, stop)
    out = []
    for i in ids:
        out.append(stream.push(i))
        if stream.stopped:
            return out
    return [*out, stream.end()]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=texts)
@example("😀日é")
def test_pieces_are_whole_characters_and_make_the_text(tokenizer, text):
    out = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(max_examples=100, deadline=None)
@given(text=texts, stop=st.lists(st.text("ab日é😀", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", ["ab"])
@example("ababc", ["abc"])
def test_stop_strings(tokenizer, text, stop):
    """Nothing of a stop string is given out, wherever the borders of the tokens are."""
    out = "".join(pieces(tokenizer, tokenizer.encode(text), stop))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert out == text
        return
    first = min(ends)  # the first to be complete counts, and of several that end there the longest
    assert out == text[: min(first - len(s) for s in stop if text[:first].endswith(s))]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=12))
def test_bytes_that_are_not_text_become_replacement_characters(data):
    """At most an unfinished end is missing from what the decoder says of all bytes at once."""
    out, whole = "".join(pieces(BYTES, data)), data.decode(errors="replace")
    assert whole.startswith(out) and whole[len(out) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)


def test_a_character_comes_with_its_last_byte():
    assert pieces(BYTES, "a日b".encode()) == ["a", "", "", "日", "b", ""]


def test_the_beginning_of_a_stop_string_waits():
    assert pieces(BYTES, b"xEND", ["END."]) == ["x", "", "", "", "END"]
    assert pieces(BYTES, b"xEENDyz", ["END"]) == ["x", "", "E", "", ""]


def test_an_unfinished_character_at_the_end_is_left_out():
    assert "".join(pieces(BYTES, "a日".encode()[:-1])) == "a"


def test_a_decoder_that_writes_each_byte_of_a_character_by_itself():
    """Llama's: byte tokens, a space as ▁, and the first space of a text dropped."""
    vocabulary = {"</s>": 0, "▁a": 1, "▁b": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    core = Core(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(core)
    ids = [1, 2, *(3 + b for b in "日".encode()), 1]
    assert pieces(tokenizer, ids) == [" a", " b", "", "", "日", " a", ""]
