"""Recording in Python and in notebooks: `with kiem.record() as trace: ...`, then ask the trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from kiem.errors import ConfigError
from kiem.inspect.explain import silent
from kiem.inspect.explain.gradients import name_gradients
from kiem.inspect.record.recorder import CompiledRecorder, Recorder
from kiem.inspect.record.state import KEEP_BYTES
from kiem.inspect.verify.verifier import Gap, Result, Verifier, verify_recorded

if TYPE_CHECKING:
    import torch

    from kiem.inspect.explain.chain import Chain
    from kiem.inspect.graph.model import BackwardCall, Graph


class Trace:
    """What a program did: every operation, tensor and gradient.

        with kiem.record() as trace:
            loss = model(x).pow(2).mean()
            loss.backward()
        trace                       # in a notebook: the page
        print(trace.explain("model.0.weight"))
        print(trace.verify())

    `verify=True` checks each gradient while the program runs, which needs no memory afterwards. A function compiled
    by torch.compile is one operation; `eager=True` runs it uncompiled instead, so that its inside is seen. An
    exception of the program passes through; the trace then ends where it was raised. `told` is called with a line on
    what was verified so far."""

    def __init__(
        self,
        verify: bool = False,
        eager: bool = False,
        library: tuple[str, ...] = (),
        title: str = "recorded program",
        told: Callable[[str], None] | None = None,
    ):
        self._verifier = Verifier(told=told) if verify else None
        self._eager = eager
        kind = Recorder if eager else CompiledRecorder
        self._recorder = kind(library, self._verifier, None if verify else KEEP_BYTES)
        self.title = title

    def __enter__(self) -> Trace:
        self._recorder.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._recorder.__exit__(kind, error, traceback)
        name_gradients(self.graph)
        self.graph.notes += silent.notes(self.graph)
        if error is not None and self.graph.failure is not None:
            from kiem.inspect.explain.mistakes import explain_error

            self.graph.failure.explanation = explain_error(error, self.graph) or ""
            files = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
            if self._eager and any("_higher_order_ops" in file for file in files):
                self.graph.failure.explanation = (
                    "torch.cond, scan, map and flex_attention compile what they are given; eager recording keeps them "
                    "from it. Record without --eager (eager=True): each is one operation then."
                )

    @property
    def graph(self) -> Graph:
        """The recorded graph (kiem.inspect.graph.model.Graph)."""
        return self._recorder.graph

    def explain(self, leaf: str | torch.Tensor, backward: int = -1) -> Explanation:
        """The chain rule from the loss of a backward call (the last by default) to a leaf: a tensor, or its name.
        Raises ConfigError if the leaf or the call is not there."""
        from kiem.inspect.explain.chain import chain_rule

        calls = self.graph.backwards
        if not -len(calls) <= backward < len(calls):
            made = "1 backward call" if len(calls) == 1 else f"{len(calls)} backward calls"
            raise ConfigError(f"backward={backward}: the program made {made}")
        with self._recorder.pause():  # in case that it is asked while it records
            return Explanation(chain_rule(self.graph, calls[backward], self._leaf(leaf, calls[backward])))

    def small_chains(self, backward: int = -1) -> list[Chain]:
        """The chain rule of every leaf, where there are few and they are small."""
        from kiem.inspect.explain.chain import chain_rule

        calls = self.graph.backwards
        if not -len(calls) <= backward < len(calls):
            return []
        leaves = list(calls[backward].leaf_grads)
        if len(leaves) > 4 or any(self.graph.value(v).numel > 64 for v in leaves):
            return []
        with self._recorder.pause():
            return [chain_rule(self.graph, calls[backward], v) for v in leaves]

    def _leaf(self, leaf: Any, call: BackwardCall) -> int:
        if isinstance(leaf, str):
            value = next((self.graph.value(v) for v in call.leaf_grads if self.graph.value(v).name == leaf), None)
            value = value or self.graph.find(leaf)
            if value is not None:
                return value.index
            names = sorted({v.name for v in self.graph.leaves() if v.name})
            ending = [name for name in names if name.endswith((f".{leaf}", f"[{leaf}]"))]
            if len(ending) == 1:
                return self._leaf(ending[0], call)
            if ending:
                more = f" and {len(ending) - 20} more" if len(ending) > 20 else ""
                raise ConfigError(f"{leaf}: several names end so: {', '.join(ending[:20])}{more}: give one of them")
            raise ConfigError(
                f"{leaf}: no tensor has this name; leaf tensors with requires_grad=True: "
                f"{', '.join(names[:20]) or 'none'}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
            )
        found = self._recorder.table.find_leaf(leaf)
        if found is None:
            raise ConfigError("explain: this tensor took no part in the recorded program")
        return found

    def verify(self) -> Verification:
        """Hold every gradient against mathematics. Raises ConfigError if the program was too large to keep."""
        with self._recorder.pause():
            result = self._verifier.ended() if self._verifier else verify_recorded(self._recorder.state)
            result.notes += [note for note in self.graph.notes if note not in result.notes]
            known = {gap.text for gap in result.gaps}
            result.gaps += [Gap("unrecorded", note) for note in self.graph.unrecorded if note not in known]
            if self.graph.failure is not None and all(gap.kind != "program" for gap in result.gaps):
                result.gaps.append(Gap("program", f"The program failed: {self.graph.failure.kind}"))
        return Verification(self.graph, result)

    def tensors(self) -> list[dict[str, Any]]:
        """The table of all tensors."""
        from kiem.inspect.explain.chain import tensors

        return tensors(self.graph)

    def to_dict(self, result: Result | None = None) -> dict[str, Any]:
        """Everything, in plain types."""
        from kiem.inspect.show.document import document

        return document(self.graph, self.title, result)

    def html(self, path: str | Path | None = None, result: Result | None = None) -> str:
        """The page, one self-contained file; written to `path` if given."""
        from kiem.inspect.show.page import render

        text = render(self.to_dict(result), self.title)
        if path is not None:
            from kiem.files import write_atomically

            write_atomically(Path(path), text)
        return text

    def __str__(self) -> str:
        from kiem.inspect.show.summary import print_summary

        return _text(lambda console: print_summary(self.graph, console))

    def _repr_html_(self) -> str:
        from html import escape

        result = self._verifier.result if self._verifier else None
        return (f'<iframe srcdoc="{escape(self.html(result=result), quote=True)}" sandbox="allow-scripts" '
                'style="width:100%;height:640px;border:1px solid #8886"></iframe>')  # fmt: skip


class Explanation:
    """A chain rule that prints itself. `.chain` has the numbers."""

    def __init__(self, chain: Chain):
        self.chain = chain

    def __str__(self) -> str:
        from kiem.inspect.show.chain import print_chain

        return _text(lambda console: print_chain(self.chain, console))

    __repr__ = __str__


class Verification:
    """Verdicts that print themselves. `.ok`, `.wrong`, `.result`."""

    def __init__(self, graph: Graph, result: Result):
        self._graph, self.result = graph, result

    @property
    def ok(self) -> bool | None:
        """True: every gradient was checked and is right; False: one is wrong or not finite; None: nothing was found
        wrong, but not everything was checked."""
        return self.result.ok

    @property
    def wrong(self) -> list[str]:
        """FILE:LINE of each operation with a wrong gradient, the first that backward came to first."""
        return [str(self._graph.op(v.op).source) for v in self.result.wrong]

    def minimal_programs(self) -> list[str]:
        """For the first wrong operations: a standalone program each that shows the error, tried beforehand to be
        sure."""
        from kiem.inspect.repro.program import minimal_program

        return [minimal_program(self._graph, self._graph.op(case.verdict.op), case.verdict, case.inputs, case.into)
                for case in self.result.cases]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Verdicts in plain types."""
        from kiem.inspect.show.verdicts import result_dict

        return result_dict(self._graph, self.result)

    def __str__(self) -> str:
        from kiem.inspect.show.verdicts import print_result

        return _text(lambda console: print_result(self._graph, self.result, console))

    __repr__ = __str__


def record(verify: bool = False, eager: bool = False) -> Trace:
    """Record what the block does: `with kiem.record() as trace: ...`. See Trace."""
    return Trace(verify, eager)


def _text(show: Any) -> str:
    from io import StringIO

    from rich.console import Console

    buffer = StringIO()
    show(Console(file=buffer, width=100, color_system=None, force_jupyter=False))
    return buffer.getvalue().rstrip("\n")
