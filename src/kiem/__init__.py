"""Kiem trains language models. The public functions load when first used; importing this package loads nothing else.

run = kiem.train("gpt2-124m", data=["books/"], tokens="50M")
print(kiem.load(run.folder).generate("Once upon a time"))

with kiem.record() as trace:
    loss.backward()
print(trace.verify())
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kiem.api import Run as Run
    from kiem.api import evaluate as evaluate
    from kiem.api import load as load
    from kiem.api import plan as plan
    from kiem.api import prepare as prepare
    from kiem.api import train as train
    from kiem.inspect.trace import Trace as Trace
    from kiem.inspect.trace import record as record

__all__ = ["Run", "Trace", "evaluate", "load", "plan", "prepare", "record", "train"]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("kiem")
    if name not in __all__:
        raise AttributeError(f"module 'kiem' has no attribute {name!r}")
    found = getattr(importlib.import_module("kiem.inspect.trace" if name in ("Trace", "record") else "kiem.api"), name)
    globals()[name] = found  # the next access does not come here
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
