"""Progress of a run: one live line in a terminal, plain lines anywhere else. It never slows or ends a run.

The live line is drawn at most 10 times a second. Plain lines hold no control characters and come at growing intervals,
from 2 seconds to one minute. A stream that fails (a closed pipe) makes progress silent; training goes on.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from kiem.format import bytes_text, integer_text, is_number, number_text, percent_text, plural, printable, seconds_text
from kiem.runs.metrics import Smoothed

SMOOTHING_STEPS = 20
SECONDS_BETWEEN_FRAMES = 0.1
PLAIN_SECONDS = (2.0, 60.0)
SAMPLE_LINES, SAMPLE_LINE_CHARACTERS = 12, 100
BAR_CELLS, NARROW_BAR_CELLS = 12, 6
# What becomes of a line that is wider than the terminal: it flows over the edge, so that what is copied from it is
# whole; it breaks between words; it is cut.
FITS: dict[str, dict[str, Any]] = {
    "flow": {"soft_wrap": True},
    "words": {},
    "cut": {"no_wrap": True, "overflow": "ellipsis"},
}


class Progress:
    """Shows a run of `total_tokens` tokens and `total_steps` updates; `tokens` were seen before this start.

    Records are those of metrics.jsonl and samples.jsonl (runs/metrics.py). `stream` defaults to standard error.
    """

    def __init__(
        self,
        total_tokens: int,
        total_steps: int,
        *,
        tokens: int = 0,
        stream: IO[str] | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_tokens, self.total_steps = total_tokens, total_steps
        self._clock, self._smoothed = clock, Smoothed(SMOOTHING_STEPS)
        self._out = _Output(sys.stderr if stream is None else stream, quiet)
        self._began = self._shown = clock()
        self._steps_seen = 0
        # The first update is slow (warm-up, compilation): the estimate counts from its end.
        self._eta_from: tuple[float, int] | None = None
        self._tokens = tokens
        self._line: list[str] = []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, record: Mapping[str, Any]) -> None:
        """Take in a `step` record and show it if it is time. Costs microseconds."""
        now = self._clock()
        loss = record.get("loss")
        smoothed = self._smoothed.update(loss if isinstance(loss, int | float) else math.nan)
        self._steps_seen += 1
        self._tokens = record["tokens"]
        if self._eta_from is None:
            self._eta_from = (now, self._tokens)
        last = self._tokens >= self.total_tokens
        first = self._steps_seen == 1
        if not (first or last or now - self._shown >= self._interval(now)):
            return
        self._shown = now
        self._line = self._parts(record, smoothed, now)
        if self._out.live:
            self._out.draw(self._line)
        else:
            self._out.line("  ".join(self._line))

    def eval(self, record: Mapping[str, Any]) -> None:
        """Print the line of an `eval` record."""
        bits = record["bits_per_byte"]
        per_byte = "no bits per byte (lossy tokenizer)" if bits is None else f"{number_text(bits)} bits per byte"
        self._out.line(
            f"eval at step {integer_text(record['step'])}: held-out loss {number_text(record['loss'])}, "
            f"perplexity {number_text(record['perplexity'], 2)}, {per_byte} "
            f"({'all ' if record.get('part') == 'whole' else ''}{plural(record['eval_tokens'], 'token')} in "
            f"{seconds_text(record['seconds'])})",
            style="bold",
            fit="words",
        )

    def save(self, record: Mapping[str, Any]) -> None:
        """Print the line of a `save` record."""
        self._out.line(f"saved {record['path']} ({bytes_text(record['bytes'])} in {seconds_text(record['seconds'])})")

    def sample(self, record: Mapping[str, Any]) -> None:
        """Print a sample of samples.jsonl, shortened. A model wrote it: control characters are shown as escapes."""
        self._out.line(f"sample at step {integer_text(record['step'])}:")
        text = printable(f"{record['prompt']}{record['text']}").expandtabs(4)
        lines = text.rstrip().split("\n")
        for line in lines[:SAMPLE_LINES]:
            cut = line if len(line) <= SAMPLE_LINE_CHARACTERS else line[: SAMPLE_LINE_CHARACTERS - 3] + "..."
            self._out.line(f"  | {cut}".rstrip(), style="dim", fit="cut")
        if len(lines) > SAMPLE_LINES:
            self._out.line(f"  | ... {plural(len(lines) - SAMPLE_LINES, 'more line')} in samples.jsonl", style="dim")

    def note(self, text: str) -> None:
        """Print a message of the trainer as it stands."""
        for line in printable(text).split("\n"):
            self._out.line(line)

    def close(self) -> None:
        """Leave the last state on the screen and free the line. May be called twice."""
        self._out.close(self._line)

    def _interval(self, now: float) -> float:
        if self._out.live:
            return SECONDS_BETWEEN_FRAMES
        low, high = PLAIN_SECONDS
        return min(max((now - self._began) / 10, low), high)

    def _eta(self, now: float) -> float | None:
        """Seconds left at the mean pace since the first update, evaluations and saves included; None while unknown."""
        since, tokens_then = self._eta_from or (now, self._tokens)
        if self._tokens <= tokens_then or now <= since:
            return None
        return max(self.total_tokens - self._tokens, 0) * (now - since) / (self._tokens - tokens_then)

    def _parts(self, record: Mapping[str, Any], smoothed: float, now: float) -> list[str]:
        """The line's parts, the most important first."""
        share = min(self._tokens / self.total_tokens, 1.0) if self.total_tokens else 1.0
        loss = record.get("loss")
        shown = number_text(smoothed if is_number(loss) else loss)
        label = "smoothed loss" if is_number(loss) and self._steps_seen > 1 else "loss"
        eta = self._eta(now)
        done = f"{int(100 * share)} %"
        if self._out.live:
            cells = BAR_CELLS if self._out.width > 80 else NARROW_BAR_CELLS
            full = round(share * cells)
            done = "━" * full + "─" * (cells - full) + f" {done}"
            if self._out.width <= 80:
                label = "loss"
        return [
            f"step {integer_text(record['step'])}/{integer_text(self.total_steps)}",
            f"{label} {shown}",
            *([f"ETA {seconds_text(eta)}"] if eta else []),
            done,
            f"{integer_text(record.get('tokens_per_second'))} tokens/s",
            f"{percent_text(record.get('matmul_share'))} of peak matmul throughput",
        ]


class StatusLine:
    """The one line on a terminal that is written over, with permanent lines above it; plain text where there is no such
    terminal. A stream that fails (a closed pipe, a full disk) makes it silent and never raises."""

    def __init__(self, wanted: bool = True, stream: IO[str] | None = None, seconds: float = 0.5) -> None:
        """`seconds`: least time between two states of the line."""
        self._out = _Output(sys.stderr if stream is None else stream, not wanted)
        self._seconds, self._shown, self._parts = seconds, -math.inf, [""]

    def __call__(self, text: str) -> None:
        """Show a text on the line, if it is time; nothing where lines cannot be written over."""
        self._parts = [printable(text)]
        if self._out.live and time.monotonic() - self._shown >= self._seconds:
            self._shown = time.monotonic()
            self._out.draw(self._parts)

    def line(self, text: str, style: str = "", fit: str = "flow") -> None:
        """A permanent line. `fit`: see `FITS`."""
        self._out.line(printable(text), style, fit)

    def clear(self) -> None:
        """Take the line away."""
        self._out.close([])

    def beside(self, stream: Any) -> Any:
        """The stream; what is written to it takes the line away first."""
        return _Beside(self, stream)


class _Beside:
    def __init__(self, line: StatusLine, stream: Any) -> None:
        self._line, self._stream = line, stream

    def write(self, text: str) -> int:
        self._line.clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Shield:
    """A stream whose failures (a closed pipe, a full disk, a closed file) end the output, not the run.

    It stands between rich and the stream because rich answers a broken pipe by leaving the program.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream, self.failed = stream, stream is None

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError("text is expected")
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and not self.failed and self._stream.isatty()

    def _try(self, act: Callable[[IO[str]], object]) -> None:
        try:
            if not self.failed and self._stream is not None:
                act(self._stream)
        except (OSError, ValueError):
            self.failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output:
    """Where lines go: a rich live line over a terminal that can show one, plain text otherwise."""

    def __init__(self, stream: IO[str] | None, quiet: bool) -> None:
        self._stream, self._quiet = Shield(stream), quiet
        self._console = None if quiet else _terminal(self._stream)
        self._display: Any = None

    @property
    def live(self) -> bool:
        return self._console is not None and not self._stream.failed

    @property
    def width(self) -> int:
        return self._console.width if self._console is not None else 10**6

    def line(self, text: str, style: str = "", fit: str = "flow") -> None:
        """One permanent line, in a terminal above the live one. `fit`: see `FITS`."""
        if self._quiet:
            return
        if self._console is not None and self.live:
            from rich.text import Text

            self._console.print(Text(text, style=style), **FITS[fit])
        else:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._stream.flush()

    def draw(self, parts: list[str]) -> None:
        """Show the parts that fit on the live line."""
        from rich.live import Live
        from rich.text import Text

        if self._console is None:
            return
        if self._display is None:
            # No refresh thread: a frame is drawn by the step that asks for it.
            self._display = Live(console=self._console, auto_refresh=False, transient=not parts)
            self._display.start()
            self._console.show_cursor(True)  # a killed run must not leave the terminal without a cursor
        shown = parts[:1]
        for part in parts[1:]:
            if len("  ".join([*shown, part])) < self._console.width:
                shown.append(part)
        self._display.update(Text("  ".join(shown), no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self, parts: list[str]) -> None:
        """Leave the parts on the screen, or take the line away if there are none."""
        if self._display is not None:
            if parts:
                self.draw(parts)
            self._display.transient = not parts
            self._display.stop()
        self._display = None


def _terminal(stream: Shield) -> Any:
    """A rich console for a terminal that can move its cursor and show UTF-8; None for anything else."""
    try:
        if not stream.isatty() or "utf" not in (stream.encoding or "").lower():
            return None
    except (AttributeError, ValueError):
        return None
    from rich.console import Console

    console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
    return None if console.is_dumb_terminal else console
