"""Compressors on the held-out text, and Python's parser on samples."""

import gzip
import lzma
import textwrap
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.report.baselines import compression_baselines, is_python_beginning, is_python_corpus, parse_rates


def test_compressors_are_those_of_the_command_line():
    text = b"".join(b"line %d of some text that repeats itself\n" % (n * n % 977) for n in range(4000))
    found = compression_baselines(text)
    assert found["text_bytes"] == len(text)
    assert found["gzip_9_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    # The smaller dictionary costs and saves nothing: preset 9 as it stands gives the same size.
    assert found["xz_9_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert compression_baselines(b"") == {}


ACCEPTED = [
    "x = 1\n",
    "def f():\n    return 1\n",
    "def f():\n",
    "x = (1,\n     2,\n",
    "'''an open string\n",
    "class A:\n    def f(self):\n        if x:\n",
    "try:\n    f()\n",
    "@decorator\n",
    "# only a comment\n",
    "x = 1\nthis half line is cut off",
    "match x:\n    case [1, *_]:\n        pass\n",
    '"\\d"\n',  # a SyntaxWarning is not an error
    "x is 1\n",
    "if x:\n    y = x + \\\n",
]
REFUSED = [
    "x = )\n",
    "def f(:\n",
    "x = 1\n    y = 2\n",
    "if x:\n    y\n  z\n",
    "print 1\n",
    "return 1\n",
    "else:\n",
    "x = \x00\n",
    "x = '\ud800'\n",
    "-" * 50_000 + "x\n",
    "(" * 50_000 + "\n",
    "x = 1" + "+1" * 20_000 + "\n)\n",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted(text):
    assert is_python_beginning(text) is True


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused(text):
    assert is_python_beginning(text) is False


@pytest.mark.parametrize("text", ["", "no line end", "\n\n", "  \n \t\n  x"])
def test_empty_text_is_not_judged(text):
    assert is_python_beginning(text) is None


def test_it_compiles_and_never_runs(tmp_path):
    marker = tmp_path / "ran"
    assert is_python_beginning(f"open({str(marker)!r}, 'w')\nraise SystemExit\n") is True
    assert not marker.exists()


def test_no_warning_and_no_filter_is_left_behind():
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_python_beginning('"\\d" is 1\n') is True
    assert warnings.filters == before


@given(st.text(st.sampled_from("ab01 \t\n()[]{}:'\"\\#=+-@.,\x00\u00e9\ud800ifdeflambda"), max_size=80))
def test_any_text_is_judged(text):
    assert is_python_beginning(text) in (True, False, None)


def test_a_prefix_of_whole_lines_of_a_real_program_is_accepted():
    lines = Path(textwrap.__file__).read_text(encoding="utf-8").splitlines(keepends=True)[:200]
    assert all(is_python_beginning("".join(lines[:n])) is not False for n in range(1, len(lines), 3))


def test_rates_by_hand(records):
    assert parse_rates(records.samples) == [
        {"step": 1, "judged": 2, "accepted": 1, "accepted_share": 0.5},
        {"step": 4, "judged": 1, "accepted": 1, "accepted_share": 1.0},
    ]
    assert parse_rates([records.sample(0, "no line")]) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["python"], True),
        ([{"path": "python"}, {"path": "src/**/*.py"}, {"path": "a.py.gz"}], True),
        ([{"path": "python"}, {"path": "book.txt"}], False),
        ([], False),
        (None, False),
    ],
)
def test_which_corpus_is_python(sources, expected):
    assert is_python_corpus({"data": {"sources": sources}}) is expected
    assert is_python_corpus({"data": None}) is False
