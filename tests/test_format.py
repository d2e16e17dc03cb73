"""How numbers are written, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.format import (
    bytes_text,
    count_text,
    integer_text,
    number_text,
    percent_text,
    printable,
    seconds_text,
    shortened,
)

CASES = [
    (bytes_text, 0, "0 B"),
    (bytes_text, 1023, "1023 B"),
    (bytes_text, 1024, "1.00 KiB"),
    (bytes_text, 1536, "1.50 KiB"),
    (bytes_text, 124_439_808 * 4, "475 MiB"),
    (bytes_text, 2**40 - 1, "1.00 TiB"),
    (count_text, 0, "0"),
    (count_text, 950, "950"),
    (count_text, 999.9, "1.00k"),
    (count_text, 999_999, "1.00M"),
    (count_text, 124_439_808, "124M"),
    (count_text, 5_312_000, "5.31M"),
    (count_text, -2500, "-2.50k"),
    (integer_text, 5312000, "5,312,000"),
    (integer_text, 17693.4, "17,693"),
    (number_text, 3.13654, "3.1365"),
    (number_text, 0.0, "0.0000"),
    (number_text, 1e-5, "1.00e-05"),
    (number_text, 2.5e7, "2.50e+07"),
    (number_text, math.nan, "NaN"),
    (number_text, -math.inf, "-inf"),
    (percent_text, 0.4821, "48.2 %"),
    (percent_text, 1, "100.0 %"),
    (seconds_text, 0, "0 ms"),
    (seconds_text, 0.000_012, "0.0120 ms"),
    (seconds_text, 0.4531, "453 ms"),
    (seconds_text, 0.9999, "1.00 s"),
    (seconds_text, 59.94, "59.9 s"),
    (seconds_text, 59.96, "1 min"),
    (seconds_text, 3725, "1 h 2 min"),
    (seconds_text, 90_000, "1 d 1 h"),
    (seconds_text, -61, "-1 min 1 s"),
]


@pytest.mark.parametrize(("write", "value", "expected"), CASES)
def test_by_hand(write, value, expected):
    assert write(value) == expected


@pytest.mark.parametrize("write", [bytes_text, count_text, integer_text, number_text, percent_text, seconds_text])
def test_what_is_not_known_is_a_dash(write):
    for unknown in (None, "x", True, 10**400, *(() if write is number_text else (math.nan, math.inf))):
        assert write(unknown) == "-"


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False) | st.integers())
def test_any_number_is_written_in_ascii(x):
    for write in (bytes_text, count_text, integer_text, number_text, percent_text, seconds_text):
        assert write(x).isascii() and write(x)


def test_long_words_are_shortened():
    text = "source " + "x" * 1001 + " is no file\n" + "y" * 1000
    assert shortened(text) == "source " + "x" * 400 + "... (1001 characters) is no file\n" + "y" * 1000


def test_printable_by_hand():
    assert printable("a\tb\nc é 日 \u00a0😀") == "a\tb\nc é 日 \u00a0😀"
    assert printable("\x1b[31m\r\x00\x7f\x9b") == r"\x1b[31m\r\x00\x7f\x9b"
    assert printable("\u202e\u2028\u200b\ud800\ufeff") == r"\u202e\u2028\u200b\ud800\ufeff"


@given(st.text(st.characters()))
def test_printable_has_nothing_that_steers(text):
    assert all(c in "\n\t" or c.isprintable() or c.isspace() for c in printable(text))
    printable(text).encode("utf-8")
