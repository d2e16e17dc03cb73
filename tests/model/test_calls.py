"""Every layer is called: hooks see it, and what replaces a layer or computes its weight takes effect, whatever the
model is used for."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.data.loader import Batch
from kiem.data.tokenizer import bytes_tokenizer
from kiem.generation.engine import LanguageModel
from kiem.model.ops import cross_entropy
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.training.objective import NextToken
from kiem.training.step import train_step

V, T = 300, 16
BASE = {"vocab_size": V, "context_length": T, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
CONFIGS = {
    "gpt2": ModelConfig(**BASE, qkv_bias=True),
    "llama": ModelConfig(
        **BASE, norm="rmsnorm", activation="swiglu", position="rope", bias=False, tie_embeddings=False
    ),
}
TRAIN = TrainConfig(
    tokens=20 * T, batch_tokens=2 * T, lr=0.01, matrix_lr=0.02, weight_decay=0.0, warmup_tokens=0, cooldown_tokens=0
)
TOKENS = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
TARGETS = TOKENS.roll(-1, 1).index_fill(1, torch.tensor([3]), -100)
BATCH = Batch(TOKENS, TARGETS, torch.arange(T).expand(2, T), torch.zeros(2, T, dtype=torch.int32), 2 * (T - 1))


def build(name):
    """With weights that are large enough for every layer to matter."""
    model = Transformer(CONFIGS[name]).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def training(model):
    train_step(NextToken(), model, build_optimizer(model, TRAIN), [BATCH], TRAIN, 0)


@torch.no_grad()
def evaluation(model):
    return NextToken().loss(model.eval(), BATCH)[0]


def scoring(model):
    return LanguageModel(model, bytes_tokenizer()).score("some text that is longer than the context")["nats"]


def generation(model):
    return LanguageModel(model, bytes_tokenizer()).generate("abc", max_tokens=4, seed=0)


def per_token(model):
    return model(TOKENS, targets_BT=TARGETS, per_token=True)[0]


def gradient(model):
    model.train().zero_grad()
    NextToken().loss(model, BATCH)[0].backward()
    return model.blocks[0].norm1.weight.grad


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("use", [training, evaluation, scoring, generation], ids=lambda use: use.__name__)
def test_hooks_see_every_call_and_the_layers_true_inputs_and_outputs(use, name):
    model = build(name)
    seen, paths = {}, {module: path for path, module in model.named_modules()}

    def hook(module, given, y):
        seen[paths[module]] = given[0], y

    for path in ("", "head", "blocks.0.mlp.down", "blocks.0.attn.out"):
        model.get_submodule(path).register_forward_hook(hook)
    use(model)
    assert set(seen) == {"", "head", "blocks.0.mlp.down", "blocks.0.attn.out"}
    for path in ("head", "blocks.0.mlp.down"):
        x, y = seen[path]
        layer = model.get_submodule(path)
        assert x.shape[-1] == layer.in_features and y.shape == (*x.shape[:-1], layer.out_features)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


class LoRA(nn.Module):
    """As adapters are written: a module around the layer, called with its input alone."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x):
        return self.base(x) + (x @ self.a.T.to(x.dtype)) @ self.b.T.to(x.dtype)

    def weight(self):
        return self.base.weight + self.b @ self.a


@pytest.mark.parametrize("path", ["head", "blocks.1.mlp.down", "blocks.1.mlp.up", "blocks.0.attn.q"])
@pytest.mark.parametrize("how", ["parametrized", "adapter"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_layer_takes_effect_everywhere(name, how, path):
    """As much as writing the changed weight into a plain model does."""
    changed, plain = build(name), build(name)
    if how == "parametrized":
        parametrize.register_parametrization(changed.get_submodule(path), "weight", Scaled())
        weight = changed.get_submodule(path).weight
    else:
        owner, _, last = path.rpartition(".")
        adapter = LoRA(changed.get_submodule(path))
        setattr(changed.get_submodule(owner), last, adapter)
        weight = adapter.weight()
    plain.get_submodule(path).weight = nn.Parameter(weight.detach().clone())  # of the head alone, where it was tied
    for use in (lambda m: m(TOKENS), evaluation, per_token, scoring, gradient):
        got, expected, before = (torch.as_tensor(use(model)) for model in (changed, plain, build(name)))
        # the same float32 sums in another order, through two blocks
        assert (got - expected).norm() < 1e-5 * expected.norm()
        assert (before - expected).norm() > 3e-5 * expected.norm()
    assert generation(changed) == generation(plain)


def test_an_adapter_alone_learns():
    model = build("llama").requires_grad_(False)
    model.head, model.blocks[0].mlp.down = LoRA(model.head), LoRA(model.blocks[0].mlp.down)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{path}.{part}" for path in ("head", "blocks.0.mlp.down") for part in "ab"}


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_of_each_token(name, chunks, monkeypatch):
    """Those of the logits; their sum is the loss; and any weighting of them can be differentiated."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 * T * V // chunks)
    model = build(name)
    logits_BTV = model(TOKENS)
    expected_BT = -logits_BTV.log_softmax(-1).gather(-1, TARGETS.clamp_min(0)[..., None])[..., 0] * (TARGETS != -100)
    nats_BT, n_valid = model(TOKENS, targets_BT=TARGETS, per_token=True)
    assert nats_BT.dtype == torch.float32 and n_valid == BATCH.n_valid
    torch.testing.assert_close(nats_BT, expected_BT)
    torch.testing.assert_close(nats_BT.sum(), model(TOKENS, targets_BT=TARGETS)[0])
    weights_BT = torch.linspace(-1, 1, 2 * T).view(2, T)
    got, expected = (
        torch.autograd.grad((weights_BT * nats).sum(), list(model.parameters())) for nats in (nats_BT, expected_BT)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_last_positions_alone():
    model = build("llama")
    torch.testing.assert_close(model(TOKENS, last=3), model(TOKENS)[:, -3:])
    nats, n_valid = model(TOKENS, targets_BT=TARGETS[:, -3:], last=3)
    all_BT, _ = model(TOKENS, targets_BT=TARGETS, per_token=True)
    assert n_valid == 6
    torch.testing.assert_close(nats, all_BT[:, -3:].sum())


@pytest.mark.parametrize("on_the_way", ["state dict", "meta", "copy", "to"])
def test_a_tied_head_stays_tied(on_the_way):
    model = build("gpt2")
    assert "head.weight" not in model.state_dict() and len(list(model.parameters())) == len(model.state_dict())
    if on_the_way == "copy":
        import copy

        found = copy.deepcopy(model)
    elif on_the_way == "to":
        found = Transformer(CONFIGS["gpt2"])
        found.load_state_dict(model.to(torch.float64).to(torch.float32).state_dict())
    else:
        with torch.device("meta"):
            found = Transformer(CONFIGS["gpt2"])
        if on_the_way == "meta":
            found.to_empty(device="cpu")
        found.load_state_dict(model.state_dict(), assign=on_the_way == "state dict")
    assert found.head.weight is found.tok_emb.weight
    assert torch.equal(found(TOKENS), model(TOKENS))
