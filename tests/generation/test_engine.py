"""The language model as a person uses it: prompts, stops, streams, scores, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from kiem.config.model import ModelConfig
from kiem.config.read import read_config, write_config
from kiem.data.tokenizer import bytes_tokenizer
from kiem.errors import CheckpointError, ConfigError
from kiem.generation import engine
from kiem.generation.engine import LanguageModel, load
from kiem.model.transformer import Transformer
from kiem.runs import checkpoint
from kiem.runs.run import Run

TOKENIZER = bytes_tokenizer()
EOT = TOKENIZER.eot_id
PROMPTS = ["", "héllo", "x" * 20, "日"]


def random_model(context_length: int = 24, drop_rate: float = 0.0) -> LanguageModel:
    config = ModelConfig(
        vocab_size=260,
        context_length=context_length,
        emb_dim=24,
        n_heads=4,
        n_layers=2,
        drop_rate=drop_rate,
        n_kv_heads=2,
        norm="rmsnorm",
        activation="swiglu",
        position="rope",
        qk_norm=True,
        bias=False,
    )
    model = Transformer(config).initialize(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return LanguageModel(model, TOKENIZER)


def scripted_model(text: str | bytes, context_length: int = 64) -> LanguageModel:
    """A model that says `text` and then the end of text: what it says next depends on the position alone."""
    script = [*(text.encode() if isinstance(text, str) else text), *[EOT] * context_length][:context_length]
    config = ModelConfig(
        vocab_size=257,
        context_length=context_length,
        emb_dim=context_length,
        n_heads=1,
        n_layers=1,
        tie_embeddings=False,
    )
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.final_norm.weight.fill_(1.0)
        model.pos_emb.weight.copy_(torch.eye(context_length))
        model.head.weight[script, torch.arange(context_length)] = 1.0
    return LanguageModel(model, TOKENIZER)


def test_one_prompt_gives_a_text_and_a_list_gives_a_list():
    model = scripted_model("hello")
    assert model.generate(temperature=0) == "hello"
    assert model.generate("he", temperature=0) == "llo"
    assert model.generate(["", "hell"], temperature=0) == ["hello", "o"]
    assert model.generate([], temperature=0) == []
    assert model.generate("", temperature=0, n=2) == ["hello", "hello"]
    assert model.generate(["", "hel"], temperature=0, n=2) == ["hello", "hello", "lo", "lo"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 3}, "say"),
        ({"stop": "now"}, "say stop "),
        ({"stop": ["zzz", " now", "stop now "]}, "say stop"),
        ({"stop": "say"}, ""),
        ({"stop": "é."}, "say stop now "),
        ({"stop": ["é.!"]}, "say stop now é."),
        ({"max_tokens": 14}, "say stop now "),  # half an é
        ({"max_tokens": 15, "stop": "é."}, "say stop now é"),
    ],
)
def test_ends(options, text):
    model = scripted_model("say stop now é.")
    assert model.generate(temperature=0, **options) == text
    assert "".join(model.stream(temperature=0, **options)) == text


def test_stream_gives_pieces_as_they_come():
    assert list(scripted_model("aé日").stream(temperature=0)) == ["a", "é", "日"]
    stream = scripted_model("ab").stream(temperature=0)
    assert next(stream) == "a"
    stream.close()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
)
def test_a_batch_gives_what_each_prompt_gives_alone(options):
    """Past the context too: 24 tokens, of which 100 are asked for."""
    model = random_model()
    together = model.generate(PROMPTS, max_tokens=100, **options)
    assert together == [model.generate(prompt, max_tokens=100, **options) for prompt in PROMPTS]
    assert together == ["".join(model.stream(prompt, max_tokens=100, **options)) for prompt in PROMPTS]


def test_batches_that_do_not_fit_in_memory_together(monkeypatch):
    model = random_model()
    together = model.generate(PROMPTS, max_tokens=10, seed=3, n=2)
    monkeypatch.setattr(engine, "CACHE_BYTES", 1)
    assert model.generate(PROMPTS, max_tokens=10, seed=3, n=2) == together


def test_seeds():
    model = random_model()
    first, second, third = model.generate("a", max_tokens=20, seed=7, n=3)
    assert len({first, second, third}) == 3
    assert [first, second] == model.generate("a", max_tokens=20, seed=7, n=2)
    assert first == model.generate("a", max_tokens=20, seed=7) != model.generate("a", max_tokens=20, seed=8)
    assert model.generate("a", max_tokens=20) != model.generate("a", max_tokens=20)
    assert len(set(model.generate("a", max_tokens=20, n=4))) == 4


def test_a_model_in_training_is_sampled_as_it_will_be_when_loaded_and_is_left_as_it_was():
    model = random_model(drop_rate=0.5)
    text, score = model.generate("a", temperature=0, max_tokens=12), model.score("abc")
    model.model.train()
    model.model.compute_dtype = torch.bfloat16
    before = torch.get_rng_state()
    assert model.generate("a", temperature=0, max_tokens=12) == text and model.score("abc") == score
    assert model.model.training and model.model.compute_dtype == torch.bfloat16
    assert torch.equal(before, torch.get_rng_state())


def test_score_by_hand():
    """A model of zeros finds each of 257 tokens equally likely."""
    model = scripted_model("")
    with torch.no_grad():
        model.model.head.weight.zero_()
    score = model.score("aé")
    assert (score["tokens"], score["bytes"]) == (3, 3)
    assert score["nats"] == pytest.approx(3 * math.log(257), rel=1e-6)
    assert score["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)


@pytest.mark.parametrize("context_length", [2, 3, 24])
@pytest.mark.parametrize("n", [1, 2, 3, 23, 24, 25, 26, 37, 38, 90])
def test_score_of_a_text_longer_than_the_context(context_length, n):
    """Token by token by the rule of generation: never more than the context, never less than half of it."""
    model = random_model(context_length)
    text = "".join(chr(97 + i * i % 26) for i in range(n))
    window, nats = [EOT], 0.0
    for token in text.encode():
        if len(window) > context_length:
            window = window[-(context_length // 2) :]
        with torch.no_grad():
            logits_V = model.model(torch.tensor([window]))[0, -1]
        nats += float(F.cross_entropy(logits_V, torch.tensor(token)))
        window.append(token)
    assert model.score(text)["nats"] == pytest.approx(nats, rel=1e-5)


def test_longest_prompt():
    model = random_model(context_length=24)
    assert model.generate("x" * 23, max_tokens=5, temperature=0) is not None
    with pytest.raises(ConfigError, match=r"24 tokens.*at most 23"):
        model.generate(["a", "x" * 24])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": 1e300}, r"max_tokens 1e\+300"),
        ({"max_tokens": 10**30}, "from 1 to 1000000"),
        ({"n": 0}, "n 0"),
        ({"n": True}, "n True"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"stop": ""}, r"stop \[''\]"),
        ({"stop": ["a", 3]}, r"stop \['a', 3\]"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"prompt": "a\udcff"}, "surrogate.*|UTF-8"),
        ({"prompt": 3}, "3"),
        ({"prompt": ["a", None]}, "None"),
    ],
)
def test_what_is_refused(options, words):
    model = scripted_model("hello")
    with pytest.raises(ConfigError, match=words):
        model.generate(**{"prompt": "a"} | options)
    if "n" not in options and not isinstance(options.get("prompt"), list):
        with pytest.raises(ConfigError, match=words):
            model.stream(**{"prompt": "a"} | options)


def test_an_empty_text_has_no_score():
    with pytest.raises(ConfigError, match="nothing to score"):
        scripted_model("a").score("")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    config = ModelConfig(vocab_size=256, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    with pytest.raises(ConfigError, match=r"257 tokens.*256"):
        LanguageModel(Transformer(config), TOKENIZER)


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints, the second of which says "new"."""
    for step, text in ((1, "old"), (2, "new")):
        model = scripted_model(text)
        checkpoint.save(tmp_path, step, {"model": model.model.state_dict()}, {})
    write_config(read_config({"model": model.model.config.model_dump(exclude_none=True)}), tmp_path / "config.yaml")
    TOKENIZER.save(tmp_path / "tokenizer")
    return tmp_path


def test_load_a_run_and_a_checkpoint_of_it(run):
    model = load(Run.at(run), device="cpu")
    assert model.generate(temperature=0) == "new" and not model.model.training
    assert model.config.model == model.model.config
    assert load(Run.at(run / "checkpoints" / "step-00000001")).generate(temperature=0) == "old"


def test_load_passes_over_a_damaged_checkpoint_with_a_warning(run):
    weights = run / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged.*step-00000001 is used"):
        assert load(Run.at(run)).generate(temperature=0) == "old"
    with pytest.raises(CheckpointError, match="damaged"):
        load(Run.at(run / "checkpoints" / "step-00000002"))


def test_load_what_is_not_there(tmp_path, run):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(Run.at(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        load(Run.at(tmp_path / "empty"))
    for step in (1, 2):
        (run / "checkpoints" / f"step-0000000{step}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(Run.at(run))


def test_load_weights_of_another_config(run):
    config = read_config(run / "config.yaml", ["model.emb_dim=32", "model.head_dim=32", "model.hidden_dim=128"])
    write_config(config, run / "config.yaml")
    with pytest.raises(CheckpointError, match=r"another model.*\n.*emb"):
        load(Run.at(run))
