"""How numbers and foreign text are written for people: one definition of each, in ASCII, without torch."""

import math
import os
import re
import shlex
import unicodedata
from typing import TypeGuard

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
COUNT_UNITS = ("", "k", "M", "B", "T", "Q")
UNKNOWN = "-"


def is_number(x: object) -> TypeGuard[float]:
    """True for a finite int or float (a bool is not a number)."""
    if isinstance(x, float):
        return math.isfinite(x)
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 10**300  # larger ones are no float


def _scaled(x: float, base: float, units: tuple[str, ...]) -> tuple[float, str]:
    """x in the largest unit in which its three leading digits still show at least 1."""
    index = 0
    while abs(x) >= base * (1 - 0.0005) and index < len(units) - 1:
        x, index = x / base, index + 1
    return x, units[index]


def _three_digits(x: float) -> str:
    """Three significant digits, but never fewer than the whole part has."""
    if x == 0:
        return "0"
    exponent = int(f"{x:.2e}".partition("e")[2])  # after rounding: 999.9 has four digits before the point
    return f"{x:,.{min(max(2 - exponent, 0), 12)}f}"


def bytes_text(n: float | None) -> str:
    """A size in binary units: 1536 -> '1.50 KiB'."""
    if not is_number(n):
        return UNKNOWN
    value, unit = _scaled(float(n), 1024.0, BYTE_UNITS)
    return f"{n:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def count_text(n: float | None) -> str:
    """A count in short: 5_312_000 -> '5.31M', 950 -> '950'."""
    if not is_number(n):
        return UNKNOWN
    value, unit = _scaled(float(n), 1000.0, COUNT_UNITS)
    if not unit:
        return f"{n:,.0f}" if float(n).is_integer() else _three_digits(float(n))
    return f"{_three_digits(value)}{unit}"


def integer_text(n: float | None) -> str:
    """Every digit, grouped: 5312000 -> '5,312,000'."""
    return f"{n:,.0f}" if is_number(n) else UNKNOWN


def number_text(x: float | str | None, digits: int = 4) -> str:
    """A loss, a norm, a ratio: `digits` decimals; scientific where those would hide it. Numbers that are not finite
    may also come as files name them ("NaN", "Infinity", "-Infinity")."""
    if isinstance(x, str) and x in ("NaN", "Infinity", "-Infinity"):
        x = float(x)
    if isinstance(x, float) and not math.isfinite(x):
        return "NaN" if math.isnan(x) else ("inf" if x > 0 else "-inf")
    if not is_number(x):
        return UNKNOWN
    if x != 0 and not 10.0 ** (1 - digits) <= abs(x) < 1e6:
        return f"{x:.{max(digits - 2, 1)}e}"
    return f"{x:.{digits}f}"


def plural(n: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun: '1 step', '1,368 steps', '2 batches'."""
    return f"{integer_text(n)} {noun if n == 1 else nouns or noun + 's'}"


def count_of(n: int, noun: str, nouns: str | None = None) -> str:
    """As `plural`, with the count in short: '1 token', '1.37M tokens'."""
    return f"{count_text(n)} {noun if n == 1 else nouns or noun + 's'}"


def percent_text(share: float | None) -> str:
    """A share 0..1 as a percentage: 0.4821 -> '48.2 %'."""
    return f"{100 * share:.1f} %" if is_number(share) else UNKNOWN


def seconds_text(seconds: float | None) -> str:
    """A duration in its two largest units: 3725 -> '1 h 2 min'; below one minute with three digits."""
    if not is_number(seconds):
        return UNKNOWN
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", float(seconds))
    if seconds < 0.9995:
        return f"{sign}{_three_digits(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{sign}{_three_digits(seconds)} s"
    whole = round(seconds)
    for size, unit, small, small_unit in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{sign}{whole // size:,} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{sign}{whole} s"


def printable(text: str) -> str:
    r"""Foreign text made safe for a terminal and a page: every control, format, surrogate and unassigned character but
    newline and tab is shown as its escape ('\x1b', '\u202e'), so that it can neither move the cursor nor reorder text.
    """
    return "".join(c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def shortened(text: str) -> str:
    """Text with words of more than 1,000 characters cut: a message quotes what was given, and stays readable."""
    return re.sub(r"\S{1001,}", lambda word: f"{word[0][:400]}... ({len(word[0])} characters)", text)


def shell_word(text: object) -> str:
    r"""A word of a command that a user can type; bytes of a file's name that are not UTF-8 as bash's $'\xe9'."""
    word = str(text)
    if word.isascii() or not any("\udc80" <= c <= "\udcff" for c in word):
        return shlex.quote(word)
    parts = (chr(b) if 0x20 <= b < 0x7F and chr(b) not in "'\\" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(parts)}'"


def _escape(c: str) -> str:
    return ascii(c)[1:-1]
