"""Tokenizers: exact round trips, stable ids, files that transformers reads, clear words for what cannot be encoded."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.data.tokenizer import EOT, Tokenizer, _byte_alphabet, bytes_tokenizer, chars_tokenizer, train_bpe
from kiem.errors import DataError

TEXTS = ["def f(x):\n    return x + 12345\n", "The cat's hat, 2026.\r\n\r\n\tÜber straße 東京 🙂\n"] * 20
BPE = train_bpe(TEXTS, 400)
BYTES = bytes_tokenizer()
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [EOT, f"a{EOT}b", "  \n\t x", "'ll\r\n", "\x00", "a" * 500]
)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids  # not even where the text spells it
    assert sum(tokenizer.token_bytes[ids]) == len(text.encode())


def test_bpe_vocabulary():
    assert (BPE.eot_id, BPE.eot) == (0, EOT) and BPE.decode([0]) == EOT
    assert BPE.vocab_size <= 400 and BPE.token_bytes[0] == 0
    assert len(BPE.encode("def f(x):\n    return")) < 10
    pieces = [BPE.decode([i]) for i in BPE.encode("1234567")]
    assert max(map(len, pieces)) <= 3, "digits are grouped in threes at most"
    assert train_bpe(TEXTS, 400).digest == BPE.digest
    assert train_bpe(TEXTS, 300).vocab_size == 300 and train_bpe(TEXTS, 300).digest != BPE.digest
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(TEXTS, 100)


def test_indentation_is_one_token():
    code = ["class A:\n    def f(self):\n        if x:\n            return self.x\n"] * 50
    tokenizer = train_bpe(code, 500)
    assert "       " in [tokenizer.decode([i]) for i in tokenizer.encode("\n        return")]


def test_bytes_are_themselves():
    assert BYTES.encode("aé") == [97, 0xC3, 0xA9] and BYTES.vocab_size == 257 and BYTES.eot_id == 256
    plain = BYTES.core.encode("aé\n x", add_special_tokens=False).ids  # the library's slow way
    assert plain == BYTES.encode("aé\n x")


def test_chars():
    tokenizer = chars_tokenizer(["hello", "é\n"])
    assert tokenizer.vocab_size == 7 and tokenizer.encode("\nehloé") == [0, 1, 2, 3, 4, 5]
    assert tokenizer.decode([2, 3, 6]) == f"hl{EOT}" and tokenizer.token_bytes.tolist() == [1, 1, 1, 1, 1, 2, 0]
    with pytest.raises(DataError, match=r"'z' \(U\+007A, character 2 of the text; 2 unknown in all\).*bpe or bytes"):
        tokenizer.encode("hezy")
    with pytest.raises(DataError, match="needs text"):
        chars_tokenizer([])


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, chars_tokenizer(TEXTS)], ids=["bpe", "bytes", "chars"])
def test_saved_loaded_and_read_by_transformers(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    text = TEXTS[0] + TEXTS[1]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest and loaded.encode(text) == tokenizer.encode(text)
    assert Tokenizer.load(tmp_path / "tokenizer.json").eot_id == tokenizer.eot_id
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot_id


def gpt2_files(folder, extra=(EOT,)):
    """A small tokenizer in GPT-2's two files."""
    tokens = [*_byte_alphabet(), "he", "Ġt", *extra]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ t\n")
    return folder


def test_gpt2_files(tmp_path):
    tokenizer = Tokenizer.load(gpt2_files(tmp_path / "gpt2"))
    assert tokenizer.encode("he the") == [256, 257, 256] and tokenizer.decode([256, 257]) == "he t"
    assert tokenizer.eot_id == 258 and tokenizer.vocab_size == 259
    assert EOT not in [tokenizer.decode([i]) for i in tokenizer.encode(EOT)]


@pytest.mark.parametrize(
    ("extra", "stated", "eot", "size"),
    [
        (["</s>"], None, "</s>", 259),
        (["<|im_end|>", "</s>"], "<|im_end|>", "<|im_end|>", 260),
        (["<|im_end|>"], {"content": "<|im_end|>"}, "<|im_end|>", 259),
        ([], None, EOT, 259),
    ],
)
def test_the_end_of_text_is_found_or_added(tmp_path, extra, stated, eot, size):
    folder = gpt2_files(tmp_path, extra)
    if stated:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated}))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eot, tokenizer.vocab_size) == (eot, size)
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").digest == tokenizer.digest


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"does not exist.*Use bpe, bytes, chars"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has neither"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder = gpt2_files(tmp_path / "g")
    (folder / "merges.txt").write_text("#version\nx y z w\n")
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt do not make"):
        Tokenizer.load(folder)
    (folder / "merges.txt").write_text("")
    (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(DataError, match="254 of 256 bytes"):
        Tokenizer.load(folder)
    with pytest.raises(DataError, match="token id 257 is not in the vocabulary of 257"):
        BYTES.decode([1, 257])


def test_batches_equal_single_texts():
    texts = [*TEXTS[:2], "", "x"]
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]
    assert [ids.dtype for ids in BPE.encode_arrays(texts)] == [np.uint32] * 4
