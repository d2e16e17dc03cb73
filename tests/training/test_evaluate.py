"""Held-out loss: in bytes of the text, whatever part of it is taken; withheld where the tokenizer loses text."""

import math
from dataclasses import replace

import pytest

import kiem
from kiem.config.model import ModelConfig
from kiem.data.tokenizer import bytes_tokenizer
from kiem.errors import DataError
from kiem.generation.engine import LanguageModel
from kiem.model.transformer import Transformer
from kiem.training.evaluate import evaluate

CONFIG = ModelConfig(vocab_size=300, context_length=16, emb_dim=16, n_heads=2, n_layers=1)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"Line {i} is 漢字 number {i * i}\n" for i in range(3000)))
    return kiem.prepare({"data": {"tokenizer": "bytes"}}, data=tmp_path / "text.txt")


def test_the_bytes_are_those_of_the_text(dataset):
    model = Transformer(CONFIG).initialize(0)
    whole = evaluate(model, dataset, 64)
    assert (whole.part, whole.bytes) == ("whole", dataset.validation.n_bytes)
    assert whole.bits_per_byte == pytest.approx(whole.loss * whole.tokens / math.log(2) / whole.bytes)
    sample = evaluate(model, dataset, 64, max_tokens=128)
    assert sample.part == "sample" and 0 < sample.tokens <= 128
    again = evaluate(model, dataset, 32, max_tokens=128)
    assert (again.loss, again.tokens, again.bytes) == (pytest.approx(sample.loss), sample.tokens, sample.bytes)


def test_bits_per_byte_of_a_lossy_tokenizer_are_withheld(dataset):
    lossy = replace(dataset, report=dataset.report | {"tokenizer": {"lossless": False, "unknown_share": 0.2}})
    found = evaluate(Transformer(CONFIG).initialize(0), lossy, 64)
    assert found.bits_per_byte is None and math.isfinite(found.loss)


def test_a_score_is_withheld_where_the_text_does_not_come_back(monkeypatch):
    model = LanguageModel(Transformer(CONFIG).initialize(0), bytes_tokenizer())
    found = model.score("Some Text")
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / 9)
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda self, ids: "some text")
    assert model.score("Some Text")["bits_per_byte"] is None


def test_without_held_out_text_it_says_what_to_set(dataset):
    with pytest.raises(DataError, match=r"set data\.validation"):
        evaluate(Transformer(CONFIG).initialize(0), replace(dataset, validation=None), 64)
