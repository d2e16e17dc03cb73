"""Configurations as users write them: every format, every way to name a key, every mistake in one message."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config import keys
from kiem.config.model import ModelConfig
from kiem.config.presets import PRESETS, default_model, resolve
from kiem.config.read import config_dict, read_config, write_config
from kiem.config.run import DataConfig, RunConfig, Source, TrainConfig
from kiem.errors import ConfigError, StorageError

PASTED = """GPT_CONFIG_124M = {
"vocab_size": 50257,  // Vocabulary size of the BPE tokenizer
"context_length": 1024, // Context length
"emb_dim": 768,       // Embedding dimension
"n_heads": 12,        // Number of attention heads
"n_layers": 12,       // Number of layers
"drop_rate": 0.1,     // Dropout rate: 10%
"qkv_bias": False     // Query-Key-Value bias
}
"""
GPT2 = ModelConfig(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1)
TINY = {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text) -> name of a file in the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return make


def refused(*arguments, **options):
    """The lines of the one ConfigError."""
    with pytest.raises(ConfigError) as caught:
        read_config(*arguments, **options)
    text = str(caught.value)
    assert "pydantic" not in text and "http" not in text and "Input should" not in text
    return text


# --- formats


@pytest.mark.parametrize("name", ["gpt.json", "gpt.txt", "gpt.py", "gpt.cfg", "gpt"])
def test_the_pasted_configuration_is_gpt2(write, name):
    assert read_config(write(name, PASTED)).model == GPT2


@pytest.mark.parametrize(("name", "text"), [
    ("a.json", '{"model": {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}}'),
    ("a.json", '\ufeff{"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}'),
    ("a.jsonc", '/* tiny\n model */ {# one\n"vocab_size": 300, // # two\n"context_length": 32, "emb_dim": 16,'
                '"n_heads": 2, "n_layers": 1,}'),
    ("a", "CONFIG: dict = {'vocab_size': 300, 'context_length': 32, 'emb_dim': +16, 'n_heads': 2, 'n_layers': 1}"),
    ("a.js", "const config = {vocab_size: 300, context_length: 32, emb_dim: 16, n_heads: 2, n_layers: 1};"),
    ("a.py", "# tiny\nconfig = (\n    {'vocab_size': 300, 'context_length': 32, 'emb_dim': 16, 'n_heads': 2,\n"
             "     'n_layers': 1, 'hidden_dim': None})\n"),
    ("a.yaml", "vocab_size: 300\ncontext_length: 32\nemb_dim: 16\nn_heads: 2\nn_layers: 1\n"),
    ("a", "# tiny\nmodel:\n  vocab_size: 300\n  context_length: 32\n  emb_dim: 16\n  n_heads: 2\n  n_layers: 1\n"),
    ("a.yml", "model: &m {vocab_size: 300, context_length: 32, emb_dim: 16, n_heads: 2, n_layers: 1}\n"),
    ("a.toml", "[model]\nvocab_size = 300\ncontext_length = 32\nemb_dim = 16\nn_heads = 2\nn_layers = 1\n"),
    ("a.conf", "vocab_size = 300\ncontext_length = 32\nemb_dim = 16\nn_heads = 2\nn_layers = 1\n"),
])  # fmt: skip
def test_every_format_gives_the_same(write, name, text):
    assert read_config(write(name, text)) == RunConfig(model=ModelConfig(**TINY))


def test_yaml_aliases_and_merges_are_read(write):
    text = "data:\n  sources: [&a {path: x, weight: 2.0}, {<<: *a, path: y}]\n"
    sources = read_config(write("a.yaml", text)).data.sources
    assert sources == [Source(path="x", weight=2.0), Source(path="y", weight=2.0)]


# --- writing and reading back

POSITIVE = st.floats(1e-9, 9.0)
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        "1e5",
        "no",
        "null",
        "12:30",
        "0x10",
        "- a",
        "a: b",
        "#x",
        "=",
        "<<",
        "1_0",
        ".inf",
        "'\"",
        "\u2028x",
        "~",
        "{x}",
        "\x85",
        "a\x85b",
        "\u2029",
        "\r\n",
        " \n ",
    ]
)
SOURCES = st.lists(st.builds(Source, path=PATHS, weight=st.floats(1e-6, 1e6), text_key=PATHS), min_size=1, max_size=3)
CONFIGS = st.builds(
    RunConfig,
    model=st.none()
    | st.builds(
        ModelConfig, vocab_size=st.integers(2, 10**6), context_length=st.integers(2, 10**6),
        n_layers=st.integers(1, 99),
        emb_dim=st.sampled_from([8, 16, 96]), n_heads=st.sampled_from([1, 2, 4]), drop_rate=st.floats(0, 0.99),
        norm_eps=st.floats(1e-12, 0.1), norm=st.sampled_from(["rmsnorm", "layernorm"]), qk_norm=st.booleans(),
        hidden_dim=st.none() | st.integers(1, 99), position=st.sampled_from(["rope", "learned"]),
    ),
    data=st.builds(DataConfig, sources=SOURCES, validation=st.none() | SOURCES, tokenizer=PATHS),
    train=st.builds(
        TrainConfig, tokens=st.none() | st.integers(1, 10**15), lr=st.none() | POSITIVE, matrix_lr=st.none() | POSITIVE,
        beta2=st.floats(0, 0.999), max_grad_norm=st.floats(0, 1e6), compile=st.booleans(),
    ),
    seed=st.integers(0, 2**63 - 1),
    device=st.sampled_from(["auto", "cpu", "cuda:3"]),
)  # fmt: skip


@given(CONFIGS)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    write_config(config, path)
    assert read_config(path) == config
    assert read_config(config) == config
    assert read_config(config_dict(config)) == config


def test_depth_is_written_and_read_back(tmp_path):
    config = RunConfig(depth=4, data=DataConfig(tokenizer_vocab_size=512))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_config(RunConfig(seed=1), path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kiem.config.read.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_config(RunConfig(seed=2), path)
    assert read_config(path).seed == 1
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


# --- names of keys


def test_every_alias_stands_for_a_key_and_hides_none():
    for section, aliases in keys.ALIASES.items():
        for alias, name in aliases.items():
            assert f"{section}.{name}" in keys.schema()
            assert keys.find(alias) == [f"{section}.{name}"]
    own = {path.rpartition(".")[2] for path in keys.schema()}
    assert not own & (set(keys.NEAR_ALIASES) | {alias for part in keys.ALIASES.values() for alias in part})


def test_names_from_elsewhere():
    theirs = {"d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_seq_len": 32, "vocab_size": 300,
              "dropout": 0.25, "n_inner": 40, "layer_norm_eps": 1e-6, "n_kv_heads": 1,
              "tie_word_embeddings": False}  # fmt: skip
    ours = ModelConfig(**TINY, drop_rate=0.25, hidden_dim=40, norm_eps=1e-6, n_kv_heads=1, tie_embeddings=False)
    assert read_config(theirs).model == ours


def test_names_that_mean_nearly_the_same_are_not_guessed():
    message = refused({"train": {"batch_size": 8, "max_iters": 9}, "model": TINY | {"attention_bias": True}})
    assert "train.batch_tokens" in message and "train.tokens" in message and "model.qkv_bias" in message


@pytest.mark.parametrize(("override", "path"), [
    ("lr=3e-4", "train.lr"), ("learning_rate=3e-4", "train.lr"), ("train.learning_rate=3e-4", "train.lr"),
    ("max_lr=.0003", "train.lr"),
])  # fmt: skip
def test_short_and_other_names_in_overrides(override, path):
    assert keys.find(override.partition("=")[0]) == [path]
    assert read_config(None, [override]).train.lr == 3e-4


def test_an_ambiguous_short_key_is_refused(monkeypatch):
    monkeypatch.setitem(keys.ALIASES["train"], "dropout", "weight_decay")
    assert "model.drop_rate or train.weight_decay" in refused(None, ["dropout=0.1"])


@pytest.mark.parametrize(("values", "words"), [
    ({"train": {"lerning_rate": 1}}, ["train.lerning_rate", "train.lr"]),
    ({"train": {"emb_dim": 1}}, ["train.emb_dim", "model.emb_dim"]),
    ({"lr": 1}, ["lr", "train.lr"]),
    ({"seeds": 1}, ["seeds", "seed"]),
    ({"xyzzy": 1}, ["xyzzy", "model, depth, data, train, seed, device"]),
    ({"depth": 4, "n_layers": 3}, ["n_layers", "model.n_layers"]),
    ({"data": {"sources": [{"path": "a", "wieght": 1}]}}, ["data.sources[0]", "wieght", "weight"]),
    ({"model": TINY | {"n_embd": 16}}, ["n_embd", "model.emb_dim", "keep one"]),
    ({"model": TINY | {"n_embd": 16, "emb_dim": 16}}, ["emb_dim", "keep one"]),
    ({"train": {"lr": 1e-3, "max_lr": 1e-3}}, ["max_lr", "train.lr", "keep one"]),
])  # fmt: skip
def test_an_unknown_key_names_the_one_that_was_meant(values, words):
    message = refused(values)
    assert all(word in message for word in words) and "\n" not in message, message


def test_a_misspelt_key_is_not_also_missing():
    message = refused({"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layer_s": 1})
    assert "n_layers" in message and "missing" not in message and "\n" not in message


# --- values


@pytest.mark.parametrize(("section", "key", "value", "words"), [
    ("train", "lr", True, ["true", "a number above 0 and at most 10"]),
    ("train", "lr", "3e-4", ['"3e-4"', "0.0003 without quotes"]),
    ("train", "tokens", "10M", ['"10M"', "10000000 without quotes"]),
    ("train", "tokens", 1.5, ["1.5", "a whole number"]),
    ("train", "tokens", 10**30, ["1" + "0" * 30, "at most 1e+15"]),
    ("train", "tokens", True, ["true", "a whole number"]),
    ("train", "lr", float("nan"), ["nan"]),
    ("train", "lr", float("inf"), ["inf"]),
    ("train", "lr", 1e300, ["1e+300"]),
    ("train", "lr", [1], ["a list of 1"]),
    ("train", "compile", "true", ['"true"', "true without quotes"]),
    ("train", "compile", 1, ["true or false"]),
    ("train", "optimizer", "adam", ["adam", "did you mean adamw"]),
    ("train", "optimizer", 3, ["muon, adamw"]),
    ("data", "sources", [], ["an empty list"]),
    ("data", "sources", 3, ["data.sources", "list"]),
    ("data", "sources", [3], ["data.sources[0]", "a path"]),
    ("data", "sources", [""], ["data.sources[0].path", "not empty"]),
    ("data", "sources", [{"path": "a", "weight": -1}], ["data.sources[0].weight", "-1", "above 0"]),
    ("data", "tokenizer", 3, ["data.tokenizer", "3"]),
])  # fmt: skip
def test_a_wrong_value_is_shown_with_what_is_allowed(section, key, value, words):
    message = refused({section: {key: value}})
    assert f"{section}.{key}" in message and all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("text", "tokens"), [("1e6", 10**6), ("10M", 10**7), ("2.5k", 2500), ("1_000_000", 10**6)])
def test_counts_in_overrides_and_options(text, tokens):
    assert read_config(None, [f"train.tokens={text}"]).train.tokens == tokens
    assert read_config(None, options={"train.tokens": text}).train.tokens == tokens


def test_whole_floats_are_counts_and_ints_are_rates():
    config = read_config({"train": {"tokens": 1e6, "lr": 1}, "seed": 3.0})
    assert (config.train.tokens, config.train.lr, config.seed) == (1_000_000, 1.0, 3)


def test_all_problems_at_once_with_their_lines(write):
    model = "model:\n  vocab_size: 300\n  context_length: 32\n  emb_dim: -1\n  n_heads: 2\n  n_layers: '1'\n"
    name = write("run.yaml", model + "train:\n  lr: 99\n  optimiser: muon\nsede: 1\n")
    message = refused(name, ["train.beta1=2", "foo"])
    assert message.startswith("7 problems")
    for line in [
        "run.yaml:4: model.emb_dim is -1",
        'run.yaml:6: model.n_layers is text "1"',
        "run.yaml:8: train.lr is 99",
        "run.yaml:9: unknown key 'train.optimiser': did you mean train.optimizer?",
        "run.yaml:10: unknown key 'sede': did you mean seed?",
        "'train.beta1=2': train.beta1 is 2",
        "'foo' is not",
    ]:
        assert line in message, message


def test_a_line_that_cannot_be_told_is_not_claimed(write):
    name = write("run.json", '{"data": {"sources": [\n{"path": "a", "weight": -1},\n{"path": "b", "weight": 1}]}}')
    assert refused(name).startswith("run.json:1: data.sources[0].weight is -1")


@pytest.mark.parametrize(("values", "words"), [
    ({"depth": 4, "model": TINY}, "depth and a model that has its own sizes cannot be combined"),
    ({"depth": 4, "model": "gpt2-124m"}, "depth and a model that has its own sizes cannot be combined"),
    ({"train": {"optimizer": "adamw", "matrix_lr": 0.1}}, "matrix_lr has no effect"),
    ({"train": {"cooldown": "none", "final_lr_fraction": 0.1}}, "final_lr_fraction has no effect"),
    ({"data": {"tokenizer": "bytes", "tokenizer_vocab_size": 300}}, "tokenizer_vocab_size has no effect"),
    ({"data": {"validation": ["a"], "validation_fraction": 0.1}}, "validation_fraction has no effect"),
    ({"model": TINY | {"rope_base": 10.0}}, "rope_base has no effect"),
])  # fmt: skip
def test_a_key_without_effect_is_refused(values, words):
    assert words in refused(values)


# --- presets, sources, precedence


def test_a_preset_by_name_in_a_file_and_as_override(write):
    assert read_config("gpt2-355m").model == PRESETS["gpt2-355m"]
    assert read_config(write("a.yaml", "model: gpt2-355m\n")).model == PRESETS["gpt2-355m"]
    assert read_config(None, ["model=gpt2-355m"]).model == PRESETS["gpt2-355m"]


def test_changes_on_top_of_a_preset_in_any_order():
    wanted = PRESETS["gpt2-124m"].model_copy(update={"emb_dim": 96, "hidden_dim": 384, "head_dim": 8, "n_layers": 2})
    for overrides in (["model=gpt2-124m", "emb_dim=96", "n_layers=2"], ["n_layers=2", "emb_dim=96", "model=gpt2-124m"]):
        assert read_config(None, overrides).model == wanted
    assert read_config("gpt2-124m", ["emb_dim=96", "n_layers=2"]).model == wanted


def test_the_later_source_wins(write):
    name = write("a.yaml", "seed: 1\ntrain:\n  tokens: 1\n  lr: 0.1\n")
    config = read_config(name, ["train.tokens=3", "tokens=4", "train.lr=null"], {"seed": 2, "train.tokens": "2k"})
    assert (config.seed, config.train.tokens, config.train.lr) == (2, 4, None)


def test_sources_in_every_form():
    assert read_config({"data": {"sources": "a"}}).data.sources == [Source(path="a")]
    mixed = {"data": {"sources": ["a", {"path": "b", "text_key": "body"}]}}
    assert read_config(mixed).data.sources == [Source(path="a"), Source(path="b", text_key="body")]
    assert read_config(None, ["sources=a.txt"]).data.sources == [Source(path="a.txt")]
    assert read_config(None, ["data.sources=['a', {'path': 'b', 'text_key': 'body'}]"]).data.sources == read_config(
        mixed).data.sources  # fmt: skip


def test_either_all_sources_have_a_weight_or_none():
    message = refused({"data": {"sources": ["a", {"path": "b", "weight": 2}]}})
    assert "a has no weight and others have one: give every source a weight (PATH=WEIGHT), or none" in message


def test_a_problem_names_the_option_that_it_came_from():
    weight = {"data.sources": [{"path": "a", "weight": float("inf")}]}
    assert refused(None, options=weight).startswith("--data: data.sources[0].weight is inf")
    assert refused(None, options={"train.tokens": 0}).startswith("--tokens: train.tokens is 0")


@pytest.mark.parametrize("target", ["no/such.yaml", "nothing", "x" * 5000, "a\0b"])
def test_a_target_that_is_not_there(target):
    message = refused(target)
    assert "no such file" in message or "preset" in message


@pytest.mark.parametrize("values", [{"n_layers": 4, "emb_dim": 64}, {"model": {"n_layers": 4, "emb_dim": 64}}])
def test_part_of_a_model_is_told_from_a_whole_one(values):
    message = refused(values)
    assert "incomplete, missing model.context_length, model.n_heads" in message
    assert "depth" in message and "preset" in message and "\n" not in message


# --- one value on top of what was derived


def fields(config, *names):
    return tuple(getattr(config.model, name) for name in names)


@pytest.mark.parametrize(("overrides", "depth", "changed"), [
    (["model.context_length=128"], 3, {"context_length": 128}),
    (["model.context_length=64"], None, {"context_length": 64}),
    (["model.vocab_size=5000"], None, {"vocab_size": 5000}),
    (["model.emb_dim=96"], None, {"emb_dim": 96, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 256}),
    (["emb_dim=512"], 4, {"emb_dim": 512, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 1408}),
    (["n_heads=4"], 4, {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}),
    (["n_heads=3"], 4, {"n_heads": 3, "n_kv_heads": 3}),
    (["activation=gelu"], 4, {"activation": "gelu", "hidden_dim": 512}),
    (["norm=layernorm"], 4, {"norm": "layernorm", "norm_bias": True}),
    (["position=learned"], 4, {"position": "learned", "rope_base": None}),
    (["n_layers=6"], None, {"n_layers": 6, "emb_dim": 192, "n_heads": 3, "n_kv_heads": 3, "hidden_dim": 512,
                            "context_length": 512}),
    (["rope_scaling=linear", "rope_factor=2"], 4, {"rope_scaling": "linear", "rope_factor": 2.0}),
])  # fmt: skip
def test_a_value_on_top_of_the_default_family(overrides, depth, changed):
    whole = default_model(depth or 4, 4096).model_copy(update={"vocab_size": None})
    config = read_config(None, overrides, {} if depth is None else {"depth": depth})
    assert config.model == whole.model_copy(update=changed) and config.depth is None
    assert resolve(config, 1000).model == config.model.model_copy(
        update={"vocab_size": config.model.vocab_size or 1000}
    )


def test_a_value_beside_depth_in_a_file():
    config = read_config({"depth": 3, "model": {"context_length": 128}})
    assert config == read_config(None, ["depth=3", "context_length=128"])


def test_a_value_on_top_of_a_file_and_what_follows_from_it():
    assert fields(read_config({"model": TINY}, ["emb_dim=96"]), "emb_dim", "hidden_dim", "head_dim") == (96, 384, 48)
    config = read_config({"model": TINY | {"hidden_dim": 40, "head_dim": 6}}, ["emb_dim=96", "n_heads=4"])
    assert fields(config, "hidden_dim", "head_dim", "n_kv_heads") == (40, 6, 4)
    assert fields(read_config({"model": TINY}, ["emb_dim=96", "hidden_dim=64"]), "hidden_dim") == (64,)


def test_a_value_that_does_not_fit_is_one_error():
    assert "emb_dim 100 is not divisible by n_heads 12" in refused("gpt2-124m", ["emb_dim=100"])
    assert "depth is 1000: it takes a whole number" in refused(None, ["depth=1000", "context_length=64"])
    assert 'model.emb_dim is text "wide"' in refused(None, ["emb_dim=wide"])


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given():
    bare = {name: value for name, value in TINY.items() if name != "vocab_size"}
    assert resolve(read_config(bare), 777).model.vocab_size == 777
    assert resolve(read_config(TINY), 257).model.vocab_size == 300
