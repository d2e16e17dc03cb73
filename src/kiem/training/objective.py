"""What training minimizes: a loss of a model on a batch, as a sum and the weight that it is divided by.

The step divides the sum over all micro-batches and ranks by the weight of all of them, so that no split of a batch
changes its loss. Next-token prediction is here; fine-tuning brings its own objectives.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from kiem.data.loader import Batch


class Objective(Protocol):
    """A loss. `model` is called as `model(...)` and in no other way; it may be wrapped (DDP, FSDP2, compiled)."""

    def weight(self, batch: Any) -> float:
        """What the batch's loss sum is divided by, known without the model: its valid tokens, its pairs, ..."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float, Mapping[str, Tensor]]:
        """(loss_sum, weight_sum, metrics): a differentiable float32 scalar, weight(batch), and further sums of the
        batch, detached scalars by name, that are reported divided by the same weight."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each next token in nats, over the valid targets of a batch.

    documents_apart: attention and positions begin anew at each document; else a row is one text.
    """

    documents_apart: bool = True

    def weight(self, batch: Batch) -> float:
        """Valid targets."""
        return float(batch.n_valid)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float, Mapping[str, Tensor]]:
        """(sum of the cross-entropy in nats, number of valid targets, no further metrics)."""
        packing = {"positions_BT": batch.positions_BT, "docs_BT": batch.docs_BT} if self.documents_apart else {}
        nats, _ = model(batch.tokens_BT, targets_BT=batch.targets_BT, **packing)
        return nats, self.weight(batch), {}
