"""The table of derivatives, one row per operation."""

from kiem.grad.rules import attention, matrix, network, pointwise, reduce, shapes
from kiem.grad.rules.table import RULES, Call, Rule, find, formula, local_derivative, substituted

__all__ = ["RULES", "Call", "Rule", "attention", "find", "formula", "local_derivative", "matrix", "network", "pointwise",
           "reduce", "shapes", "substituted"]  # fmt: skip
