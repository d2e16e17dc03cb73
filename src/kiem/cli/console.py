"""Where verbs print: results on standard output, what is only of interest on the way on standard error."""

import json
import sys
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_rich(renderable: Any) -> None:
    """A rich renderable on standard output."""
    from rich.console import Console

    Console().print(renderable)


def to_stderr(renderable: Any) -> None:
    """A rich renderable on standard error."""
    from rich.console import Console

    Console(stderr=True).print(renderable)


class StatusLine:
    """One line on a terminal's standard error that is written over; nothing elsewhere."""

    def __init__(self, wanted: bool = True):
        import time

        self._clock, self._shown, self._wanted = time.monotonic, 0.0, wanted and sys.stderr.isatty()
        self._there = False

    def __call__(self, text: str) -> None:
        """Show a text, at most twice a second."""
        if self._wanted and self._clock() - self._shown > 0.5:
            self._shown, self._there = self._clock(), True
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._there:
            self._there = False
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def beside(self, stream: Any) -> Any:
        """The stream; what is written to it takes the line away first."""
        return _Beside(self, stream) if self._wanted else stream


class _Beside:
    def __init__(self, line: StatusLine, stream: Any):
        self._line, self._stream = line, stream

    def write(self, text: str) -> int:
        self._line.clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
