"""Kiem trains language models. The public functions load when first used; importing this package loads nothing else.

    run = kiem.train("gpt2-124m", data=["books/"], tokens="50M")
    print(kiem.load(run.folder).generate("Once upon a time"))

    with kiem.record() as trace:
        loss.backward()
    print(trace.verify())
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["Run", "Trace", "evaluate", "load", "plan", "prepare", "record", "train"]

_ROOMS_AND_VERBS = ("plan", "train")


class _RoomAndVerb(ModuleType):
    """A room that has the name of a verb: `kiem.train(...)` trains, `kiem.train.loop` is a module of the room."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        api = importlib.import_module("kiem.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package: whenever one of those rooms is imported, by whomever, it can be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS_AND_VERBS and type(value) is ModuleType:
            value.__class__ = _RoomAndVerb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kiem")
    if name in _ROOMS_AND_VERBS:
        return importlib.import_module(f"kiem.{name}")
    if name in ("Trace", "record"):
        return getattr(importlib.import_module("kiem.trace"), name)
    if name in __all__:
        return getattr(importlib.import_module("kiem.api"), name)
    raise AttributeError(f"module 'kiem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
