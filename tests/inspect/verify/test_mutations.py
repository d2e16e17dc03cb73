"""Backwards that are wrong on purpose, around every operation of PyTorch that has a derivative, on random samples of
its op_db: each is found, or it is said that the check was too coarse to tell. The same backward unspoilt is never
called wrong.

    pytest -m slow -s tests/inspect/verify/test_mutations.py [-k "float32 and 3-of"]
    KIEM_MUTATIONS=7 pytest ...      # other samples and mutations than those of seed 0; the seed is printed"""

import itertools
import os
import random
import time
import warnings
from collections import Counter

import pytest
import torch
from tests.inspect.verify.test_op_db import TooLong, bounded, differentiable, operations, samples
from torch.utils._pytree import tree_map

from kiem.inspect.record.recorder import Recorder
from kiem.inspect.verify.verifier import Verifier

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SEED = int(os.environ.get("KIEM_MUTATIONS", "0"))
SHARDS = 12
SECONDS = 30  # for one sample
EACH = 2  # samples of each operation
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
LEAST = 0.04  # of the size of the gradient: smaller changes are not tried
FACTORS = (1.05, 1.2, 1.5, 2.0)
# By definition without the derivative of what they draw; on memory beside that of the tensor that they are given.
LEFT_OUT = ("normal", "as_strided")
EDGE = "all elements of target should be between 0 and 1"  # along some directions a target leaves its range


class Case:
    """One sample as a function of its leaves, that is run again and again."""

    def __init__(self, op, sample):
        self.op, self.sample = op, sample
        self.tree = sample.input, sample.args, sample.kwargs
        self.leaves = differentiable(self.tree)
        plain = self(self.leaves)
        self.kept = [i for i, y in enumerate(plain) if y.requires_grad]
        again = self(self.leaves)
        self.steady = all(torch.equal(a.detach(), b.detach()) for a, b in zip(plain, again, strict=True))
        self.cotangents = [torch.randn_like(plain[i]) for i in self.kept]

    def __call__(self, leaves):
        by_id = dict(zip(map(id, self.leaves), leaves, strict=True))
        given, args, kwargs = tree_map(lambda t: by_id.get(id(t), t), self.tree)
        made = self.op.gradcheck_wrapper(self.op.get_op(), given, *args, **kwargs)
        made = self.sample.output_process_fn_grad(made)
        flat = made if isinstance(made, list | tuple) else (made,)
        return [y for y in flat if isinstance(y, torch.Tensor) and (y.is_floating_point() or y.is_complex())]

    def outputs(self, leaves):
        """Those that have a gradient, in memory of their own."""
        made = self(leaves)
        return [made[i].clone() for i in self.kept]

    def gradients(self, leaves, cotangents):
        """By torch."""
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in leaves]
            made = self(own)
            pairs = [
                (made[i], g)
                for i, g in zip(self.kept, cotangents, strict=True)
                if g is not None and made[i].requires_grad
            ]
            found = torch.autograd.grad([y for y, _ in pairs], own, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(own, found, strict=True)]

    def in_double(self):
        """The gradients in complex128, computed in float64."""

        def wide(t):
            if not isinstance(t, torch.Tensor) or not (t.is_floating_point() or t.is_complex()):
                return t
            return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_(t.requires_grad)

        case = Case.__new__(Case)
        case.op, case.sample, case.kept = self.op, self.sample.transform(wide), self.kept
        case.tree = case.sample.input, case.sample.args, case.sample.kwargs
        case.leaves = differentiable(case.tree)
        return [g.to(torch.complex128) for g in case.gradients(case.leaves, list(map(wide, self.cotangents)))]


def as_function(case, spoil):
    """A custom Function."""

    class Mutated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return tuple(case.outputs(leaves))

        @staticmethod
        def backward(ctx, *cotangents):
            return tuple(spoil(case.gradients(ctx.saved_tensors, cotangents)))

    return Mutated.apply


_names = itertools.count()


def as_operation(case, spoil, library):
    """An operation of torch.library with a derivative that is registered for it."""
    name = f"mutated{next(_names)}"
    tensors = ", ".join(f"Tensor x{i}" for i in range(len(case.leaves)))
    results = "Tensor" if len(case.kept) == 1 else f"({', '.join(['Tensor'] * len(case.kept))})"
    library.define(f"{name}({tensors}) -> {results}")

    def forward(*leaves):
        made = case.outputs([t.detach() for t in leaves])
        return made[0] if len(made) == 1 else tuple(made)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, *cotangents):
        made = spoil(case.gradients(ctx.saved_tensors, cotangents))
        return made[0] if len(made) == 1 else tuple(made)

    library.impl(name, forward, "CPU")
    torch.library.register_autograd(f"{library.ns}::{name}", backward, setup_context=setup, lib=library)
    return getattr(getattr(torch.ops, library.ns), name)


def mutations(gradient):
    """name -> what is done to the gradient."""
    yield from ((f"times {f}", lambda g, f=f: g * f) for f in FACTORS)
    yield "zero", torch.zeros_like
    yield "sign", torch.neg
    if gradient.numel() > 1:
        yield "shifted", lambda g: g.reshape(-1).roll(1).reshape(g.shape)
        yield "half dropped", lambda g: g * (torch.arange(g.numel(), device=g.device).view(g.shape) % 2)
    if gradient.dim() > 1 and gradient.shape[-1] == gradient.shape[-2] > 1:
        yield "transposed", lambda g: g.mT.clone()
    if gradient.is_complex():
        yield "conjugated", lambda g: g.conj().resolve_conj()


def verdicts(case, call):
    """The verdict on the operation that was made, of each of its inputs."""
    verifier = Verifier(end_to_end=False)
    with Recorder(observer=verifier, keep=None) as recorder:
        leaves = [t.detach().requires_grad_() for t in case.leaves]
        made = call(*leaves)
        made = list(made) if isinstance(made, list | tuple) else [made]
        torch.autograd.backward(made, case.cotangents)
    return [
        v
        for v in verifier.ended().verdicts
        if (name := recorder.graph.op(v.op).name) == "Mutated" or name.startswith("kiem_mutations")
    ]


def chosen(case, draw):
    """A mutation of one gradient that changes it by enough, with by how much; None if there is none, as where the
    gradient is zero but for its rounding."""
    plain = [g.to(torch.complex128) for g in case.gradients(case.leaves, case.cotangents)]
    exact = case.in_double()
    if not all(bool(torch.isfinite(g.abs()).all()) for g in plain):
        return None
    at = draw.choice(range(len(plain)))
    size = float(torch.linalg.vector_norm(plain[at]))
    if not float(torch.linalg.vector_norm(plain[at] - exact[at])) <= 0.1 * size:
        return None
    found = list(mutations(case.leaves[at]))
    draw.shuffle(found)
    for name, change in found:
        by = float(torch.linalg.vector_norm(change(plain[at]) - plain[at]))
        if size and by >= LEAST * size:
            return at, name, change, by / size
    return None


def tried(case, draw, library, counts, seen):
    """What is not as it should be, in words, of one sample."""
    form = draw.choice(("function", "operation"))

    def made(spoil):
        return as_function(case, spoil) if form == "function" else as_operation(case, spoil, library)

    cannot = set()
    for verdict in verdicts(case, made(lambda gradients: gradients)):
        counts[f"control {verdict.verdict}"] += 1
        cannot.add(verdict.text if verdict.verdict == "unchecked" else "")
        if verdict.verdict == "wrong":
            yield f"{form}: false alarm {verdict.inputs}"
    change = chosen(case, draw)
    if change is None:
        counts["no gradient to change"] += 1
        return
    at, name, how, by = change

    def spoil(gradients):
        return [how(g) if i == at else g for i, g in enumerate(gradients)]

    for verdict in verdicts(case, made(spoil)):
        counts[verdict.verdict] += 1
        seen[name.split()[0], verdict.verdict] += 1
        finest = max((v.sharpness for v in verdict.inputs), default=0.0)
        if verdict.verdict not in ("wrong", "coarse", "unchecked") and by > finest:
            yield f"{form}: {name} of gradient {at} (by {by:.3g}) is {verdict.verdict}: {verdict.inputs}"
        # Of some samples torch's own backward is wrong, which is said, and nothing of what is around it; some cannot be
        # run again, whatever their backward gives.
        if (
            verdict.verdict == "unchecked"
            and not verdict.text.endswith("which is wrong")
            and verdict.text not in cannot
        ):
            yield f"{form}: unchecked: {verdict.text}"


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"{shard}-of-{SHARDS}")
def test_what_is_wrong_is_found(shard, dtype):
    warnings.simplefilter("ignore")
    counts, seen, faults, began = Counter(), Counter(), [], time.perf_counter()
    with torch.library._scoped_library("kiem_mutations", "FRAGMENT") as library:
        for op in operations(shard, dtype):
            if op.name.startswith(LEFT_OUT):
                continue
            draw = random.Random(f"{SEED} {op.name} {op.variant_test_name} {dtype}")
            every = list(samples(op, dtype))
            for number in sorted(draw.sample(range(len(every)), min(EACH, len(every)))):
                torch.manual_seed(number)
                where = f"{op.name}.{op.variant_test_name}".rstrip(".") + f" sample {number}"
                try:
                    with bounded(SECONDS):
                        case = Case(op, every[number])
                        if not case.steady or not case.kept:
                            counts["random or without gradient"] += 1
                            continue
                        faults += (f"{where}: {fault}" for fault in tried(case, draw, library, counts, seen))
                except TooLong:
                    counts["took too long"] += 1
                except Exception as reason:
                    counts[f"raises {type(reason).__name__}"] += 1
                    if os.environ.get("KIEM_DEBUG"):
                        print(where, type(reason).__name__, str(reason)[:200])
    print(f"\nseed {SEED}, {dtype}, shard {shard}: {time.perf_counter() - began:.0f} s, {dict(counts)}\n{dict(seen)}")
    assert counts["wrong"]
    assert not faults, "\n".join(faults)
