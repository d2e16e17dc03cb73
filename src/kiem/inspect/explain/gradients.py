"""Gradients by name: the tensor that an optimizer reads as `w.grad`."""

from __future__ import annotations

from kiem.inspect.graph.model import Graph


def name_gradients(graph: Graph) -> None:
    """Call a nameless tensor from outside `w.grad` if it has exactly the statistics of the gradient that one leaf got,
    and no other leaf's of its shape."""
    leaves: dict[tuple, set[str]] = {}
    for call in graph.backwards:
        for leaf, gradient in call.leaf_grads.items():
            if (name := graph.value(leaf).name) and gradient.stats.norm:
                leaves.setdefault((gradient.shape, gradient.stats), set()).add(name)
    for value in graph.values:
        if value.name is None and value.producer is None and not value.requires_grad and value.stats is not None:
            names = leaves.get((value.shape, value.stats), set())
            if len(names) == 1:
                value.name = f"{next(iter(names))}.grad"
