"""The report in the terminal: the curve's dots by hand, any width, any encoding, foreign text."""

import io

import pytest
from rich.console import Console

from kiem.report.summary import build_report, render_terminal
from kiem.report.terminal import plot


def shown(report, width=80, encoding="utf-8", color=False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, force_terminal=color, color_system=None).print(render_terminal(report))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_falling_line_in_braille_and_in_ascii():
    # 8x8 dots: the diagonal sets dots 1 and 5 in a cell, then dots 3 and 8 in the next.
    lines = plot([(0, 7.0), (7, 0.0)], [], 4, 2, False)
    assert lines == ["   7.00 \u2811\u2884", "   0.00   \u2811\u2884", "        0  7"]


def test_ascii_and_marks():
    lines = plot([(0, 4.0), (4, 0.0)], [(2, 2.0)], 5, 5, True)
    assert lines == ["   4.00 *", "         *", "          o", "           *", "   0.00     *", "        0   4"]


def test_a_flat_line_lies_on_the_ground():
    assert plot([(1, 2.0), (2, 2.0)], [], 4, 2, True) == ["   2.00", "   2.00 ****", "        1  2"]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_any_width_and_encoding(make_run, dataset, records, width, encoding):
    samples = [records.sample(4, "日本 – \u2028 \x1b[31m [bold]x[/bold]\n")]
    text = shown(build_report(make_run(samples=samples, name="name[red]"), dataset), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    if width >= 40:
        assert "\x1b" not in text and "bits per byte" in text and "[bold]x[/bold]"[: width - 40] in text


def test_what_it_says(make_run, dataset):
    text = shown(build_report(make_run(), dataset), 100)
    assert "demo: finished at step 4 of 4, 400 tokens in 2.50 s in all, 1.00 s since the resume, 3.33k" in text
    for words in (
        "held-out loss",
        "2.7500 nats per token",
        "1.6500",
        "gzip -9, same text",
        "1.05 MiB",
        "977 KiB",
        "1.10",
        "160 tokens/s",
        "40.0 %",
        "100.0 %",
        "sample at step 4",
        "  def f():",
    ):
        assert words in text, words


def test_missing_parts_are_left_out(make_run):
    text = shown(build_report(make_run(metrics=[], samples=None, plan=None)), 80)
    assert "unfinished at step 0" in text and "note: plan.json is missing" in text
    assert "nats per token" not in text and "plan against measured" not in text
