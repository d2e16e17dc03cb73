"""Shared by all tests: the process stays as Python and torch start it."""

import os
import sys

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two workers with two threads each on two cores wait for each other: small operations take a hundred times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test` asks the same examples each time: a change that passes here passes elsewhere. `make fuzz` asks new ones.
settings.register_profile("default", derandomize=True)
settings.register_profile("fuzz", derandomize=False)
settings.load_profile(os.environ.get("KIEM_HYPOTHESIS", "default"))


@pytest.fixture(autouse=True)
def _torch_as_it_starts():
    """Training flushes denormals to zero, which hypothesis' float strategies refuse to work with; programs under test
    set the default type."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _what_cannot_be_recorded_fails(monkeypatch, request):
    """A program goes on when recording fails, a test does not."""
    if "torch" in sys.modules and "lenient" not in request.keywords:
        from kiem.inspect.record.state import RecordState

        def failed(self, what, where, error):
            raise error

        monkeypatch.setattr(RecordState, "failed", failed)
    yield
