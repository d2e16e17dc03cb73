"""Tokenizers of others: what they are tried with in a process of their own (trial.py), and what they lose of a text."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kiem.data.tokenizer import Tokenizer
from kiem.data.trial import SECONDS
from kiem.errors import DataError

MEMORY = 8 << 30  # bytes of address space
MOST_UNKNOWN = 0.5  # share of the text: a tokenizer that knows less than half of it is refused
_TEXTS = (
    "The cat's hat, 2026.\r\n\r\n\tÜber straße 東京 🙂 ",
    *(c * 200 + end for c in "aA 1.\n-_é" for end in ("", "!", "b", "\0")),
    "ab" * 200 + "!",
    "a " * 200 + "!",
    " a" * 200,
    "1a" * 200,
)


def child(path: str) -> None:
    """The child process: exit code 0 if the tokenizer works."""
    _limit()
    try:
        tokenizer = Tokenizer.load(path, trusted=True)
        for text in _TEXTS:
            if tokenizer.encode(text) != tokenizer.encode(text):
                raise DataError("the same text gives different tokens each time")
            tokenizer.decode(tokenizer.encode(text))
        tokenizer.save  # noqa: B018
        _ = tokenizer.token_bytes
    except DataError as error:
        if "character tokenizer does not know" in str(error):
            return
        print(json.dumps({"error": str(error).rstrip(".")}))
        sys.exit(1)


def _limit() -> None:
    """Bound this process's processor time and memory, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# -- what is lost ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What a tokenizer makes of a sample of the text.

    `lossless`: every text came back unchanged. `unknown_share`: of its bytes, those that are the unknown token or no
    token at all (white space between tokens apart). `example`: a text that did not come back, and what did.
    """

    lossless: bool = True
    unknown_share: float = 0.0
    example: tuple[str, str] | None = None

    def describe(self) -> str:
        """In a sentence, for a tokenizer that is not lossless."""
        before, after = self.example or ("", "")
        unknown = f"{100 * self.unknown_share:.2g} % of it is unknown to it or dropped; " if self.unknown_share else ""
        return (
            f"the tokenizer loses text: {unknown}{before!r} comes back as {after!r}. The loss covers only what it "
            "keeps: bits per byte cannot be compared with other models"
        )


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Loss:
    """How much of some texts a tokenizer keeps. Raises DataError where it is less than half."""
    total, unknown, example = 0, 0, None
    for text in texts:
        ids, spans = tokenizer.encode_with_spans(text)
        sizes = character_bytes(text)
        total += int(sizes.sum())
        covered = np.zeros(len(text) + 1, np.int64)
        known = spans if tokenizer.unknown_id is None else spans[ids != tokenizer.unknown_id]
        np.add.at(covered, known[:, 0], 1)
        np.add.at(covered, known[:, 1], -1)
        missing = np.flatnonzero(np.cumsum(covered[:-1]) == 0)
        unknown += int(sum(sizes[at] for at in missing.tolist() if not text[at].isspace()))
        if example is None and (back := tokenizer.decode(ids)) != text:
            example = _difference(text, back)
    share = unknown / total if total else 0.0
    if share > MOST_UNKNOWN:
        raise DataError(
            f"the tokenizer does not know {100 * share:.0f} % of the text (replaced by its unknown token, or "
            "dropped): use a tokenizer made for such text, or bpe"
        )
    return Loss(example is None and not unknown, share, example)


def _difference(text: str, back: str) -> tuple[str, str]:
    """Where a text and what came back of it begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, at - 8)
    return text[start : at + 16], back[start : at + 16]


def character_bytes(text: str) -> np.ndarray:
    """Bytes of UTF-8 of each character, int64 (characters,)."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)


def bytes_of_tokens(text: str, spans: np.ndarray) -> np.ndarray:
    """Bytes of the text that each token stands for, int64 (n,): from the end of the one before to its own. The last one
    has what is behind it too, so that they add up to the text; without tokens there are none."""
    if not len(spans):
        return np.zeros(0, np.int64)
    before = np.concatenate([[0], np.cumsum(character_bytes(text))])
    ends = np.maximum.accumulate(np.minimum(spans[:, 1], len(text)))
    ends[-1] = len(text)
    return np.diff(before[ends], prepend=0)
