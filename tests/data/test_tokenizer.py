"""Tokenizers: exact round trips, stable ids, files that transformers reads, clear words for what cannot be encoded."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.run import DataConfig, Source
from kiem.data.bounds import bounded
from kiem.data.foreign import bytes_of_tokens, measure
from kiem.data.loader import validation_batches
from kiem.data.prepare import prepare
from kiem.data.tokenizer import EOT, Tokenizer, _byte_alphabet, bytes_tokenizer, chars_tokenizer, train_bpe
from kiem.data.trial import LONGEST_WAIT, try_out
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


# -- tokenizers of others ----------------------------------------------------------------------------------------------


def foreign(path, core, **changes):
    """A tokenizer.json made with the library, then changed."""
    spec = json.loads(core.to_str())
    spec["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(spec | changes))
    return path


def wordpiece(lowercase=False):
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = ["[UNK]", "the", "cat", "##s", "sat", "on", "mat", ".", ",", "##é"]
    core = Core(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    return core


def sentencepiece():
    """As SentencePiece's: words begin with the mark of a space, and bytes stand for what is unknown."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁cat", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    core = Core(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


@pytest.mark.parametrize("text", ["the cats sat on the mat, the é 漢 x.", "the\n the\t the ", "", "é漢🙂", "  the"])
@pytest.mark.parametrize("make", [wordpiece, sentencepiece], ids=["wordpiece", "sentencepiece"])
def test_the_bytes_of_tokens_add_up_to_the_text(make, text):
    """Single decoded ids say too little: the space before a word belongs to it."""
    tokenizer = Tokenizer(make())
    ids, spans = tokenizer.encode_with_spans(text)
    sizes = bytes_of_tokens(text, spans)
    assert not tokenizer.exact and ids.tolist() == tokenizer.encode(text) and (sizes >= 0).all()
    assert sizes.sum() == (len(text.encode()) if len(ids) else 0)


def test_what_a_tokenizer_loses_is_measured():
    loss = measure(Tokenizer(wordpiece()), ["the cats sat on the mat, the 漢字"])
    assert not loss.lossless and loss.unknown_share == pytest.approx(6 / 35)
    assert "17 % of it is unknown" in loss.describe() and "bits per byte cannot be compared" in loss.describe()
    loss = measure(Tokenizer(wordpiece(lowercase=True)), ["the CAT sat"])
    assert not loss.lossless and loss.unknown_share == 0 and loss.example == ("the CAT sat", "the cat sat")
    assert measure(Tokenizer(sentencepiece()), ["the cat, é\n"]).lossless
    with pytest.raises(DataError, match="does not know 89 % of the text"):
        measure(Tokenizer(wordpiece()), ["nothing known here"])


def test_characters_that_vanish_are_counted():
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models

    core = Core(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    core.decoder = decoders.Fuse()
    assert measure(Tokenizer(core), ["abcabab"]).unknown_share == pytest.approx(1 / 7)


def test_a_lossy_tokenizer_is_said_and_its_bytes_are_those_of_the_text(tmp_path):
    text = "".join(f"the cats sat on the mat, the cat sat {'on ' * (i % 7)}the é.\n" for i in range(300))
    (tmp_path / "t.txt").write_text(text)
    file = foreign(tmp_path / "w.json", wordpiece())
    data = DataConfig(sources=[Source(path=str(tmp_path / "t.txt"))], tokenizer=str(file))
    dataset = prepare(data, 0, tmp_path / "cache")
    assert not dataset.lossless and 0 < dataset.unknown_share < 0.1
    assert any("the tokenizer loses text" in note for note in dataset.report["notes"])
    held = dataset.validation
    assert held.text_bytes(0, held.n_tokens) == held.n_bytes == dataset.report["validation"]["bytes"]
    counts = [held.text_bytes(i, i + 1) for i in range(held.n_tokens)]
    assert sum(counts) == held.n_bytes and max(counts) < 10
    batches = list(validation_batches(held, 16, 4))
    assert sum(batch.target_bytes() for batch in batches) == held.n_bytes
    again = prepare(data, 0, tmp_path / "cache")
    assert (again.lossless, again.unknown_share) == (False, dataset.unknown_share)


BAD_TOKENIZERS = {
    "dropout": (lambda p: foreign(p, BPE.core, model={"dropout": 0.1}), "BPE dropout"),
    "no vocabulary": (lambda p: foreign(p, wordpiece(), model={"vocab": {}}, added_tokens=[]), ""),
    "no unknown token": (lambda p: foreign(p, wordpiece(), model={"unk_token": "[MISSING]"}), "MISSING|UNK"),
    "ids far apart": (lambda p: foreign(p, wordpiece(), model={"vocab": {"[UNK]": 0, "a": 9_000_000}}), "ids"),
    "an id of 2^31": (lambda p: foreign(p, wordpiece(), model={"vocab": {"[UNK]": 0, "a": 2**31}}), "ids"),
    "an added token of id 2^31": (
        lambda p: foreign(p, wordpiece(), added_tokens=[{"id": 2**31, "content": "x", "special": True}]),
        "ids",
    ),
    "a costly regex": (
        lambda p: foreign(
            p,
            BPE.core,
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        ),
        "",
    ),
    "a broken normalizer": (
        lambda p: foreign(p, wordpiece(), normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/wAA"}),
        "",
    ),
    "100,000 brackets": (lambda p: p.write_text("[" * 100_000), "not a Hugging Face tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused_in_words(tmp_path, name):
    """It ends in a message, not in an abort, a hang or a traceback."""
    make, says = BAD_TOKENIZERS[name]
    file = tmp_path / "bad.json"
    make(file)
    if name == "a costly regex":  # the library may bound it itself
        try:
            Tokenizer.load(file)
        except DataError as error:
            assert "bad.json" in str(error)
        return
    with pytest.raises(DataError, match=rf"bad\.json.*({says})"):
        Tokenizer.load(file)


def test_a_vocab_json_of_giant_ids_is_refused_before_the_library_has_it(tmp_path, monkeypatch):
    """It would take memory for every id below."""
    vocabulary = {c: b for b, c in enumerate(_byte_alphabet())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 2**31}))
    (tmp_path / "merges.txt").write_text("a b\n")
    monkeypatch.setattr("kiem.data.tokenizer._byte_level_core", lambda *_: pytest.fail("the library has it"))
    with pytest.raises(DataError, match=r"ids go up to 2,147,483,648, for 257 entries"):
        Tokenizer.load(tmp_path)


@pytest.mark.slow
def test_a_tokenizer_that_takes_too_long_is_given_up(tmp_path):
    """The trial has limits of its own, whatever was found by reading the file."""
    file = foreign(tmp_path / "bad.json", wordpiece(), model={"vocab": {"[UNK]": 0, "a": 2**31}})
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"bad\.json: (loading it .* takes more than|the tokenizers library aborts)"):
        try_out(file)
    assert time.perf_counter() - start < LONGEST_WAIT + 5


def test_an_end_of_text_that_is_no_token(tmp_path):
    BPE.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": ["a", "b"]}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: eos_token is list"):
        Tokenizer.load(tmp_path)
    config.write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        Tokenizer.load(tmp_path)
    config.write_text(json.dumps({"eos_token": "<|gone|>"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eot == EOT and "'<|gone|>'" in tokenizer.notes[0] and "is used" in tokenizer.notes[0]


def test_long_runs_are_cut_the_same_in_training_and_encoding():
    text = "word " + "a" * 1000 + " " * 700 + "!" * 300 + "b" * 256 + " 漢" * 400 + "漢" * 600 + "end"
    parts = bounded(text)
    assert "".join(parts) == text and [len(part) for part in parts[1:4]] == [256, 256, 232 + 256]
    assert bounded("a" * 256) == ["a" * 256] and bounded("ordinary text. " * 5000) == ["ordinary text. " * 5000]
    assert BPE.decode(BPE.encode(text)) == text
    assert train_bpe([text], 300).digest == train_bpe(parts, 300).digest
