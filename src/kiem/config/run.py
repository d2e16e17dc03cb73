"""The run configuration: which model, on which text, trained how.

A field whose default is DERIVED is filled in (config/presets.py) before the run starts; the run folder's `config.yaml`
has no gaps.

Every field is of one of two kinds, and its schema says which (`config/keys.py` reads it): *identity* decides what is
learned, so that changing it makes another run; *execution* decides how, where and with which records the same thing is
learned, and may change whenever a run is resumed. A section's mark holds for all of its fields.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from kiem.config.model import DERIVED, Config, ModelConfig

IDENTITY: dict[str, JsonValue] = {"kind": "identity"}
EXECUTION: dict[str, JsonValue] = {"kind": "execution"}
MOST_TOKENS = 10**15


def _file_name(name: Any) -> str:
    """Text that may name a file. Bytes of a name that are not UTF-8 are in it as os.fsdecode writes them, which
    pydantic's own text does not take."""
    if not isinstance(name, str) or not name:
        raise PydanticCustomError("string_type", "text is expected")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(f"{name!a}: no file can have this name") from None
    return name


FileName = Annotated[str, PlainValidator(_file_name)]


class Source(Config):
    """Where text comes from, and how much of it."""

    path: FileName = Field(
        description="file, folder, glob, '-' (standard input), 'python' (the Python standard "
        "library of this machine), or 'hf:NAME' (Hugging Face datasets, needs kiem[hub])",
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        le=1e6,
        description="share of the training tokens, relative to the weights of the other sources; default: by size",
    )
    text_key: str | None = Field(None, min_length=1, description="as data.text_key, for this source")


class DataConfig(Config):
    """Text and how it becomes tokens."""

    sources: list[Source] = Field(default_factory=lambda: [Source(path="python")], min_length=1, max_length=1000)
    validation: list[Source] | None = Field(None, description="text for evaluation; default: held out from the sources")
    validation_fraction: float = Field(0.01, gt=0.0, lt=1.0, description="share of the documents held out, by content")
    tokenizer: FileName = Field(
        "bpe",
        description="bpe (trained on the text), bytes, chars, a tokenizer.json, "
        "or a folder with vocab.json and merges.txt",
    )
    tokenizer_vocab_size: int | None = Field(
        None, ge=258, le=1_000_000, description="entries of a trained bpe tokenizer"
    )
    text_key: str = Field(
        "text",
        min_length=1,
        description="field or column of the text in JSONL, Parquet and datasets; a.b is field b of field a",
    )
    on_bad_text: Literal["skip", "replace", "error"] = Field(
        "skip",
        description="a document that is not valid UTF-8: left out, read with U+FFFD in place of bad bytes, or refused",
    )
    cross_document_attention: bool = Field(False, description="let packed documents see the ones before them")

    @model_validator(mode="after")
    def _all_weighted_or_none(self) -> "DataConfig":
        without = [source.path for source in self.sources if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(
                f"data.sources: {', '.join(without[:5])} has no weight and others have one: give every source a weight "
                "(PATH=WEIGHT), or none (then shares follow the sizes of the texts)"
            )
        return self


class TrainConfig(Config):
    """The optimization. Sizes are in tokens; learning rates are functions of tokens seen, never of steps."""

    tokens: int = Field(
        DERIVED,
        ge=1,
        le=MOST_TOKENS,
        description="total tokens to train on, rounded up to whole steps",
        json_schema_extra=IDENTITY,
    )
    batch_tokens: int = Field(DERIVED, ge=2, le=10**9, description="tokens per update", json_schema_extra=IDENTITY)
    micro_batch_tokens: int = Field(
        DERIVED,
        ge=2,
        le=10**9,
        description="tokens per forward pass; gradients accumulate over the batch",
        json_schema_extra=EXECUTION,
    )
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for matrices, AdamW for the rest", json_schema_extra=IDENTITY
    )
    lr: float = Field(DERIVED, gt=0.0, le=10.0, description="peak learning rate of AdamW", json_schema_extra=IDENTITY)
    matrix_lr: float = Field(
        DERIVED,
        gt=0.0,
        le=10.0,
        description="peak learning rate of Muon; only with optimizer muon",
        json_schema_extra=IDENTITY,
    )
    weight_decay: float = Field(
        DERIVED, ge=0.0, le=10.0, description="decoupled weight decay, on matrices only", json_schema_extra=IDENTITY
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, json_schema_extra=IDENTITY)
    beta2: float = Field(0.95, ge=0.0, lt=1.0, json_schema_extra=IDENTITY)
    max_grad_norm: float = Field(
        1.0, ge=0.0, le=1e6, description="clip the gradient's global norm to this; 0: off", json_schema_extra=IDENTITY
    )
    warmup_tokens: int = Field(
        DERIVED,
        ge=0,
        description="tokens over which the learning rate rises linearly from 0",
        json_schema_extra=IDENTITY,
    )
    cooldown_tokens: int = Field(
        DERIVED, ge=0, description="tokens over which the learning rate falls, at the end", json_schema_extra=IDENTITY
    )
    cooldown: Literal["none", "linear", "cosine"] = Field(
        "linear", description="shape of the cooldown", json_schema_extra=IDENTITY
    )
    final_lr_fraction: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="learning rate at the last token / peak learning rate",
        json_schema_extra=IDENTITY,
    )
    init: Literal["gpt2", "zero_output"] = Field(
        DERIVED,
        description="initial weights: as GPT-2, or blocks that start as the identity; default zero_output with muon",
        json_schema_extra=IDENTITY,
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 where the hardware supports it",
        json_schema_extra=EXECUTION,
    )
    compile: bool = Field(
        False,
        description="torch.compile the model: seconds to minutes at the start, then faster steps",
        json_schema_extra=EXECUTION,
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute each block in backward: less memory, more time",
        json_schema_extra=EXECUTION,
    )
    skip_batches: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]*(,[1-9][0-9]*)*$",
        max_length=4000,
        description="steps, such as 1205,1206, whose batch is replaced by another, if training fails on it",
        json_schema_extra=EXECUTION,
    )
    stop_on_divergence: bool = Field(
        True, description="stop when the loss has exploded and stays high", json_schema_extra=EXECUTION
    )
    eval_every: int = Field(
        DERIVED, ge=1, description="steps between evaluations on held-out text", json_schema_extra=EXECUTION
    )
    eval_tokens: int = Field(
        DERIVED,
        ge=1,
        description="maximum number of held-out tokens per evaluation during training",
        json_schema_extra=EXECUTION,
    )
    sample_every: int = Field(DERIVED, ge=1, description="steps between samples", json_schema_extra=EXECUTION)
    save_every: int = Field(DERIVED, ge=1, description="steps between checkpoints", json_schema_extra=EXECUTION)
    keep_checkpoints: int = Field(
        2, ge=1, le=10_000, description="number of newest checkpoints kept on disk", json_schema_extra=EXECUTION
    )
    tensorboard: bool = Field(
        False, description="also write TensorBoard files (needs kiem[tensorboard])", json_schema_extra=EXECUTION
    )

    def skipped_steps(self) -> frozenset[int]:
        """The steps of `skip_batches`."""
        return frozenset(map(int, self.skip_batches.split(","))) if self.skip_batches else frozenset()

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.optimizer == "adamw" and self.matrix_lr is not None:
            raise ValueError("matrix_lr has no effect with optimizer 'adamw': remove it, or set optimizer: muon")
        if self.cooldown == "none" and self.cooldown_tokens:
            raise ValueError("cooldown_tokens has no effect with cooldown 'none'")
        if self.batch_tokens and self.micro_batch_tokens and self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of micro_batch_tokens {self.micro_batch_tokens}"
            )
        return self


class RunConfig(Config):
    """Everything that decides a run. Two runs with equal RunConfig and equal text are equal bit for bit on one
    machine."""

    model: ModelConfig = Field(DERIVED, description="the model; or use depth", json_schema_extra=IDENTITY)
    depth: int | None = Field(
        None,
        ge=1,
        le=128,
        description="layers of the default family; everything else follows from it",
        json_schema_extra=IDENTITY,
    )
    data: DataConfig = Field(default_factory=DataConfig, json_schema_extra=IDENTITY)
    train: TrainConfig = Field(default_factory=TrainConfig)
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of initial weights, data order, dropout and samples",
        json_schema_extra=IDENTITY,
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto: a GPU if there is one",
        json_schema_extra=EXECUTION,
    )
