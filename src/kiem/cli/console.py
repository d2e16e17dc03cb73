"""Where subcommands print: results on standard output, what is only of interest on the way on standard error.

No failure to print ends anything that runs: what cannot be written to standard error is dropped, and standard output
that is closed or full is told by `main` once the work is done.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import IO, Any

import click

from kiem.errors import StorageError
from kiem.files import to_json
from kiem.training.progress import Shield, StatusLine

__all__ = ["StatusLine", "print_json", "print_rich", "safe_streams", "to_stderr"]


class OutputError(StorageError):
    """Standard output cannot be written."""


class ReaderGone(Exception):
    """The reader of standard output has what it wanted and has left."""


class _Output:
    """Standard output whose failures are KiemErrors."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError("text is expected")
        return self._try("write", text)

    def flush(self) -> None:
        if self._stream is not None:
            self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, name: str, *arguments: Any) -> Any:
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, "it is closed")
            return getattr(self._stream, name)(*arguments)
        except BrokenPipeError as problem:
            raise ReaderGone from problem
        except UnicodeEncodeError:
            stream = self._stream
            encoding = getattr(stream, "encoding", None) or "ascii"
            return self._try(name, arguments[0].encode(encoding, "backslashreplace").decode(encoding))
        except OSError as problem:
            raise OutputError(
                f"cannot write to standard output: {problem.strerror or problem}. The work itself is done; only its "
                "output was lost. Redirect it to a file, or run it again"
            ) from problem

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def safe_streams() -> tuple[Any, Any]:
    """(standard output, standard error) made so that a failure of one is told as such, of the other not at all."""
    return _Output(sys.stdout), Shield(sys.stderr)


def silence_output() -> None:
    """Let nothing more be written to standard output: the interpreter flushes it at its end, and would complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(to_json(value, indent=1))


def print_rich(renderable: Any) -> None:
    """A rich renderable on standard output."""
    from rich.console import Console

    Console().print(renderable)


def to_stderr(renderable: Any) -> None:
    """A rich renderable on standard error."""
    from rich.console import Console

    Console(stderr=True).print(renderable)
