"""Equal to transformers' GPT-2, Llama, Mistral, Qwen2, Qwen3: logits, loss and every gradient, on random small configs.

transformers runs its eager attention, in float32, with the same weights. Errors are norm-wise per tensor. The bound is
160 units of float32's rounding (6e-8): the same sums are taken in another order, and the layers amplify that.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F

from kiem.config.families import from_hf_config
from kiem.config.model import ModelConfig
from kiem.interop.families import family_of, to_hf_config
from kiem.interop.hf import to_hf_state
from kiem.model.cache import Cache
from kiem.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

BOUND = 1e-5
SEEDS = range(10)
ROPE = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}


def random_config(family: str, seed: int) -> ModelConfig:
    """A small config of the family: odd sizes, grouped queries, tied or not, biases where the family has them."""
    r = random.Random(f"{family} {seed}")
    n_heads = r.choice([1, 2, 3, 4, 6])
    head_dim = r.choice([6, 8, 10, 16])  # a LayerNorm over 2 numbers is a sign: its gradient is all rounding
    fields = {
        "vocab_size": r.randrange(11, 260),
        "context_length": r.randrange(5, 40),
        "emb_dim": n_heads * head_dim,
        "n_heads": n_heads,
        "n_layers": r.randrange(1, 4),
        "hidden_dim": r.randrange(3, 90),
        "norm_eps": r.choice([1e-6, 1e-5, 1e-3]),
        "tie_embeddings": r.random() < 0.5,
    }
    if family == "gpt2":
        activation = r.choice(["gelu_tanh", "gelu"])
        biases = {"qkv_bias": r.random() < 0.5, "bias": r.random() < 0.8, "norm_bias": r.random() < 0.8}
        return ModelConfig(**fields, activation=activation, **biases)
    fields |= ROPE | {
        "n_kv_heads": r.choice([d for d in range(1, n_heads + 1) if n_heads % d == 0]),
        "head_dim": r.choice([4, 8, 14] if family == "qwen3" else [2, 4, 8, 14]),  # the same for its norm over a head
        "rope_base": r.choice([100.0, 10_000.0, 1e6]),
        "qkv_bias": family == "qwen2" or r.random() < 0.5,
        "bias": False,
        "qk_norm": family == "qwen3",
    }
    if family == "llama" and (fields["qkv_bias"] or r.random() < 0.5):  # q, k and v alone have one in qwen2
        fields["bias"] = True
    fields |= r.choice(
        [
            {},
            {"rope_scaling": "linear", "rope_factor": 4.0},
            {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context_length": 12},
            {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_low_freq_factor": 0.5, "rope_high_freq_factor": 2.0},
        ]
    )
    return ModelConfig(**fields)


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Every weight random, norms and biases too, so that none can be left out without notice."""
    model = Transformer(config).initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def theirs(model: Transformer, attention: str = "eager"):
    """The same model in transformers."""
    config = transformers.AutoConfig.for_model(**to_hf_config(model.config), bos_token_id=0, eos_token_id=0)
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    missing, unexpected = other.load_state_dict(to_hf_state(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


def random_tokens(config: ModelConfig, seed: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, config.context_length), generator=torch.Generator().manual_seed(seed))


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.detach() - reference.detach()).norm() / reference.detach().norm())


def labels_with_gaps(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Some positions are no target."""
    labels_BT = tokens_BT.clone()
    labels_BT[0, :2] = -100
    labels_BT[1, -1] = -100
    return labels_BT


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "qwen3"])
def test_logits_loss_and_gradients(family, seed):
    config = random_config(family, seed)
    assert family_of(config) == family
    model = random_model(config, seed).eval()
    other = theirs(model).eval()
    tokens_BT = random_tokens(config, seed)
    labels_BT = labels_with_gaps(tokens_BT)
    reference = other(tokens_BT, labels=labels_BT)
    reference.loss.backward()
    assert error(model(tokens_BT), reference.logits) < BOUND

    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    for ways in ("fused", "watched"):
        if ways == "watched":
            for module in model.modules():
                module.register_forward_hook(lambda *_: None)
        model.zero_grad()
        nats, n_valid = model(tokens_BT, targets_BT=targets_BT)
        assert n_valid == (targets_BT != -100).sum()
        loss = nats / n_valid
        loss.backward()
        assert abs(loss.item() / reference.loss.item() - 1) < BOUND
        compare_gradients(model, other)


def compare_gradients(model: Transformer, other: torch.nn.Module) -> None:
    """Tensor by tensor in the layout of transformers. (There GPT-2's key bias is fused with others. Its true gradient
    is zero, because it shifts all scores of a query alike, and rounding has no relative error against zero.)"""
    gradients = copy.deepcopy(model)
    for p, q in zip(gradients.parameters(), model.parameters(), strict=True):
        assert q.grad is not None
        p.data = q.grad
    ours = to_hf_state(gradients)
    compared = 0
    for name, p in other.named_parameters():
        if name.endswith("bias") and not has_bias(model.config, name):
            continue
        assert error(ours[name], p.grad) < BOUND, name
        compared += 1
    assert compared >= 7 * model.config.n_layers + 1


def has_bias(config: ModelConfig, name: str) -> bool:
    """Whether a bias of transformers' model is one of ours too (else it is held at zero and has no gradient here)."""
    if any(part in name for part in ("c_attn", "q_proj", "k_proj", "v_proj")):
        return config.qkv_bias
    return config.norm_bias if "ln_" in name else config.bias


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_angles_far_into_the_context(family):
    """An angle is position times frequency: the frequencies must be rounded as theirs are, or 32,768 of it shows."""
    config = ModelConfig(
        vocab_size=50,
        context_length=32_768,
        emb_dim=16,
        n_heads=2,
        n_layers=1,
        head_dim=64,
        bias=False,
        rope_base=1e6,
        qk_norm=family == "qwen3",
        **ROPE,
    )
    model = random_model(config, 0).eval()
    tokens_BT = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.cat([torch.arange(16), torch.arange(32_752, 32_768)])[None]
    with torch.no_grad():
        reference = theirs(model).eval()(tokens_BT, position_ids=positions_BT).logits
        assert error(model(tokens_BT, positions_BT=positions_BT), reference) < BOUND


SCALED = {
    "llama 3.2": {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_context_length": 8192},
    "linear": {"rope_scaling": "linear", "rope_factor": 16.0},
}


@pytest.mark.parametrize("scaling", SCALED)
def test_stretched_rotary_angles_far_into_the_context(scaling):
    """As Llama 3.2: heads of 64, base 500,000, a context of 131,072 stretched from 8,192."""
    config = ModelConfig(
        vocab_size=50, context_length=131_072, emb_dim=64, n_heads=1, n_layers=1, bias=False, rope_base=5e5,
        **ROPE, **SCALED[scaling],
    )  # fmt: skip
    model = random_model(config, 0).eval()
    tokens_BT = torch.randint(50, (1, 48), generator=torch.Generator().manual_seed(0))
    starts = (0, 5_000, 131_056)
    positions_BT = torch.cat([torch.arange(start, start + 16) for start in starts])[None]
    plain = Transformer(config.model_copy(update={"rope_scaling": "none"})).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference = theirs(model).eval()(tokens_BT, position_ids=positions_BT).logits
        assert error(model(tokens_BT, positions_BT=positions_BT), reference) < BOUND
        assert error(plain(tokens_BT, positions_BT=positions_BT), reference) > 100 * BOUND


@pytest.mark.parametrize("window", [None, 24, 4096])
def test_mistral_whose_window_holds_the_context(window):
    hf = to_hf_config(random_config("llama", 1)) | {"model_type": "mistral", "max_position_embeddings": 24}
    hf |= {"sliding_window": window, "attention_bias": False, "mlp_bias": False}
    config = from_hf_config(hf)
    model = random_model(config, 0).eval()
    theirs_hf = transformers.AutoConfig.for_model(**hf, bos_token_id=0, eos_token_id=0)
    other = transformers.AutoModelForCausalLM.from_config(theirs_hf, attn_implementation="eager", dtype=torch.float32)
    other.load_state_dict(to_hf_state(model), strict=False)
    other.tie_weights()
    tokens_BT = random_tokens(config, 0)
    with torch.no_grad():
        assert error(model(tokens_BT), other.eval()(tokens_BT).logits) < BOUND


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "qwen3"])
def test_with_a_key_value_cache(family):
    """One token at a time with our cache is the whole text at once with theirs."""
    config = random_config(family, 3)
    model = random_model(config, 3).eval()
    tokens_BT = random_tokens(config, 3)
    with torch.no_grad():
        reference = theirs(model).eval()(tokens_BT).logits
        cache = Cache(config, batch=3, length=config.context_length)
        ours = torch.cat([model(tokens_BT[:, t : t + 1], cache=cache) for t in range(config.context_length)], dim=1)
    assert error(ours, reference) < BOUND


def test_dropout_in_the_places_of_gpt2():
    """The same seed gives the same noise only if both draw it in the same places, in the same order."""
    config = ModelConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.2)
    model = random_model(config, 0)
    other = theirs(model, attention="sdpa")
    tokens_BT = random_tokens(config, 0)
    for mode in (True, False):
        torch.manual_seed(5)
        ours = model.train(mode)(tokens_BT)
        torch.manual_seed(5)
        assert error(ours, other.train(mode)(tokens_BT).logits) < BOUND
    assert torch.equal(model(tokens_BT), model(tokens_BT))
    model.train()
    assert not torch.equal(model(tokens_BT), model(tokens_BT))


@pytest.mark.parametrize("place", ["drop", "blocks.0.attn", "blocks.0.drop"])
def test_dropout_acts_at_each_place(place):
    """Only one place in training mode: the output is noisy."""
    config = ModelConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=1, drop_rate=0.5)
    model = random_model(config, 0).eval()
    tokens_BT = random_tokens(config, 0)
    quiet = model(tokens_BT)
    model.get_submodule(place).training = True
    assert error(model(tokens_BT), quiet) > 1e-3
