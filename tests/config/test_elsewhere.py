"""Configurations as people have them: published config.json files, nanoGPT, LLMs-from-scratch. Each builds exactly
the model that it is of, or is refused for one clear reason."""

import json
from pathlib import Path

import pytest

from kiem.config.presets import resolve
from kiem.config.read import read_config
from kiem.errors import ConfigError
from kiem.planning.count import total_parameters

# config.json files as published for gpt2, HuggingFaceTB/SmolLM-135M, Llama-3.2-1B, Qwen3-0.6B, Qwen2.5-0.5B, Mistral-7B
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
GPT2, SMOLLM, LLAMA32, QWEN3, QWEN25, MISTRAL = PUBLISHED.values()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text or values) -> name of a file in the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
        return name

    return make


def refused(*arguments):
    with pytest.raises(ConfigError) as caught:
        read_config(*arguments)
    return str(caught.value)


# --- Hugging Face


@pytest.mark.parametrize(("hf", "parameters"), [
    (GPT2, 124_439_808), (SMOLLM, 134_515_008), (LLAMA32, 1_235_814_400), (QWEN3, 596_049_920), (QWEN25, 494_032_768),
    (MISTRAL | {"sliding_window": None}, 7_241_732_096),
])  # fmt: skip
def test_a_published_config_json_builds_its_model(write, hf, parameters):
    """Totals as the models' cards and transformers give them; in a file of its own, as model section, as a mapping."""
    config = read_config(write("config.json", hf))
    assert total_parameters(config.model) == parameters
    assert read_config(hf) == read_config({"model": hf}) == config


def test_every_published_model_is_counted_as_transformers_does():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    for hf in (GPT2, SMOLLM, LLAMA32, QWEN3, QWEN25, MISTRAL | {"sliding_window": None}):
        hf = {key: value for key, value in hf.items() if key != "torch_dtype"}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
        theirs = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        assert total_parameters(read_config(hf).model) == theirs


def test_values_of_a_config_json_can_be_changed(write):
    model = read_config(write("a.json", SMOLLM), ["n_layers=2", "max_position_embeddings=128", "drop_rate=0.1"]).model
    assert (model.n_layers, model.context_length, model.drop_rate, model.n_kv_heads) == (2, 128, 0.1, 3)


@pytest.mark.parametrize(("hf", "words"), [
    (MISTRAL, ["sliding_window 4096", "32768", "context_length=4096"]),
    (QWEN25 | {"use_sliding_window": True, "sliding_window": 1024}, ["sliding_window 1024", "context_length=1024"]),
    (LLAMA32 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
    (LLAMA32 | {"hidden_act": "gelu"}, ["hidden_act", "silu"]),
    (LLAMA32 | {"model_type": "gemma3"}, ["gemma3", "gpt2, qwen2, llama, mistral, qwen3"]),
    (LLAMA32 | {"num_local_experts": 8}, ["num_local_experts"]),
    (GPT2 | {"n_head": 10}, ["emb_dim 768", "n_heads 10"]),
    (GPT2 | {"n_layer": "12"}, ["n_layers", '"12"', "without quotes"]),
    ({key: value for key, value in SMOLLM.items() if key != "hidden_size"}, ["hidden_size is missing"]),
])  # fmt: skip
def test_another_model_is_refused_for_one_reason(write, hf, words):
    message = refused(write("config.json", hf))
    assert all(word in message for word in words) and "\n" not in message and "did you mean" not in message, message
    assert message.startswith("config.json")


def test_the_advice_on_a_window_can_be_followed(write):
    assert read_config(write("config.json", MISTRAL), ["context_length=4096"]).model.context_length == 4096


# --- keys without the name of a family

TINY_LLAMA = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": False}  # fmt: skip
LITGPT = {"block_size": 128, "vocab_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_query_groups": 2,
          "intermediate_size": 172, "bias": False, "norm_eps": 1e-5}  # fmt: skip


def test_keys_of_a_llama_build_a_llama(write):
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in TINY_LLAMA.items()).replace("1e-06", "1.0e-6")
    for target in (TINY_LLAMA, {"model": TINY_LLAMA}, write("tiny.yaml", text)):
        model = read_config(target).model
        assert (model.norm, model.activation, model.position) == ("rmsnorm", "swiglu", "rope")
        assert total_parameters(model) == 156_480


@pytest.mark.parametrize("values", [
    LITGPT,
    {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "num_key_value_heads": 1, "layer_norm_epsilon": 1e-6},
    {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "context_length": 32, "intermediate_size": 40},
])  # fmt: skip
def test_keys_that_leave_the_model_open_are_never_guessed(values):
    message = refused(values)
    assert "give norm, activation, position (a Llama has norm: rmsnorm, activation: swiglu, position: rope)" in message
    assert "\n" not in message
    model = read_config(values | {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}).model
    assert model.n_kv_heads in (1, 2) and model.position == "rope"


# --- nanoGPT

ARGS = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 50304, "dropout": 0.0}
CALL = "GPTConfig(block_size=128, vocab_size=50304, n_layer=4, n_head=4, n_embd=64, dropout=0.0, bias={})"
DATACLASS = """@dataclass
class MyConfig:
    block_size: int = 128
    vocab_size: int = 50304 # padded
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    bias: bool = {}
"""
# nanoGPT's own count: embeddings, 12 D^2 per layer, norms; with biases 4 D + 9 D more per layer and D at the end
BARE = 50304 * 64 + 128 * 64 + 4 * (12 * 64 * 64 + 2 * 64) + 64
WITH_BIASES = BARE + 4 * (2 * 64 + 3 * 64 + 64 + 4 * 64 + 64) + 64


@pytest.mark.parametrize(("bias", "parameters"), [(False, BARE), (True, WITH_BIASES)])
@pytest.mark.parametrize(("name", "text"), [
    ("call.txt", CALL), ("call.py", f"import torch\nconfig = {CALL}"), ("dataclass.py", DATACLASS),
    ("dict.py", "cfg = dict(n_layer=4, n_head=4, n_embd=64, block_size=128, vocab_size=50304, bias={})"),
    ("a.json", json.dumps(ARGS)[:-1] + ', "bias": {}}}'),
])  # fmt: skip
def test_every_form_of_a_nanogpt_config(write, name, text, bias, parameters):
    written = str(bias).lower() if name.endswith("json") else bias
    text = text.replace("{}", str(written)).replace("}}", "}")
    model = read_config(write(name, text)).model
    assert total_parameters(model) == parameters
    assert (model.qkv_bias, model.bias, model.norm_bias) == (bias, bias, bias)


def test_nanogpts_gpt2_has_all_the_biases():
    values = ARGS | {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "bias": True}
    assert total_parameters(read_config(values).model) == 124_439_808
    assert total_parameters(read_config({key: v for key, v in values.items() if key != "bias"}).model) == 124_439_808


CONFIG_FILE = """# own settings in the style of nanoGPT's config files: a list of assignments
import time
out_dir = 'out-mine'
wandb_run_name = 'run' + str(time.time())
eval_interval = 200  # often, as it overfits
eval_iters = 20
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 128 # context
n_layer = 4
n_head = 4
n_embd = 64
dropout = 0.1
learning_rate = 1e-3
max_iters = 500
lr_decay_iters = max_iters
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
"""


@pytest.mark.parametrize("name", ["train_my_char.py", "train_my_char"])
def test_a_nanogpt_config_file(write, name):
    config = read_config(write(name, CONFIG_FILE))
    batch = 40 * 12 * 128
    train = config.train
    assert (train.tokens, train.batch_tokens, train.micro_batch_tokens) == (500 * batch, batch, 12 * 128)
    assert (train.optimizer, train.lr, train.beta2, train.final_lr_fraction) == ("adamw", 1e-3, 0.99, 0.1)
    assert (train.cooldown, train.warmup_tokens, train.cooldown_tokens) == ("cosine", 50 * batch, 450 * batch)
    assert (train.eval_every, train.eval_tokens) == (200, 20 * 12 * 128)
    model = config.model
    assert (model.drop_rate, model.bias, model.norm_bias, model.qkv_bias) == (0.1, False, False, False)
    assert resolve(config, 65).model.vocab_size == 65


@pytest.mark.parametrize(("change", "words"), [
    ("lr_decay_iters = 400", ["lr_decay_iters 400", "max_iters 500"]),
    ("init_from = 'gpt2'", ["init_from", "scratch"]),
    ("dtype = 'float16'", ["train.precision", "float16", "bfloat16"]),
    ("n_layr = 3", ["n_layr"]),
    ("n_head = heads()", ["heads()", "not a value"]),
    ("batch_size = 'many'", ["batch_size is not a count"]),
    ("exec(open('configurator.py').read())", ["configurator.py", "would have to be executed"]),
])  # fmt: skip
def test_what_a_nanogpt_file_says_that_kiem_does_not_do(write, change, words):
    message = refused(write("train.py", CONFIG_FILE + change + "\n"))
    assert all(word in message for word in words) and "\n" not in message, message


# --- LLMs-from-scratch

QWEN_DICT = """import torch

MY_QWEN = {
    "vocab_size": 151_936, "context_length": 40_960, "emb_dim": 1024, "n_heads": 16, "n_layers": 28, "hidden_dim": 3072,
    "head_dim": 128, "qk_norm": True, "n_kv_groups": 8, "rope_base": 1_000_000.0, "dtype": torch.bfloat16,
}
"""
LLAMA_DICT = """MY_LLAMA = {
    "vocab_size": 128_256, "context_length": 8192, "emb_dim": 2048, "n_heads": 32, "n_layers": 16,
    "hidden_dim": 8192, "n_kv_groups": 8, "rope_base": 500_000.0, "dtype": torch.bfloat16,
    "rope_freq": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192},
}
"""


def test_dictionaries_of_llms_from_scratch(write):
    qwen, llama = read_config(write("qwen.py", QWEN_DICT)), read_config(write("llama.txt", LLAMA_DICT))
    assert total_parameters(qwen.model) == 596_049_920 and total_parameters(llama.model) == 1_235_814_400
    assert qwen.train.precision == llama.train.precision == "bfloat16"
    assert llama.model == read_config(LLAMA32, ["context_length=8192"]).model
    assert qwen.model == read_config(QWEN3).model


def test_several_dictionaries_in_one_file_are_refused_by_name(write):
    text = 'BASE = {"vocab_size": 50257}\nmodels = {"small": {"emb_dim": 768}}\n'
    message = refused(write("two.py", text))
    assert "BASE (line 1), models (line 2)" in message and "keep the one" in message
    assert "two.py:3" in refused(write("two.py", text + 'BASE.update(models["small"])\n'))
