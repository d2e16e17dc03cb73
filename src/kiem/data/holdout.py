"""One pass over all text before it is tokenized: what there is, what is held out for validation, and a bounded sample.

A document is held out when the keyed hash of its text (its first piece, if it is long) falls below the validation
fraction: this depends on nothing but the text and the seed, and copies of a document fall on the same side. Where that
gives no usable validation text, as with a single file, the end of the source's text is held out instead, from the start
of a line.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kiem.data.formats import Document, Item, Rule, read_item
from kiem.data.shards import NOT_HELD_OUT

SAMPLE = 16 * 1024 * 1024  # bytes of text that a tokenizer is trained on, at most
FEW = 4  # documents: fewer held out by hash are no usable validation text
LEAST_TAIL = 32 * 1024  # bytes: a held-out end of text is at least so long, but at most a twentieth of the text
TRAIN, VALIDATION = 0, 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Text on one side of the split. `starts`: a document begins with it."""

    side: int
    text: str
    starts: bool
    origin: str


@dataclass
class Scan:
    """What one pass over a source found.

    `rule`: "hash"; "tail" from `cut` on (item, piece, character); "all" of it, a source of validation text; "none"
    of it, beside such sources.
    """

    documents: int = 0
    bytes: int = 0
    held_documents: int = 0
    held_bytes: int = 0
    rule: str = "hash"
    cut: tuple[int, int, int] | None = None

    def describe(self) -> str:
        """The rule in words, for the report."""
        if self.rule == "tail":
            return (
                f"the last {self.held_bytes:,} of {self.bytes:,} bytes, from the start of a line (too few "
                "documents to hold some out)"
            )
        if self.rule == "hash":
            return f"{self.held_documents:,} of {self.documents:,} documents, by a hash of their text and the seed"
        return "all of it" if self.rule == "all" else NOT_HELD_OUT


def keyed_hash(text: str, seed: int) -> int:
    """64 bits that depend on the text and the seed alone."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")


@dataclass
class Sample:
    """The texts with the smallest hashes, up to `limit` bytes: spread evenly, the same in whatever order they come."""

    limit: int = SAMPLE
    size: int = 0
    _heap: list[tuple[int, int, int, int, bool, str, int]] = field(default_factory=list)

    def add(self, mark: int, place: tuple[int, int, int], held: bool, text: str, n_bytes: int) -> None:
        """`place`: source, item and piece. `held`: of a document held out by hash."""
        if self.size + n_bytes > self.limit and self._heap and mark >= -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-mark, *place, held, text, n_bytes))
        self.size += n_bytes
        while self.size > self.limit and len(self._heap) > 1:
            self.size -= heapq.heappop(self._heap)[-1]

    def training_texts(self, scans: Sequence[Scan]) -> list[str]:
        """Without anything held out, in order of hash."""
        texts = []
        for _, source, item, piece, held, text, _ in sorted(self._heap, reverse=True):
            scan = scans[source]
            if scan.rule == "tail" and (item, piece) >= scan.cut[:2]:
                text = text[: scan.cut[2]] if (item, piece) == scan.cut[:2] else ""
            if text and not (scan.rule == "hash" and held):
                texts.append(text)
        return texts


@dataclass(frozen=True)
class HoldOut:
    """How to divide: `rule` is "hash" for text that is divided, "none" or "all" for text on one side by request."""

    rule: str
    fraction: float
    seed: int

    def holds_out(self, mark: int) -> bool:
        return mark < self.fraction * 2.0**64


def scan_source(
    items: Sequence[Item],
    text_key: str,
    bad: Rule,
    hold_out: HoldOut,
    source: int = 0,
    sample: Sample | None = None,
    see: Callable[[str], None] | None = None,
) -> Scan:
    """Read a source once. Texts go to `sample`; `see` is called with each."""
    scan, held = Scan(rule=hold_out.rule), False
    counts = [[0, 0] for _ in items]  # documents and bytes of each
    for index, item in enumerate(items):
        for number, piece in enumerate(read_item(item, text_key, bad)):
            n_bytes = len(piece.text.encode())
            mark = keyed_hash(piece.text, hold_out.seed)
            if not piece.continues:
                held = hold_out.holds_out(mark)
                scan.held_documents += held
                counts[index][0] += 1
            counts[index][1] += n_bytes
            scan.held_bytes += n_bytes * held
            if sample:
                sample.add(mark, (source, index, number), held, piece.text, n_bytes)
            if see:
                see(piece.text)
    scan.documents, scan.bytes = (sum(column) for column in zip(*counts, strict=True))
    if hold_out.rule != "hash":
        whole = hold_out.rule == "all"
        scan.held_documents, scan.held_bytes = scan.documents * whole, scan.bytes * whole
    elif scan.documents and not _usable(scan, hold_out.fraction):
        _hold_out_tail(scan, counts, items, text_key, bad.on_bad_text, hold_out.fraction)
    return scan


def _usable(scan: Scan, fraction: float) -> bool:
    share = scan.held_bytes / scan.bytes
    return scan.held_documents >= FEW and fraction / 4 <= share <= min(4 * fraction, (1 + fraction) / 2)


def _hold_out_tail(
    scan: Scan, counts: list[list[int]], items: Sequence[Item], text_key: str, on_bad_text: str, fraction: float
) -> None:
    """Find the line where the last part of the text begins; reads the one item again that it is in."""
    wanted = max(1, int(fraction * scan.bytes), min(LEAST_TAIL, scan.bytes // 20))
    target = scan.bytes - wanted
    index, position = len(counts) - 1, scan.bytes - counts[-1][1]
    while position > target:
        index -= 1
        position -= counts[index][1]
    scan.rule, scan.held_documents = "tail", sum(documents for documents, _ in counts[index + 1 :])
    quiet = Rule("skip" if on_bad_text == "error" else on_bad_text, lambda problem: None)
    for number, piece in enumerate(read_item(items[index], text_key, quiet)):
        data = piece.text.encode()
        if scan.cut is not None:
            scan.held_documents += not piece.continues
        elif position + len(data) > target:
            at = _line_start(piece.text, len(data[: target - position].decode(errors="ignore")))
            scan.cut = (index, number, at)
            scan.held_bytes = scan.bytes - position - len(piece.text[:at].encode())
            scan.held_documents += 1
        position += len(data)


def _line_start(text: str, at: int) -> int:
    """The start of a line (else of a word) next to character `at`, not 0 if that can be."""
    if at == 0:
        return 0
    return text.rfind("\n", 0, at) + 1 or text.find("\n", at, len(text) - 1) + 1 or text.rfind(" ", 0, at) + 1 or at


def split_item(index: int, documents: Iterator[Document], scan: Scan, hold_out: HoldOut) -> Iterator[Piece]:
    """The pieces of item number `index` with their sides, in order. The piece that holds the cut becomes two."""
    held = scan.rule == "all"
    for number, piece in enumerate(documents):
        starts = not piece.continues
        if scan.rule == "tail":
            place, at = (index, number), scan.cut[2]
            if place == scan.cut[:2] and at:
                yield Piece(TRAIN, piece.text[:at], starts, piece.origin)
                yield Piece(VALIDATION, piece.text[at:], True, piece.origin)
            else:  # a document cut between two of its pieces begins anew on the other side
                side = VALIDATION if place >= scan.cut[:2] else TRAIN
                yield Piece(side, piece.text, starts or place == scan.cut[:2], piece.origin)
            continue
        if starts and scan.rule == "hash":
            held = hold_out.holds_out(keyed_hash(piece.text, hold_out.seed))
        yield Piece(VALIDATION if held else TRAIN, piece.text, starts, piece.origin)
