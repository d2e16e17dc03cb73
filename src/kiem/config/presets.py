"""Named models, and the dial: everything about a run that follows from a depth, a text and a machine's patience.

The derivation, in the order in which it is done. M: measured (records/), A: assumed from the literature.

 1. emb_dim = 32 * depth, rounded up to 64. Small models gain by being deep and narrow (A: Liu et al. 2024, MobileLLM,
    arXiv:2402.14905; M: at emb_dim 128, 4 layers beat 2 in the same time).
 2. Heads of 64; from 4 heads on half as many for keys and values (A: Ainslie et al. 2023, arXiv:2305.13245).
 3. hidden_dim = 8/3 * emb_dim, rounded up to 64, so that SwiGLU's three matrices weigh what two of 4 * emb_dim do
    (A: Shazeer 2020).
 4. context_length = 64 * depth, rounded up to a power of two, between 256 and 2048: text a model of this size can use.
 5. A bpe tokenizer of 64 * depth^2 entries, rounded to a power of two, between 1024 and 65536: the head's share of the
    work stays about the same at any depth (M at emb_dim 128: 1024 beats 2048; A beyond).
 6. tokens = 20 per parameter that is multiplied with (blocks and head; A: Hoffmann et al. 2022, arXiv:2203.15556). Any
    length is rounded up to whole steps.
 7. batch_tokens = 0.75 * sqrt(tokens), rounded to a power of two, at least one context: the batch that still
    pays grows about with the square root of the data (A: Zhang et al. 2024, arXiv:2410.21676; the factor M).
 8. matrix_lr = 0.02 at any width: an orthogonal update has the same effect on a matrix of any size (A: Jordan 2024;
    M: 0.02 beats 0.04 at emb_dim 192).
 9. lr of AdamW beside Muon, for embeddings, head and vectors, = 0.004 (M at emb_dim 128 to 256; A to 768), falling with
    the root of emb_dim above 768 (A); AdamW alone 6e-4 * sqrt(768 / emb_dim) (A: Brown et al. 2020, table 2.1,
    within a factor of 1.3).
10. weight_decay: 0.1 with AdamW (A: Brown et al. 2020); 0 with Muon, whose runs here are short of item 6 (M).
11. Warm-up over 2 % of the tokens, cool-down linear to 0 over the last 40 % (A: Hägele et al. 2024,
    arXiv:2405.18392).
12. A forward pass takes the whole batch, but no more tokens than 16384 * 256 / emb_dim (at least one context), so that
    activations stay within a few GB; the rest accumulates.
13. For a time instead of a depth: the deepest model that sees at least 2 tokens per parameter of item 6 in it. Far
    below item 6 a smaller model wins, as it takes more steps (M at 1.5e13 FLOPs).
14. Ten evaluations, samples and saves in a run, and one more of each at its end. An evaluation on the way takes 1/64 of
    tokens, at most 65,536: all of them together cost 5 % of the training (a forward pass is a third of a step).
"""

import math
from collections.abc import Mapping
from typing import Any

from kiem.config.model import ModelConfig
from kiem.config.run import MOST_TOKENS, RunConfig, TrainConfig
from kiem.errors import ConfigError

DEFAULT_DEPTH = 4
LEAST_TOKENS_PER_PARAMETER = 2


def _gpt2(emb_dim: int, n_heads: int, n_layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50257,
        context_length=1024,
        emb_dim=emb_dim,
        n_heads=n_heads,
        n_layers=n_layers,
        drop_rate=0.1,
        qkv_bias=True,
    )


PRESETS: dict[str, ModelConfig] = {
    "gpt2-124m": _gpt2(768, 12, 12),
    "gpt2-355m": _gpt2(1024, 16, 24),
    "gpt2-774m": _gpt2(1280, 20, 36),
    "gpt2-1558m": _gpt2(1600, 25, 48),
}


def default_model(depth: int, vocab_size: int) -> ModelConfig:
    """The default family (Qwen3's architecture) at a depth: items 1 to 4."""
    return ModelConfig(**default_values(depth, {"vocab_size": vocab_size}))


def default_values(depth: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the default family's model with those in `given` changed, and what follows from them following.

    A given value that is wrong derives nothing; it is in the result, for the checks. vocab_size is only there if given.
    """

    def size(name: str, default: int) -> int:
        value = given.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**20 else default

    depth = size("n_layers", depth)
    emb_dim = size("emb_dim", math.ceil(depth / 2) * 64)
    n_heads = size("n_heads", max(1, emb_dim // size("head_dim", 64)))
    even = emb_dim % (2 * n_heads) == 0
    wide = 8 / 3 if given.get("activation", "swiglu") == "swiglu" else 4
    values: dict[str, Any] = {
        "context_length": min(2048, max(256, 1 << math.ceil(math.log2(64 * depth)))),
        "emb_dim": emb_dim,
        "n_heads": n_heads,
        "n_kv_heads": n_heads // 2 if n_heads >= 4 and n_heads % 2 == 0 else n_heads,
        "n_layers": depth,
        "head_dim": emb_dim // n_heads if "n_heads" in given and even else 64,
        "hidden_dim": math.ceil(emb_dim * wide / 64) * 64,
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "activation": "swiglu",
        "position": "rope",
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
    }
    return values | dict(given)


def tokenizer_vocab_size(config: RunConfig) -> int:
    """Entries of a bpe tokenizer that is trained for this run: as configured, else the model's, else item 5."""
    if config.data.tokenizer_vocab_size is not None:
        return config.data.tokenizer_vocab_size
    if config.model is not None and config.model.vocab_size is not None:
        return config.model.vocab_size
    depth = config.model.n_layers if config.model is not None else config.depth or DEFAULT_DEPTH
    return min(65_536, max(1_024, _power_of_two(64 * depth**2)))


def depth_for(flops: float) -> int:
    """The depth of the default family for a run of so many FLOPs: item 13."""

    def needed(depth: int) -> float:
        model = default_model(depth, tokenizer_vocab_size(RunConfig(depth=depth)))
        n = multiplied_parameters(model)
        return 6 * n * LEAST_TOKENS_PER_PARAMETER * n

    return max([depth for depth in range(2, 65) if needed(depth) <= flops], default=2)


def resolve(config: RunConfig, vocab_size: int) -> RunConfig:
    """Fill every value that is still to be derived; `vocab_size` is the tokenizer's. Resolving again changes nothing.

    Raises ConfigError if the model has fewer vocabulary entries than the tokenizer, or sizes do not fit together.
    """
    model = config.model or default_model(config.depth or DEFAULT_DEPTH, vocab_size)
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": vocab_size})
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size} and the tokenizer has {vocab_size} tokens: set it to "
            f"at least {vocab_size}, or use a smaller tokenizer (data.tokenizer_vocab_size)"
        )
    filled = config.train.model_dump() | _training(config.train, model)
    data = config.data.model_copy(
        update={"tokenizer_vocab_size": config.data.tokenizer_vocab_size or vocab_size}
        if config.data.tokenizer == "bpe"
        else {}
    )
    return config.model_copy(update={"model": model, "depth": None, "data": data, "train": TrainConfig(**filled)})


def _training(train: TrainConfig, model: ModelConfig) -> dict[str, Any]:
    """Items 6 to 14, and the checks that need the model."""
    context, muon = model.context_length, train.optimizer == "muon"
    tokens = train.tokens or min(MOST_TOKENS, 20 * multiplied_parameters(model))
    batch = train.batch_tokens or max(context, min(_power_of_two(0.75 * tokens**0.5), tokens) // context * context)
    micro = train.micro_batch_tokens or (
        _largest_part(batch, context, 16_384 * 256 // model.emb_dim) if batch % context == 0 else batch
    )
    problems = [
        f"{name} {value} is not a multiple of context_length {context}: use {max(1, round(value / context)) * context}"
        for name, value in (("train.batch_tokens", batch), ("train.micro_batch_tokens", train.micro_batch_tokens))
        if value and value % context
    ]
    if not problems and batch % micro:
        problems.append(f"train.batch_tokens {batch} is not a multiple of train.micro_batch_tokens {micro}")
    if tokens < batch:
        problems.append(
            f"train.tokens {tokens} is less than one batch of {batch} tokens: train on more, or lower batch_tokens"
        )
    for name in ("warmup_tokens", "cooldown_tokens"):
        if (value := getattr(train, name)) is not None and value > tokens:
            problems.append(f"train.{name} {value} is more than train.tokens {tokens}")
    if problems:
        raise ConfigError("\n".join(problems))
    # A last step that is not full is made full: never less than was asked for.
    steps = min(math.ceil(tokens / batch), MOST_TOKENS // batch)
    every = max(1, math.ceil(steps / 10))
    derived = {
        "batch_tokens": batch,
        "micro_batch_tokens": micro,
        "lr": 0.004 * min(1.0, math.sqrt(768 / model.emb_dim)) if muon else 6e-4 * math.sqrt(768 / model.emb_dim),
        "matrix_lr": 0.02 if muon else None,
        "weight_decay": 0.0 if muon else 0.1,
        "warmup_tokens": tokens // 50,
        "cooldown_tokens": 0 if train.cooldown == "none" else tokens * 2 // 5,
        "init": "zero_output" if muon else "gpt2",
        "eval_every": every,
        "eval_tokens": max(context, min(65_536, tokens // 64)),
        "sample_every": every,
        "save_every": every,
    }
    given = {name: getattr(train, name) for name in derived if getattr(train, name) is not None}
    return derived | given | {"tokens": steps * batch}


def multiplied_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices that a token is multiplied with: those of the blocks, and the head."""
    attention = 2 * model.emb_dim * model.head_dim * (model.n_heads + model.n_kv_heads)
    feed_forward = model.emb_dim * model.hidden_dim * (3 if model.activation == "swiglu" else 2)
    return model.n_layers * (attention + feed_forward) + model.vocab_size * model.emb_dim


def _power_of_two(x: float) -> int:
    return 1 << max(0, round(math.log2(x)))


def _largest_part(batch: int, context: int, most: int) -> int:
    """The largest multiple of `context` that divides `batch` and is at most `most` (or one context)."""
    rows = batch // context
    return context * max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * context <= most))
