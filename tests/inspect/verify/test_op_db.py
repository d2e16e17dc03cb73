"""Every operation of PyTorch that has a derivative, on every sample that PyTorch tests it with (its op_db): what is
called wrong must be wrong by `torch.autograd.gradcheck`, too.

    pytest -m slow -s tests/inspect/verify/test_op_db.py [-k "float32 and 3-of"]
"""

import signal
import time
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from kiem.inspect.trace import Trace

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHARDS = 12
SECONDS = 120  # for one sample
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex128]
# What cannot be checked, by nature; any other reason is a fault of ours.
BY_NATURE = (
    "it is random and gives no mask",
    "its gradient goes through the sample",
    "it says that its backward is no derivative",
    "sparse_compressed_tensor does not support automatic differentiation",  # of complex numbers
)


class TooLong(BaseException):
    """Not an Exception: nobody on the way may take it for a failure of the program's."""


@contextmanager
def bounded(seconds):
    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def operations(shard, dtype):
    pytest.importorskip("expecttest", reason="torch's own samples need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    for number, op in enumerate(op_db):
        if number % SHARDS == shard and op.supports_autograd and dtype in op.supported_backward_dtypes("cpu"):
            yield op


def samples(op, dtype):
    torch.manual_seed(0)
    try:
        yield from op.sample_inputs("cpu", dtype, requires_grad=True)
    except (RuntimeError, NotImplementedError, ValueError):
        return


def differentiable(tree):
    floats = (t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()))
    return [t for t in floats if t.requires_grad]


def run(op, sample, arguments=None):
    """The outputs that have a gradient, of the sample or of other arguments."""
    given, args, kwargs = arguments or (sample.input, sample.args, sample.kwargs)
    return differentiable(sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), given, *args, **kwargs)))


def verified(op, sample):
    """The trace of a run with backward, and its verification; None if nothing has a gradient."""
    torch.manual_seed(0)
    with Trace(verify=True) as trace:
        outputs = run(op, sample)
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    return (trace, trace.verify().result) if outputs else (None, None)


def really_wrong(op, sample):
    """Whether gradcheck, in float64 or complex128, finds the gradient wrong."""

    def wide(t):
        if not isinstance(t, torch.Tensor) or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_(t.requires_grad)

    sample = sample.transform(wide)
    tree = (sample.input, sample.args, sample.kwargs)
    leaves = differentiable(tree)

    def function(*moved):
        by_id = dict(zip(map(id, leaves), moved, strict=True))
        return tuple(run(op, sample, tree_map(lambda t: by_id.get(id(t), t), tree)))

    try:
        torch.autograd.gradcheck(function, leaves, nondet_tol=op.gradcheck_nondet_tol, check_undefined_grad=False)
    except Exception:
        return True
    return False


def judged(op, sample, where, counts):
    """A line for each thing that is not as it should be."""
    try:
        with bounded(SECONDS):
            trace, result = verified(op, sample)
    except TooLong:
        counts["sample took too long"] += 1
        return
    except Exception:
        counts["sample raises"] += 1
        return
    if trace is None:
        counts["sample without gradient"] += 1
        return
    counts["samples"] += 1
    counts.update(v.verdict for v in result.verdicts)
    counts.update(f"leaf {v.verdict}" for _, v in result.parameters)
    for verdict in result.verdicts:
        if verdict.verdict == "unchecked" and not any(reason in verdict.text for reason in BY_NATURE):
            yield f"{where}: {trace.graph.op(verdict.op).label} unchecked: {verdict.text}"
    # A gradient that is NaN or infinite is so, whatever it should be.
    wrong = [v for v in result.wrong if v.verdict == "wrong"]
    if wrong or any(v.verdict == "wrong" for v in result.wrong_parameters):
        if really_wrong(op, sample):
            counts["wrong by gradcheck too"] += 1
        else:
            labels = {trace.graph.op(v.op).label for v in wrong} or {"a leaf, end to end"}
            yield f"{where}: false alarm at {', '.join(sorted(labels))}"


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"{shard}-of-{SHARDS}")
def test_what_is_called_wrong_is_wrong(shard, dtype):
    warnings.simplefilter("ignore")
    counts, faults, began = Counter(), [], time.perf_counter()
    for op in operations(shard, dtype):
        name = f"{op.name}.{op.variant_test_name}".rstrip(".")
        for number, sample in enumerate(samples(op, dtype)):
            faults += judged(op, sample, f"{name} sample {number}", counts)
    print(f"\n{dtype}, shard {shard}: {time.perf_counter() - began:.0f} s, {dict(counts)}")
    assert counts["samples"]
    assert not faults, "\n".join(faults)
