"""What is held out for validation: a pure function of the text and the data configuration, never of the seed.

Of a source with many documents whole ones are held out, chosen by a hash of their text. Of any other, passages spread
evenly over all of it: each document is cut into blocks of whole lines, at places that depend on the lines there, so
that the blocks of a copy are those of the original. Copies and near copies (similar.py) are on the same side, over all
sources that are divided.

Two passes over the text at most; memory is bounded.
"""

import array
import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kiem.data.formats import Document, Item, Rule
from kiem.data.read import read_item
from kiem.data.similar import Sketcher, Sketches, chosen_by_hash, group

SAMPLE = 16 * 1024 * 1024  # bytes of text that a tokenizer is trained on, at most
MANY = 16  # documents that must be expected to be held out, so that whole ones are a fair sample
LEAST = 32 * 1024  # bytes: so much is held out at least, but at most a tenth of the text
PASSAGES = 32  # blocks that are held out at least, as long as they have SMALLEST bytes
SMALLEST, LARGEST = 512, 4096  # bytes of a block
MOST_BLOCKS = 1_000_000  # blocks of a source: those of a larger one are longer
MOST_SKETCHES = 1_000_000  # documents whose near copies are looked for
TRAIN, VALIDATION = 0, 1
NOT_HELD_OUT = "none of it"  # in the report: of a source beside which there is validation text


@dataclass(frozen=True, slots=True)
class Piece:
    """Text on one side of the split. `starts`: an end of text goes before it. `counts`: a document begins with it."""

    side: int
    text: str
    starts: bool
    counts: bool
    origin: str


@dataclass
class Scan:
    """What the passes over a source found.

    `rule`: "documents" or "blocks" (of about `block` bytes): those of `held`, each (item, piece, block in the piece);
    "hash": documents by hash alone, as there are too many to look for near copies; "all": it is validation text;
    "none": it is beside such text. `repeats`: the text repeats itself so much that copies had to be parted.
    """

    documents: int = 0
    bytes: int = 0
    held_documents: int = 0
    held_bytes: int = 0
    rule: str = "documents"
    block: int = 0
    held: list[tuple[int, int, int]] = field(default_factory=list)
    repeats: bool = False

    def describe(self) -> str:
        """The rule in words, for the report."""
        if self.rule in ("all", "none"):
            return "all of it" if self.rule == "all" else NOT_HELD_OUT
        if self.rule == "hash":
            return (
                f"{self.held_documents:,} of {self.documents:,} documents, by a hash of their text; exact copies "
                "together (there are too many documents to look for near copies)"
            )
        if self.rule == "documents":
            return (
                f"{self.held_documents:,} of {self.documents:,} documents, by a hash of their text; copies and near "
                "copies together"
            )
        copies = (
            "the text repeats itself, so the training text holds copies of them"
            if self.repeats
            else "copies and near copies together"
        )
        passages = f"{len(self.held):,} passage{'s' * (len(self.held) != 1)}"
        return f"{passages} spread over all of it, {self.held_bytes:,} of {self.bytes:,} bytes; {copies}"

    @cached_property
    def _by_item(self) -> dict[int, dict[int, set[int]]]:
        found: dict[int, dict[int, set[int]]] = {}
        for item, piece, block in self.held:
            found.setdefault(item, {}).setdefault(piece, set()).add(block)
        return found

    def held_in(self, item: int) -> dict[int, set[int]]:
        """What is held out of an item: blocks by piece."""
        return self._by_item.get(item, {})


@dataclass
class Sample:
    """The texts with the smallest hashes, up to `limit` bytes: spread evenly, the same in whatever order they come."""

    limit: int = SAMPLE
    size: int = 0
    _bar: int = 1 << 64  # texts from this hash on have no place
    _heap: list[tuple[int, int, int, int, int, bool, str, int]] = field(default_factory=list)

    def add(self, mark: int, place: tuple[int, int, int], document: int, held: bool, text: str, n_bytes: int) -> None:
        """`place`: source, item and piece. `document`: its first piece. `held`: by hash, where that decides."""
        if mark >= self._bar or (self.size + n_bytes > self.limit and self._heap and mark >= -self._heap[0][0]):
            self._bar = min(self._bar, mark)
            return
        heapq.heappush(self._heap, (-mark, *place, document, held, text, n_bytes))
        self.size += n_bytes
        while self.size > self.limit and len(self._heap) > 1:
            dropped = heapq.heappop(self._heap)
            self.size, self._bar = self.size - dropped[-1], min(self._bar, -dropped[0])

    def training_texts(self, scans: Sequence[Scan]) -> Iterator[str]:
        """Without anything held out, in order of hash."""
        for _, source, item, number, document, held, text, _ in sorted(self._heap, reverse=True):
            scan = scans[source]
            if scan.rule == "blocks":
                yield from (part for side, part in _parts(text, scan, item, number) if side == TRAIN)
            elif document not in scan.held_in(item) and not (scan.rule == "hash" and held):
                yield text


def content_hash(text: bytes) -> int:
    """64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# -- the passes over the text ------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """Units of a source that may be held out: N documents, or N blocks."""

    places: array.array  # of each its item, piece and block, one after the other
    sizes: array.array
    sketches: Sketches

    def place(self, unit: int) -> tuple[int, int, int]:
        item, piece, block = self.places[3 * unit : 3 * unit + 3]
        return item, piece, block


def scan_sources(
    sources: Sequence[tuple[Sequence[Item], str]],
    bad: Rule,
    rules: Sequence[str],
    fraction: float,
    sample: Sample | None = None,
    see: Callable[[str], None] | None = None,
    check: Callable[[int, Scan], None] | None = None,
) -> list[Scan]:
    """Read each source, (items, text_key). `rules`: "divide", "all" or "none" of it is held out.

    Texts of sources that are trained on go to `sample`; `see` is called with every text, `check` with each source that
    has been read.
    """
    scans, documents = [], []
    for number, ((items, text_key), rule) in enumerate(zip(sources, rules, strict=True)):
        scan, found = _read(number, items, text_key, bad, rule, fraction, sample if rule != "all" else None, see)
        if check:
            check(number, scan)
        scans.append(scan)
        documents.append(found)
    divided = [number for number, rule in enumerate(rules) if rule == "divide" and scans[number].rule != "hash"]
    _hold_out_documents([scans[number] for number in divided], [documents[number] for number in divided], fraction)
    cut = [number for number in divided if scans[number].rule == "blocks"]
    quiet = Rule("skip" if bad.on_bad_text == "error" else bad.on_bad_text, lambda problem: None)
    blocks = [_blocks_of(scans[number], *sources[number], quiet) for number in cut]
    _hold_out_blocks([scans[number] for number in cut], blocks, fraction)
    return scans


def _read(
    source: int,
    items: Sequence[Item],
    text_key: str,
    bad: Rule,
    rule: str,
    fraction: float,
    sample: Sample | None,
    see: Callable[[str], None] | None,
) -> tuple[Scan, _Found]:
    """One pass over a source: its documents, each known by its first piece."""
    scan, sketcher = Scan(rule="documents" if rule == "divide" else rule), Sketcher()
    places, sizes = array.array("Q"), array.array("Q")
    document, held, hashed = 0, False, [0, 0]
    try:
        for index, item in enumerate(items):
            for number, piece in enumerate(read_item(item, text_key, bad)):
                data = piece.text.encode()
                mark = content_hash(data)
                if not piece.continues:
                    document, held = number, mark < fraction * 2.0**64
                    scan.documents += 1
                    hashed[0] += held
                    if rule == "divide" and scan.documents <= MOST_SKETCHES:
                        places.extend((index, number, 0))
                        sizes.append(0)
                        sketcher.add(data)
                scan.bytes += len(data)
                hashed[1] += held * len(data)
                if sizes:
                    sizes[-1] += len(data)
                if sample:
                    sample.add(mark, (source, index, number), document, held, piece.text, len(data))
                if see:
                    see(piece.text)
    finally:
        sketches = sketcher.finish()
    if rule == "all":
        scan.held_documents, scan.held_bytes = scan.documents, scan.bytes
    elif rule == "divide" and scan.documents > MOST_SKETCHES:
        scan.rule, (scan.held_documents, scan.held_bytes) = "hash", hashed
    return scan, _Found(places, sizes, sketches)


def _joined(found: Sequence[_Found]) -> tuple[Sketches, list[int]]:
    """The sketches of several sources, and where in them those of each source end."""
    sketches = [part.sketches for part in found]
    ends = np.cumsum([len(part.sizes) for part in found]).tolist()
    return Sketches(*(np.concatenate(part) for part in zip(*sketches, strict=True))), ends


def _hold_out_documents(scans: Sequence[Scan], found: Sequence[_Found], fraction: float) -> None:
    """Choose whole documents, or find that a source must be cut into blocks."""
    if not scans:
        return
    sketches, ends = _joined(found)
    held = chosen_by_hash(sketches.exact_N, group(sketches), fraction)
    for scan, part, held_here in zip(scans, found, np.split(held, ends[:-1]), strict=True):
        chosen = np.flatnonzero(held_here).tolist()
        size = sum(part.sizes[unit] for unit in chosen)
        usual = fraction / 4 <= size / scan.bytes <= min(4 * fraction, (1 + fraction) / 2)
        if scan.documents * fraction >= MANY and len(chosen) >= MANY // 4 and usual:
            scan.held = [part.place(unit) for unit in chosen]
            scan.held_documents, scan.held_bytes = len(chosen), size
        else:
            scan.rule = "blocks"
            scan.block = min(LARGEST, max(SMALLEST, _wanted(scan, fraction) // PASSAGES), max(1, scan.bytes // 4))
            scan.block = max(scan.block, scan.bytes // MOST_BLOCKS)


def _wanted(scan: Scan, fraction: float) -> int:
    """Bytes to hold out."""
    return max(1, int(fraction * scan.bytes), min(LEAST, scan.bytes // 10))


def _blocks_of(scan: Scan, items: Sequence[Item], text_key: str, quiet: Rule) -> _Found:
    """A second pass over a source: its blocks."""
    places, sizes, sketcher = array.array("Q"), array.array("Q"), Sketcher()
    try:
        for index, item in enumerate(items):
            for number, piece in enumerate(read_item(item, text_key, quiet)):
                data, start = piece.text.encode(), 0
                for block, end in enumerate(cuts(data, scan.block)):
                    places.extend((index, number, block))
                    sizes.append(end - start)
                    sketcher.add(data[start:end])
                    start = end
    finally:
        sketches = sketcher.finish()
    return _Found(places, sizes, sketches)


def _hold_out_blocks(scans: Sequence[Scan], found: Sequence[_Found], fraction: float) -> None:
    """Choose whole groups of blocks, evenly spread; single blocks of a source whose groups are too large for that."""
    if not scans:
        return
    sketches, ends = _joined(found)
    labels = np.split(group(sketches), ends[:-1])
    chosen: set[int] = set()
    for scan, part, label in zip(scans, found, labels, strict=True):
        chosen |= _spread(part.sizes, label, _wanted(scan, fraction), chosen)
    for scan, part, label in zip(scans, found, labels, strict=True):
        wanted = _wanted(scan, fraction)
        units = np.flatnonzero(np.isin(label, list(chosen))).tolist()
        size = sum(part.sizes[unit] for unit in units)
        if not min(wanted / 4, scan.bytes / 2) <= size <= max(0.5, fraction) * scan.bytes:
            scan.repeats = True
            units = sorted(_spread(part.sizes, np.arange(len(label)), wanted, set()))
        scan.held = [part.place(unit) for unit in units]
        scan.held_bytes = sum(part.sizes[unit] for unit in units)
        scan.held_documents = len({place[:2] for place in scan.held})


def _spread(sizes: array.array, label: np.ndarray, wanted: int, already: set[int]) -> set[int]:
    """Groups of about `wanted` bytes in all, with those chosen `already`: the groups at evenly spread places of
    the text (by the golden ratio, so that they are spread wherever one stops)."""
    ends = np.cumsum(np.array(sizes, np.int64))
    names, group_N = np.unique(label, return_inverse=True)
    group_size = np.bincount(group_N, sizes).astype(np.int64)
    chosen = {number for number, name in enumerate(names.tolist()) if name in already}
    total, held = int(ends[-1]), int(sum(group_size[number] for number in chosen))
    most = min(2 * wanted, wanted + (total - wanted) // 2)
    for step in range(4 * len(sizes) + 4):
        if held >= wanted or len(chosen) == len(names):
            break
        place = int((step + 0.5) * 0.6180339887498949 % 1.0 * total)
        number = int(group_N[np.searchsorted(ends, place, side="right")])
        if number in chosen:
            continue
        size = int(group_size[number])
        if held + size <= most or (not chosen and size <= total // 2):
            chosen.add(number)
            held += size
    return {int(names[number]) for number in chosen}


# -- the division ------------------------------------------------------------------------------------------------------


def cuts(data: bytes, size: int) -> list[int]:
    """Where the blocks of a text end: after lines, where the text around the line end has the smallest hash within
    size / 2 to 3 * size / 2 bytes of the cut before; in text without lines after a word, else after a character."""
    ends: list[int] = []
    start, total = 0, len(data)
    padded = bytes(8) + data + bytes(8)
    windows = np.ndarray((total + 9,), "<u8", padded, strides=(1,))
    after_N = np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) + 1
    hash_N = (windows[after_N] ^ (windows[after_N + 8] * np.uint64(3))) * np.uint64(0x9E3779B97F4A7C15)
    while total - start > size + size // 2:
        low, high = start + max(1, size // 2), start + max(1, size + size // 2)
        first, last = np.searchsorted(after_N, (low, high + 1))
        if first < last:
            cut = int(after_N[first + int(np.argmin(hash_N[first:last]))])
        else:
            cut = data.find(b"\n", low, min(total - 1, start + 4 * size)) + 1 or _between_words(data, low, high)
        if cut <= start or cut >= total:
            break
        ends.append(cut)
        start = cut
    return [*ends, total]


def _between_words(data: bytes, low: int, high: int) -> int:
    """After the last space of a range, else at the start of a character."""
    cut = data.rfind(b" ", low, high) + 1 or high
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _parts(text: str, scan: Scan, item: int, number: int) -> list[tuple[int, str]]:
    """A piece of an item in parts, each with its side."""
    held = scan.held_in(item).get(number)
    if not held:
        return [(TRAIN, text)]
    data, start, parts = text.encode(), 0, list[tuple[int, str]]()
    for block, end in enumerate(cuts(data, scan.block)):
        side, part = VALIDATION if block in held else TRAIN, data[start:end].decode()
        if parts and parts[-1][0] == side:
            part = parts.pop()[1] + part
        parts.append((side, part))
        start = end
    return parts


def split_item(index: int, documents: Iterator[Document], scan: Scan, fraction: float) -> Iterator[Piece]:
    """The pieces of item number `index` with their sides, in order."""
    side, before = VALIDATION if scan.rule == "all" else TRAIN, None
    held = scan.held_in(index)
    for number, piece in enumerate(documents):
        starts = not piece.continues
        if scan.rule == "blocks":
            for at, (part_side, part) in enumerate(_parts(piece.text, scan, index, number)):
                # Where the text before this part is on the other side, it begins anew.
                yield Piece(part_side, part, starts or part_side != before, starts and at == 0, piece.origin)
                before = part_side
                starts = starts and at > 0
            continue
        if starts and scan.rule == "documents":
            side = VALIDATION if number in held else TRAIN
        elif starts and scan.rule == "hash":
            side = VALIDATION if content_hash(piece.text.encode()) < fraction * 2.0**64 else TRAIN
        yield Piece(side, piece.text, starts, starts, piece.origin)
