"""How well a model predicts held-out text."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from kiem.data.loader import IGNORE, validation_batches
from kiem.data.shards import Dataset, Split
from kiem.errors import DataError
from kiem.model.transformer import Transformer
from kiem.training.objective import NextToken, Objective


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token; perplexity: exp(loss); bits_per_byte: all nats / ln 2 / bytes of the text, None where the
    tokenizer loses text (it would be the figure of another text) or there is none; seconds: it took; part: of the
    held-out text, "whole" or the "sample" that is the same at every point of a run's curve."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    part: Literal["whole", "sample"] = "whole"


@torch.no_grad()
def evaluate(
    model: Transformer,
    dataset: Dataset,
    batch_tokens: int,
    max_tokens: int | None = None,
    objective: Objective | None = None,
) -> Evaluation:
    """Loss over the dataset's held-out text in windows of the model's context, each token predicted once.

    batch_tokens: of one forward pass. max_tokens: only about so many tokens, evenly spread, the same every time; where
    there are no more than that, it is the whole.
    Ends of text are predicted too; they stand for no bytes. objective: as in training,
    by default NextToken.
    """
    began, was_training = time.perf_counter(), model.training
    objective, held_out = objective or NextToken(), _held_out(dataset)
    model.eval()
    device, context = model.device, model.config.context_length
    nats, tokens, n_bytes = 0.0, 0, 0
    try:
        for batch in validation_batches(held_out, context, max(1, batch_tokens // context), max_tokens):
            nats += objective.loss(model, batch.to(device))[0].item()
            targets = batch.targets_BT[batch.targets_BT != IGNORE].numpy()
            tokens += len(targets)
            n_bytes += batch.target_bytes()
    finally:
        model.train(was_training)
    loss = nats / tokens
    bits = nats / math.log(2) / n_bytes if n_bytes and dataset.lossless else None
    perplexity = math.exp(loss) if loss < 700 else math.inf
    part: Literal["whole", "sample"] = "whole" if tokens == held_out.n_tokens - 1 else "sample"
    return Evaluation(loss, perplexity, bits, tokens, n_bytes, time.perf_counter() - began, part)


def _held_out(dataset: Dataset) -> Split:
    if dataset.validation is None or dataset.validation.n_tokens < 2:
        raise DataError(
            "there is no held-out text to evaluate on: set data.validation, or a larger data.validation_fraction"
        )
    return dataset.validation
