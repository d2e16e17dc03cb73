"""The table of derivatives, one row per operation. Importing the parts fills it."""

from kiem.grad.rules import (
    activations,
    attention,
    indexing,
    losses,
    matrix,
    network,
    pointwise,
    recurrent,
    reduce,
    shapes,
)
from kiem.grad.rules.table import RULES, Call, Rule, find, formula, local_derivative, substituted

PARTS = (pointwise, activations, reduce, matrix, shapes, indexing, network, losses, attention, recurrent)

__all__ = ["PARTS", "RULES", "Call", "Rule", "find", "formula", "local_derivative", "substituted"]
