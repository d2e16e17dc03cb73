"""Text becomes shards of tokens: cached by content, continued after an interruption, in bounded memory.

1. The digests of all contents, with the tokenizer and the options, name a folder of the cache. If it has a manifest,
   that is it.
2. One pass over the text (holdout.py) finds what is held out and samples text for the tokenizer.
3. Each source is tokenized in order into shards. A shard's note is written after the shard, and says where the next
   begins: a second call after an interruption keeps every shard with a note, and the result is the same byte for byte.
4. The manifest is written last.

The tokenizers library encodes on all cores in threads of its own while this process reads ahead. There are no worker
processes, so it works from a script without a `__main__` guard and from a notebook.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from kiem.config.run import DataConfig, Source
from kiem.data.foreign import Loss, bytes_of_tokens, measure
from kiem.data.formats import ChangedError, Item, Problem, Problems, Rule
from kiem.data.holdout import TRAIN, VALIDATION, Piece, Sample, Scan, scan_sources, split_item
from kiem.data.notes import is_note
from kiem.data.read import read_item
from kiem.data.shards import (
    FORMAT,
    MANIFEST,
    Dataset,
    ShardWriter,
    check_shard,
    open_dataset,
    token_type,
    write_json,
    write_manifest,
)
from kiem.data.sources import list_items
from kiem.data.tokenizer import Tokenizer, bytes_tokenizer, chars_tokenizer, train_bpe
from kiem.errors import DataError, StorageError
from kiem.files import TEMPORARY, exclusive, read_json

VERSION = 2  # raise it when the same text and options give other tokens: it is part of the cache's key
SHARD_BYTES = 64 * 1024 * 1024
SHARD_DOCUMENTS = 1_000_000  # documents a shard has at most, so that its list of them stays small
BATCH_CHARACTERS = 512 * 1024  # for each core: text that is encoded at once
SHOW_EVERY = 1024 * 1024  # bytes of text between calls of `progress`
SCAN = "scan.json"
TRIED = 512 * 1024  # bytes of the text that a tokenizer which may lose text is tried on
NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOTDIR, errno.EEXIST}

Progress = Callable[[int, int, int], None]


@dataclass
class _Job:
    """What is to be prepared: text sources and then validation sources, each with its items."""

    sources: list[Source]
    items: list[list[Item]]
    n_train: int
    data: DataConfig
    vocab_size: int
    tokenizer: Tokenizer | None  # None: made from the text

    def rule(self, source: int) -> str:
        """What is held out of a source (see holdout.scan_sources)."""
        return "all" if source >= self.n_train else "divide" if self.data.validation is None else "none"

    def text_key(self, source: Source) -> str:
        """The field of the text in the records of a source."""
        return source.text_key or self.data.text_key

    def options(self) -> dict:
        """Everything but the text that decides the tokens."""
        return {
            "version": VERSION,
            "tokenizer": self.data.tokenizer if self.tokenizer is None else self.tokenizer.digest,
            "vocab_size": self.vocab_size if self.data.tokenizer == "bpe" else None,
            "text_keys": [self.text_key(source) for source in self.sources],
            "train_sources": self.n_train,
            "validation_fraction": self.data.validation_fraction if self.data.validation is None else None,
            "on_bad_text": self.data.on_bad_text,
        }

    def key(self) -> str:
        contents = [[[item.kind, item.digest] for item in items] for items in self.items]
        return hashlib.sha256(json.dumps([FORMAT, self.options(), contents]).encode()).hexdigest()[:32]


def prepare(
    data: DataConfig,
    vocab_size: int,
    cache: Path,
    progress: Progress | None = None,
    tokenizer_only: bool = False,
) -> Dataset:
    """The tokens of the configured text, made now or taken from `cache`.

    `vocab_size`: entries of a bpe tokenizer that is trained here; other tokenizers have their own. `progress(documents,
    bytes, tokens)` is called with totals. `tokenizer_only`: stop when there is a tokenizer; then `train` is empty and
    `validation` None. Raises DataError for text or a tokenizer that cannot be used, StorageError for a full disk.
    """
    sources = [*data.sources, *(data.validation or [])]
    with _storage(cache):
        tokenizer = None
        if data.tokenizer == "bytes":
            tokenizer = bytes_tokenizer()
        elif data.tokenizer not in ("bpe", "chars"):
            tokenizer = Tokenizer.load(data.tokenizer)
        passed_over = Problems()
        job = _Job(
            sources,
            [list_items(source, cache, passed_over) for source in sources],
            len(data.sources),
            data,
            vocab_size,
            tokenizer,
        )
        weights = [source.weight for source in data.sources]
        names = [source.path for source in sources]
        folder = Path(cache) / "data" / job.key()
        with suppress(DataError):  # not there, or damaged
            return _noted(open_dataset(folder, weights, names), passed_over)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        with exclusive(folder.with_suffix(".lock")):
            if (folder / MANIFEST).exists():
                with suppress(DataError):  # another process has made it while this one waited
                    return _noted(open_dataset(folder, weights, names), passed_over)
                shutil.rmtree(folder)  # damaged: it is made again from the text
            folder.mkdir(exist_ok=True)
            try:
                scans, problems, tokenizer, loss = _scan(job, folder)
                facts = _Facts(scans, problems, loss, (job.tokenizer or tokenizer).notes)
                if tokenizer_only:
                    return _noted(Dataset(folder, "", tokenizer, [], None, _report(job, facts, [], [])), passed_over)
                _encode(job, folder, facts, tokenizer, progress)
            except ChangedError:
                shutil.rmtree(folder)  # what is there was made from text that is no more
                raise
            return _noted(open_dataset(folder, weights, names), passed_over)


def _sweep(data: Path) -> None:
    """Remove half-written files of processes that are no more: on a full disk they would keep it full."""
    waste = [f"{place}{kind}" for place in ("", "tokenizer/") for kind in ("*.tmp", f"{TEMPORARY}*")]
    for folder in {data / path.relative_to(data).parts[0] for kind in waste for path in data.glob(f"*/{kind}")}:
        with suppress(OSError), exclusive(folder.with_suffix(".lock"), timeout=0):
            for path in (path for kind in waste for path in folder.glob(kind)):
                path.unlink(missing_ok=True)


@contextmanager
def _storage(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            raise StorageError(
                f"{error.filename or cache}: {error.strerror}. The tokens of the text are kept in {cache}: make room "
                "there or choose another folder. What is complete is kept; preparing continues from there."
            ) from None
        raise


# -- the pass over the text --------------------------------------------------------------------------------------------


def _scan(job: _Job, folder: Path) -> tuple[list[Scan], Problems, Tokenizer, Loss]:
    """The scan of each source, the tokenizer and what it loses; all kept in the folder."""
    note = folder / SCAN
    try:
        known = read_json(note)
        problems = Problems(**known["problems"])
        scans = [Scan(**scan | {"held": [tuple(place) for place in scan["held"]]}) for scan in known["scans"]]
        return scans, problems, Tokenizer.load(folder / "tokenizer", trusted=True), Loss(**known["loss"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        problems = Problems()
    own = job.tokenizer is None or job.tokenizer.exact
    sample = Sample() if own else Sample(TRIED)
    characters, before = set[str](), [0]

    def check(number: int, scan: Scan) -> None:
        if not scan.documents:
            found = problems.count - before[-1]
            first = problems.first[-1:] if found == 1 else problems.first[before[-1] : before[-1] + 1]
            because = f" ({found:,} problem{'s' * (found != 1)}, such as: {Problem(**first[0])})" if first else ""
            raise DataError(f"source {job.sources[number].path}: it holds no usable text{because}")
        before.append(problems.count)

    scans = scan_sources(
        [(items, job.text_key(source)) for source, items in zip(job.sources, job.items, strict=True)],
        Rule(job.data.on_bad_text, problems),
        [job.rule(number) for number in range(len(job.sources))],
        job.data.validation_fraction,
        sample if job.data.tokenizer == "bpe" or not own else None,
        characters.update if job.data.tokenizer == "chars" else None,
        check,
    )
    if job.tokenizer is not None:
        tokenizer = job.tokenizer
    elif job.data.tokenizer == "bpe":
        tokenizer = train_bpe(sample.training_texts(scans), job.vocab_size)
    else:
        tokenizer = chars_tokenizer(characters)
    loss = Loss() if own else _measured(job, tokenizer, sample.training_texts(scans))
    tokenizer.save(folder / "tokenizer")
    write_json(
        note,
        {
            "scans": [asdict(scan) for scan in scans],
            "problems": asdict(problems),
            "loss": asdict(loss),
        },
    )
    return scans, problems, tokenizer, loss


def _measured(job: _Job, tokenizer: Tokenizer, texts: Iterable[str]) -> Loss:
    try:
        return measure(tokenizer, texts)
    except DataError as error:
        raise DataError(f"tokenizer {job.data.tokenizer}: {error}") from None


@dataclass
class _Facts:
    """What is known before the text is tokenized."""

    scans: list[Scan]
    problems: Problems
    loss: Loss
    notes: list[str]


class _Counter:
    """Adds up documents, bytes and tokens, and shows them now and then."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.totals, self._shown = progress, [0, 0, 0], 0

    def add(self, *more: int) -> None:
        self.totals = [total + new for total, new in zip(self.totals, more, strict=True)]
        if self.totals[1] >= self._shown + SHOW_EVERY:
            self.show()

    def show(self) -> None:
        self._shown = self.totals[1]
        if self.progress:
            self.progress(*self.totals)


# -- tokens ------------------------------------------------------------------------------------------------------------


def _encode(job: _Job, folder: Path, facts: _Facts, tokenizer: Tokenizer, progress: Progress | None) -> None:
    """Tokenize every source and write the manifest."""
    counter = _Counter(progress)
    shards = [_encode_source(job, number, folder, scan, tokenizer, counter) for number, scan in enumerate(facts.scans)]
    counter.show()
    train = [[s[TRAIN] for s in source if s[TRAIN]["tokens"]] for source in shards[: job.n_train]]
    validation = [s[VALIDATION] for source in shards for s in source if s[VALIDATION]["tokens"]]
    report = _report(job, facts, train, validation)
    write_manifest(folder, train, validation, tokenizer, job.options(), report)
    wanted = {name for shard in chain(*train, validation) for name in shard["files"]} | {MANIFEST, "tokenizer"}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()


def _encode_source(
    job: _Job, number: int, folder: Path, scan: Scan, tokenizer: Tokenizer, counter: "_Counter"
) -> list[list[dict]]:
    """The shards of one source, each with a training and a validation part."""
    done: list[list[dict]] = []
    start, ended = (0, 0), False
    while not ended and (note := _read_note(folder, number, len(done))):
        done.append(note["shards"])
        start, ended = tuple(note["next"]), note["ended"]
        for shard in note["shards"]:
            counter.add(shard["begun"], shard["bytes"], shard["tokens"])
    encoded = _encoded(tokenizer, _places(job, number, scan, start))
    last = number == len(job.sources) - 1
    while not ended:
        pair = [
            ShardWriter(
                folder,
                f"{side}-{number:03d}-{len(done):05d}",
                token_type(tokenizer.vocab_size),
                side == "validation" and not tokenizer.exact,
            )
            for side in ("train", "validation")
        ]
        try:
            start, ended = _fill(pair, encoded, tokenizer, start, counter)
            if ended:  # the end of text that the last document of a split is followed by
                for side, writer in enumerate(pair):
                    if (number < job.n_train) if side == TRAIN else last:
                        writer.start(tokenizer.eot_id)
                        counter.add(0, 0, 1)
            done.append([writer.close() for writer in pair])
        except BaseException:
            for writer in pair:
                writer.abandon()
            raise
        write_json(folder / _note_name(number, len(done) - 1), {"shards": done[-1], "next": start, "ended": ended})
    if sum(shard["bytes"] for pair in done for shard in pair) != scan.bytes:
        raise ChangedError(
            f"source {job.sources[number].path}: changed while it was read, or can no longer be read. Run again "
            "when nothing writes to it."
        )
    return done


def _fill(
    pair: list[ShardWriter], encoded: Iterator, tokenizer: Tokenizer, place: tuple[int, int], counter: "_Counter"
) -> tuple[tuple[int, int], bool]:
    """Write pieces until a shard is full or the source ends; (place of the next piece, whether it ended)."""
    for place, piece, ids, sizes in encoded:
        writer, n_bytes = pair[piece.side], len(piece.text.encode())
        if piece.starts:
            writer.start(tokenizer.eot_id, piece.origin, piece.counts)
        writer.add(ids, n_bytes, sizes)
        counter.add(int(piece.counts), n_bytes, len(ids) + piece.starts)
        if writer.n_tokens * writer.dtype.itemsize >= SHARD_BYTES or writer.n_documents >= SHARD_DOCUMENTS:
            return (place[0], place[1] + 1), False
    return place, True


def _note_name(source: int, shard: int) -> str:
    return f"note-{source:03d}-{shard:05d}.json"


def _read_note(folder: Path, source: int, shard: int) -> dict | None:
    try:
        note = read_json(folder / _note_name(source, shard))
    except (OSError, ValueError):
        return None
    return note if is_note(note) and all(check_shard(folder, part) for part in note["shards"]) else None


def _places(job: _Job, number: int, scan: Scan, start: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Piece]]:
    """Pieces of a source from place (item, piece of it) on."""
    quiet = Rule("skip" if job.data.on_bad_text == "error" else job.data.on_bad_text, lambda problem: None)
    for index in range(start[0], len(job.items[number])):
        item = job.items[number][index]
        documents = read_item(item, job.text_key(job.sources[number]), quiet)
        for count, piece in enumerate(split_item(index, documents, scan, job.data.validation_fraction)):
            if (index, count) >= start:
                yield (index, count), piece


def _encoded(tokenizer: Tokenizer, pieces: Iterator[tuple[tuple[int, int], Piece]]) -> Iterator[tuple]:
    """(place, piece, ids, bytes of each id or None): one batch is encoded while the next is read."""
    size = BATCH_CHARACTERS * min(64, max(2, os.cpu_count() or 1))
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in _batches(pieces, size):
            job = pool.submit(_ids_and_sizes, tokenizer, [piece for _, piece in batch])
            if waiting:
                yield from _joined(*waiting)
            waiting = batch, job
        if waiting:
            yield from _joined(*waiting)


def _ids_and_sizes(tokenizer: Tokenizer, pieces: list[Piece]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The ids of each piece; with the bytes of each id where the text is scored and the tokenizer does not say them."""
    found: list[tuple[np.ndarray, np.ndarray | None]] = [
        (ids, None) for ids in tokenizer.encode_arrays([piece.text for piece in pieces])
    ]
    if not tokenizer.exact:
        for number, piece in enumerate(pieces):
            if piece.side == VALIDATION:
                ids, spans = tokenizer.encode_with_spans(piece.text)
                found[number] = ids, bytes_of_tokens(piece.text, spans)
    return found


def _joined(batch: list, job: Future) -> Iterator[tuple]:
    for (place, piece), (ids, sizes) in zip(batch, job.result(), strict=True):
        yield place, piece, ids, sizes


def _batches(pieces: Iterator, size: int) -> Iterator[list]:
    batch, characters = [], 0
    for place, piece in pieces:
        batch.append((place, piece))
        characters += len(piece.text) + 64
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _noted(dataset: Dataset, passed_over: Problems) -> Dataset:
    """The data set with the files that were passed over in its report too."""
    report = dataset.report
    problems = Problems(report["n_problems"], report["problem_counts"], report["problems"]).merged(passed_over)
    notes = [*report["notes"], *passed_over.sentences()]
    return replace(dataset, report=report | _problem_report(problems) | {"notes": notes})


def _problem_report(problems: Problems) -> dict:
    return {"problems": problems.first, "n_problems": problems.count, "problem_counts": problems.counts}


def _report(job: _Job, facts: _Facts, train: list[list[dict]], validation: list[dict]) -> dict:
    """What was found, in numbers; the same for the same text whenever and wherever it is made."""
    scans, problems = facts.scans, facts.problems

    def total(shards: list[dict], scans: Sequence[Scan], held: bool) -> dict:
        documents = sum(scan.held_documents if held else scan.documents for scan in scans)
        return {"documents": documents} | {key: sum(shard[key] for shard in shards) for key in ("bytes", "tokens")}

    sources = [
        {
            "path": source.path,
            "files": len(items),
            "documents": scan.documents,
            "bytes": scan.bytes,
            "held_out": scan.describe(),
        }
        for source, items, scan in zip(job.sources, job.items, scans, strict=True)
    ]
    for source, shards, scan in zip(sources, train, scans, strict=False):
        source["training"] = total(shards, [scan], False)
    return {
        **total([*chain(*train), *validation], scans, False),
        "training": total([*chain(*train)], scans[: job.n_train], False),
        "validation": total(validation, scans, True),
        "sources": sources,
        "tokenizer": asdict(facts.loss),
        "notes": [
            *(f"tokenizer: {note}" for note in facts.notes),
            *([] if facts.loss.lossless else [facts.loss.describe()]),
            *problems.sentences(),
        ],
        **_problem_report(problems),
    }
