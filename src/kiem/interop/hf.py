"""Weights to and from Hugging Face names and layouts. The tables are in families.py."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kiem.config.model import ModelConfig
from kiem.errors import CheckpointError
from kiem.interop.families import NO_WEIGHT, WEIGHTS, Family, Weight, require_family, to_hf_config
from kiem.model.transformer import Transformer


def to_hf_state(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the names and in the layout of its family, float32, contiguous.

    A tied head is left out, as transformers does. A bias that the family has and the model has not is zero.
    ConfigError when the model is in no family.
    """
    family, hf_config = require_family(model.config), to_hf_config(model.config)
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state = {}
    for weight, kiem, hf in _modules(family, model.config):
        state[f"{hf}.weight"] = _stored([ours[f"{name}.weight"] for name in kiem], weight.transposed)
        if hf_config.get(weight.bias, False) if isinstance(weight.bias, str) else weight.bias:
            biases = [
                ours.get(f"{name}.bias", torch.zeros(len(ours[f"{name}.weight"]), device=ours[f"{name}.weight"].device))
                for name in kiem
            ]
            state[f"{hf}.bias"] = _stored(biases)
    return state


def from_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kiem's state dict, float32, from a Hugging Face one of the same model.

    The base model's prefix may be missing ("h.0..." for "transformer.h.0..."), as in the files of GPT-2.
    CheckpointError names a tensor that is missing, has another shape, or has no place in the config.
    """
    family = require_family(config)
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Transformer(config).state_dict().items()}
    rest = {name: tensor for name, tensor in state.items() if not name.endswith(NO_WEIGHT[family.name])}
    ours = {}
    for weight, kiem, hf in _modules(family, config):
        for kind in ("weight", "bias"):
            parts = [(f"{name}.{kind}", expected[f"{name}.{kind}"]) for name in kiem if f"{name}.{kind}" in expected]
            tensor = _take(rest, f"{hf}.{kind}")
            if parts:
                if tensor is None and kind == "weight":
                    raise CheckpointError(f"tensor {hf}.weight is missing, and this {family.name} model needs it")
                ours.update(_split(tensor, parts, f"{hf}.{kind}", weight.transposed))
            elif tensor is not None and bool(tensor.any()):
                raise CheckpointError(
                    f"tensor {hf}.{kind} is not zero, and the model config has no bias there "
                    f"(qkv_bias {config.qkv_bias}, bias {config.bias}): turn it on"
                )
    head = rest.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head.float(), ours["tok_emb.weight"]):
        raise CheckpointError("tensor lm_head.weight differs from the token embedding: set tie_embeddings: false")
    if rest:
        raise CheckpointError(
            f"the weights hold tensors that a {family.name} model of this config does not have: "
            f"{', '.join(sorted(rest)[:5])}{' ...' if len(rest) > 5 else ''}"
        )
    return ours


def _modules(family: Family, config: ModelConfig) -> Iterator[tuple[Weight, list[str], str]]:
    """Every module of the model: its row of the table, Kiem's module names, the Hugging Face module name."""
    for weight in WEIGHTS[family.name]:
        if weight.untied and config.tie_embeddings:
            continue
        for i in range(config.n_layers if "{i}" in weight.hf else 1):
            yield weight, [name.format(i=i) for name in weight.kiem], weight.hf.format(i=i)


def _stored(tensors: list[Tensor], transposed: bool = False) -> Tensor:
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return (tensor.T if transposed and tensor.ndim == 2 else tensor).float().contiguous()


def _take(rest: dict[str, Tensor], name: str) -> Tensor | None:
    """Remove and return the tensor of that name, with or without the base model's prefix."""
    if name in rest:
        return rest.pop(name)
    return rest.pop(name.partition(".")[2], None)


def _split(tensor: Tensor | None, parts: list[tuple[str, torch.Size]], hf: str, transposed: bool) -> dict[str, Tensor]:
    """Cut a stored tensor into Kiem's parameters; a missing one (a bias) is zero."""
    if tensor is None:
        return {name: torch.zeros(shape) for name, shape in parts}
    if transposed and tensor.ndim == 2:
        tensor = tensor.T
    rows = [shape[0] for _, shape in parts]
    wanted = (sum(rows), *parts[0][1][1:])
    if tuple(tensor.shape) != wanted:
        names = ", ".join(name for name, _ in parts)
        raise CheckpointError(
            f"tensor {hf} is {tuple(tensor.shape)}{' after transposition' if transposed else ''}, "
            f"and the model config needs {wanted} for {names}"
        )
    pieces = tensor.float().split(rows)
    return {name: piece.contiguous() for (name, _), piece in zip(parts, pieces, strict=True)}
