"""The table of derivatives, one row per operation. Importing the parts fills it."""

from kiem.inspect.rules import (
    activations,
    attention,
    complex_numbers,
    indexing,
    losses,
    matrix,
    network,
    pointwise,
    recurrent,
    reduce,
    shapes,
)
from kiem.inspect.rules.table import RULES, Call, Rule, find, formula, local_derivative, substituted

PARTS = (
    pointwise, complex_numbers, activations, reduce, matrix, shapes, indexing, network, losses, attention, recurrent,
)  # fmt: skip

__all__ = ["PARTS", "RULES", "Call", "Rule", "find", "formula", "local_derivative", "substituted"]
