"""Numbers, gradients and lines as the terminal shows them."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from kiem.format import integer_text, number_text, printable
from kiem.inspect.graph.model import Gradient

MOST_NUMBERS = 6  # of a tensor that are written out


def number(x: float) -> str:
    """Four decimals; fewer if those are zeros: 0.0750, 1.1."""
    short = f"{x:.6g}"
    exact = math.isfinite(x) and "e" not in short and len(short.partition(".")[2]) <= 3
    return short if exact else number_text(float(x))


def values_text(values: Any) -> str:
    """Nested lists of numbers on one line, cut after a few."""
    if not isinstance(values, list):
        return number(values) if isinstance(values, int | float) else str(values)
    flat = values_of(values)
    if len(flat) > MOST_NUMBERS:
        return f"[{', '.join(values_text(v) for v in flat[:MOST_NUMBERS])}, … {len(flat)} numbers]"
    return number(flat[0]) if len(flat) == 1 and isinstance(flat[0], int | float) else \
        f"[{', '.join(values_text(v) for v in values)}]"  # fmt: skip


def values_of(values: Any) -> list:
    """The elements of nested lists."""
    return [x for v in values for x in values_of(v)] if isinstance(values, list) else [values]


def gradient_text(gradient: Gradient) -> str:
    """A gradient's value when it is small, else its shape and norm."""
    bad = f", {gradient.stats.nonfinite} not finite" if gradient.stats.nonfinite else ""
    if gradient.data is not None and len(values_of(gradient.data)) <= MOST_NUMBERS:
        return values_text(gradient.data)
    norm = "unknown" if math.isnan(gradient.stats.norm) else number(gradient.stats.norm)
    return f"{shape_text(gradient.shape)} with norm {norm}{bad}"


def shape_text(shape: Any) -> str:
    """(2×3)."""
    return f"({'×'.join(map(str, shape))})"


def count_text(n: int, what: str, plural: str = "") -> str:
    """1 step, 2 steps."""
    return f"{integer_text(n)} {what if n == 1 else plural or what + 's'}"


def block(module: str) -> str:
    """The module that steps are folded to: the path up to its first number, `model.h.3` of `model.h.3.attn.c_proj`."""
    parts = module.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: numbered + 1])


class Say:
    """Prints lines of foreign text: no markup, no control characters, nothing that the console's encoding lacks."""

    def __init__(self, console: Console):
        self._console = console

    def __call__(self, head: str, rest: str, style: str = "") -> None:
        indent = 0 if head else len(rest) - len(rest.lstrip())
        text = Text()
        text.append(self._safe(head), style=style or "bold")
        text.append(self._safe(rest.strip() if indent else rest.rstrip()), style=style if not head else None)
        for line in text.wrap(self._console, max(self._console.width - indent, 20), overflow="fold"):
            line.rstrip()
            self._console.print(Text(" " * indent) + line, soft_wrap=True)

    def _safe(self, part: str) -> str:
        part, encoding = printable(part), self._console.options.encoding
        ascii_only = self._console.options.ascii_only
        return part.encode(encoding, "backslashreplace").decode(encoding) if ascii_only else part
