"""Long runs of one kind of character are cut before a tokenizer sees them, the same in training and in encoding.

A tokenizer merges within words, and what it does for a word grows faster than the word: a book without a space would
be one word. A run of more than LONGEST letters, of as much white space, or of as many other characters that are no
digits is cut every LONGEST characters. Ordinary text has no such run.
"""

import re
from collections.abc import Iterable, Iterator

LONGEST = 256  # characters
WINDOW = LONGEST // 2  # a longer run covers a window that begins at a multiple of this
_RUN = re.compile(rf"[^\W\d_]{{{LONGEST + 1},}}|\s{{{LONGEST + 1},}}|(?:[^\w\s]|_){{{LONGEST + 1},}}")


def bounded(text: str) -> list[str]:
    """The text in parts whose runs are at most LONGEST characters; nearly always it is one part."""
    if len(text) <= LONGEST or not _may_have_a_long_run(text):
        return [text]
    ends = [end for run in _RUN.finditer(text) for end in range(run.start() + LONGEST, run.end(), LONGEST)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def all_bounded(texts: Iterable[str]) -> Iterator[str]:
    """The parts of many texts."""
    for text in texts:
        yield from bounded(text)


def _may_have_a_long_run(text: str) -> bool:
    """Whether any window is all of one kind. Looks at a few characters of most windows."""
    for start in range(0, len(text) - WINDOW + 1, WINDOW):
        first = text[start]
        if first.isalpha():
            found = text[start : start + WINDOW].isalpha()
        elif first.isspace():
            found = text[start : start + WINDOW].isspace()
        else:
            found = not first.isdigit() and not any(c.isalnum() or c.isspace() for c in text[start : start + WINDOW])
        if found:
            return True
    return False
