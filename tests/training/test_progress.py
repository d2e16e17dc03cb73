"""Progress of a run: plain lines without control characters, one live line in a terminal, never in the way."""

import io
import math
import re
import unicodedata
from itertools import pairwise

import pytest

from kiem.training.progress import Progress, StatusLine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def record(step, loss=2.0, seconds=1.0):
    speed = {"tokens_per_second": 100 / seconds, "matmul_share": 0.4821}
    return {"step": step, "tokens": 100 * step, "loss": loss, **speed}


SAMPLE = {"step": 5, "tokens": 500, "prompt": "def ", "text": "f():\n\treturn [bold]1[/bold]\x1b[2J\x07\x9b31m\u202e\r"}


def run(stream, steps=1000, seconds=0.1, **options):
    clock = Clock()
    with Progress(100 * steps, steps, stream=stream, clock=clock, **options) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds
            progress.step(record(step, seconds=seconds))
    return stream.getvalue()


def test_plain_lines_have_no_control_characters_even_when_color_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Progress(1000, 10, stream=out) as progress:
        progress.step(record(1))
        progress.sample(SAMPLE)
        progress.eval(
            {
                "step": 1,
                "loss": 2.0,
                "perplexity": math.exp(2),
                "bits_per_byte": 1.25,
                "eval_tokens": 4096,
                "seconds": 0.5,
            }
        )
        progress.save({"path": "checkpoints/step-00000001", "bytes": 1 << 20, "seconds": 0.25})
        progress.note("a\x1b[31mb")
    text = out.getvalue()
    assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} == {"\n"}
    assert "step 1/10  loss 2.0000  10 %  100 tokens/s  48.2 % of peak matmul throughput" in text
    assert "eval at step 1: held-out loss 2.0000, perplexity 7.39, 1.2500 bits per byte" in text
    assert "(4,096 tokens in 500 ms)" in text
    assert "saved checkpoints/step-00000001 (1.00 MiB in 250 ms)" in text
    assert r"  |     return [bold]1[/bold]\x1b[2J\x07\x9b31m\u202e" in text
    assert r"a\x1b[31mb" in text


def test_plain_lines_come_at_growing_intervals():
    # 1000 s: every 2 s up to 20 s (11 lines with the first), then each 10 % later, then one a minute.
    lines = run(io.StringIO(), steps=1000, seconds=1.0).splitlines()
    shown = [int(re.match(r"step ([\d,]+)", line)[1].replace(",", "")) for line in lines]
    assert shown[:4] == [1, 3, 5, 7]
    gaps = [b - a for a, b in pairwise(shown)]
    assert gaps[:-1] == sorted(gaps[:-1]) and max(gaps) == 60
    assert shown[-1] == 1000 and len(shown) < 50


def test_eta_counts_from_the_end_of_the_first_step():
    clock, out = Clock(), io.StringIO()
    with Progress(1000, 10, stream=out, clock=clock) as progress:
        clock.now = 30.0  # a slow first step: compilation
        progress.step(record(1))
        clock.now = 34.0
        progress.step(record(2))
    first, second = out.getvalue().splitlines()
    assert "ETA" not in first  # nothing is known yet
    assert "ETA 32.0 s" in second  # 100 tokens in 4 s, 800 to go
    assert "  20 %  " in second


def test_a_resumed_run_counts_its_own_pace_and_the_whole_share():
    clock, out = Clock(), io.StringIO()
    with Progress(1000, 10, tokens=500, stream=out, clock=clock) as progress:
        for step, now in ((6, 1.0), (7, 3.0)):
            clock.now = now
            progress.step(record(step))
    assert "ETA 6.00 s  70 %" in out.getvalue()


def test_a_smoothed_loss_is_called_so_and_a_nan_is_shown():
    clock, out = Clock(), io.StringIO()
    with Progress(1000, 10, stream=out, clock=clock) as progress:
        for step, loss in ((1, 4.0), (2, 2.0), (3, math.nan)):
            clock.now += 10
            progress.step(record(step, loss))
    first, second, third = out.getvalue().splitlines()
    assert "  loss 4.0000" in first
    assert f"  smoothed loss {(4 * 0.95 + 2) / 1.95:.4f}" in second  # window 20: 0.95 is kept
    assert "  loss NaN" in third


def test_a_terminal_gets_one_live_line_at_most_ten_times_a_second():
    text = run(Terminal(), steps=1000, seconds=0.01)
    frames = text.count("tokens/s")
    assert 90 <= frames <= 110
    assert text.count("\n") <= 2  # one line, drawn in place
    assert text.rstrip("\n").count("step 1,000/1,000") >= 1
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def test_the_live_line_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run(Terminal(), steps=100, seconds=1.0))
    assert all(len(frame) < 40 for frame in re.split(r"[\r\n]", text))
    assert "step 100/100  loss 2.0000" in text


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_bar_and_estimate_are_seen_on_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run(Terminal(), steps=3000, seconds=1.0))
    frame = next(frame for frame in re.split(r"[\r\n]", text) if "step 1,500/" in frame)
    assert "ETA 25 min" in frame and "━" in frame and "50 %" in frame and len(frame) < columns


def test_permanent_lines_on_a_narrow_terminal(monkeypatch):
    """Sentences break between words, a line of a sample is one row; paths and commands are left whole, to be copied."""
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    command = "kiem train " + "/a/long/path" * 6 + " --fork " + "/another/path" * 6
    scores = {"loss": 4.5181, "perplexity": 91.66, "bits_per_byte": 1.9841, "eval_tokens": 256, "seconds": 0.002}
    with Progress(1000, 10, stream=out) as progress:
        progress.eval({"step": 8, **scores})
        progress.sample(SAMPLE | {"text": "f(" + "x" * 70 + "\n" + "日本" * 40})
        progress.note(command)
    StatusLine(stream=out).line(
        "text: 1 document, 17.8 KiB; 4.61k tokens to train on, 644 tokens held out", fit="words"
    )
    rows = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).split("\n")
    assert command in rows
    rows.remove(command)
    assert all(sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in row) <= 60 for row in rows), rows
    assert rows[:2] == [
        "eval at step 8: held-out loss 4.5181, perplexity 91.66, ",
        "1.9841 bits per byte (256 tokens in 2.00 ms)",
    ]
    assert rows[3] == "  | def f(" + "x" * 49 + "…" and rows[4].endswith("…") and len(rows) == 8
    assert rows[5].endswith("644 ") and rows[6] == "tokens held out"


def test_a_status_line_is_written_over_and_taken_away():
    out = Terminal()
    line = StatusLine(stream=out, seconds=0.0)
    line("preparing: 1 document")
    line("preparing: 2 documents")
    line.clear()
    print("done", file=out)
    text = out.getvalue()
    assert "1 document" in text and "2 documents" in text
    left = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text.rpartition("2 documents")[2])
    assert left.strip("\n") == "done" and "\x1b[2K" in text


def test_a_status_line_says_nothing_where_no_line_can_be_written_over():
    out = io.StringIO()
    line = StatusLine(stream=out)
    line("preparing")
    line.clear()
    assert out.getvalue() == ""


def test_a_sample_in_a_terminal_cannot_steer_it():
    out = Terminal()
    with Progress(1000, 10, stream=out) as progress:
        progress.step(record(1))
        progress.sample(SAMPLE)
    text = out.getvalue()
    assert "\x1b[2J" not in text and "\x07" not in text and "\u202e" not in text and "\x9b" not in text
    assert "[bold]1[/bold]" in text and r"\x1b[2J" in text


def test_long_samples_are_shortened():
    out = io.StringIO()
    Progress(1000, 10, stream=out).sample(SAMPLE | {"text": "x" * 500 + "\n" + "line\n" * 40})
    lines = out.getvalue().splitlines()
    assert len(lines) == 14 and max(map(len, lines)) == 104
    assert lines[-1] == "  | ... 29 more lines in samples.jsonl"
    out = io.StringIO()
    Progress(1000, 10, stream=out).sample(SAMPLE | {"text": "line\n" * 13})
    assert "... 1 more line in samples.jsonl" in out.getvalue()


def test_dumb_terminals_and_old_encodings_get_plain_lines(monkeypatch):
    latin = io.TextIOWrapper(raw := io.BytesIO(), encoding="latin-1")
    latin.isatty = lambda: True
    with Progress(1000, 10, stream=latin) as progress:
        progress.step(record(1))
        progress.sample(SAMPLE | {"text": "日本 \ud800"})
    assert rb"\u65e5\u672c \ud800" in raw.getvalue() and b"\x1b" not in raw.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run(Terminal(), steps=3)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
@pytest.mark.parametrize("problem", [BrokenPipeError(), OSError(28, "No space left"), ValueError("I/O on closed file")])
def test_a_stream_that_fails_does_not_end_the_run(kind, problem):
    class Broken(kind):
        def write(self, _):
            raise problem

    assert run(Broken(), steps=5) == ""


def test_quiet_says_nothing():
    out = Terminal()
    with Progress(1000, 10, stream=out, quiet=True) as progress:
        progress.step(record(1))
        progress.sample(SAMPLE)
        progress.note("note")
        progress.close()
    assert out.getvalue() == ""
