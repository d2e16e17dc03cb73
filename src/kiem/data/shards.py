"""Tokens on disk: shards, document offsets and a manifest, written last. A folder without a manifest is not data.

manifest.json       what there is, with the size and SHA-256 of every file; its own checksum; the report
tokenizer/          tokenizer.json
NAME.bin            flat little-endian uint16 (vocabularies up to 65,536) or uint32 token ids, about 64 MiB
NAME.docs           uint32: where in this shard its documents begin
NAME.sizes          uint32: how many bytes of text each token stands for; only of validation text, and only where the
                    tokenizer does not say it (Tokenizer.exact)
NAME.names.zst      one line for each document: where its text came from
"""

import array
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from kiem.data.holdout import NOT_HELD_OUT
from kiem.data.notes import is_manifest
from kiem.data.tokenizer import Tokenizer
from kiem.errors import DataError
from kiem.files import publish, read_json, sync_folder, write_atomically

FORMAT = 2
MANIFEST = "manifest.json"
MOST_NAME_BYTES = 1 << 18  # of where a document came from: a path, and one in an archive
VERIFY_UP_TO = 1 << 30  # bytes: a larger data set is opened by size, and checked in full on request


def token_type(vocab_size: int) -> np.dtype:
    """uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# -- writing -----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard. Its files have a temporary name until `close`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, with_sizes: bool = False) -> None:
        """`with_sizes`: `add` is given the bytes of each token, and they are kept."""
        self.folder, self.name, self.dtype = folder, name, dtype
        self._sizes: list[np.ndarray] | None = [] if with_sizes else None
        self._left_over = 0  # bytes of text without a token, which the next token gets
        self.n_tokens = self.n_bytes = self.n_begun = 0
        self._starts, self._names = array.array("L"), list[str]()
        self._file = open(folder / f"{name}.bin.tmp", "wb")  # noqa: SIM115, closed by close or abandon

    @property
    def n_documents(self) -> int:
        return len(self._starts)

    def start(self, eot_id: int, origin: str | None = None, counts: bool = True) -> None:
        """The end of text; with an origin it begins a document, without one it ends the split. `counts`: the document
        is not the rest of one that a held-out passage was taken from."""
        if origin is not None:
            self.n_begun += counts
            self._starts.append(self.n_tokens)
            self._names.append(origin.replace("\n", " "))
        self.add(np.array([eot_id]), 0)

    def add(self, ids: np.ndarray, n_bytes: int, sizes: np.ndarray | None = None) -> None:
        """Tokens of `n_bytes` bytes of text; `sizes`: of each token."""
        if self._sizes is not None:
            if sizes is None:
                sizes = np.zeros(len(ids), np.int64)
            self._left_over += n_bytes - int(sizes.sum())
            if len(ids):
                sizes = sizes.copy()
                sizes[0] += self._left_over
                self._left_over = 0
                self._sizes.append(sizes.astype("<u4"))
        self._file.write(ids.astype(self.dtype).tobytes())
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes

    def close(self) -> dict[str, Any]:
        """Make the files durable under their names; what the manifest says of this shard. No tokens: no files."""
        if not self.n_tokens:
            self._file.close()
            Path(self._file.name).unlink()
            return {"name": self.name, "tokens": 0, "documents": 0, "begun": 0, "bytes": 0, "files": {}}
        self._file.flush()
        written = Path(self._file.name)
        files = {f"{self.name}.bin": {"bytes": written.stat().st_size, "sha256": _sha256(written)}}
        names = "".join(f"{name}\n" for name in self._names).encode("utf-8", "surrogateescape")
        others = {
            "docs": np.array(self._starts, "<u4").tobytes(),
            "names.zst": zstandard.ZstdCompressor().compress(names),
        }
        if self._sizes is not None:
            others["sizes"] = np.concatenate(self._sizes).tobytes()
        for suffix, data in others.items():
            write_atomically(self.folder / f"{self.name}.{suffix}", data)
            files[f"{self.name}.{suffix}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        publish(self._file, self.folder / f"{self.name}.bin")
        sync_folder(self.folder)
        return {
            "name": self.name,
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "begun": self.n_begun,
            "bytes": self.n_bytes,
            "files": files,
        }

    def abandon(self) -> None:
        """Stop without a shard, and leave nothing."""
        with suppress(OSError):  # a full disk: what is buffered cannot be written
            self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a note of what is done; the whole of it or nothing."""
    write_atomically(path, json.dumps(value, indent=1))


def write_manifest(
    folder: Path, train: list[list[dict]], validation: list[dict], tokenizer: Tokenizer, options: dict, report: dict
) -> None:
    """Makes the folder a data set. `train`: shards of each source; `options`: what the data was made with."""
    body = {
        "format": FORMAT,
        "dtype": token_type(tokenizer.vocab_size).str,
        "tokenizer": tokenizer.digest,
        "options": options,
        "train": train,
        "validation": validation,
        "report": report,
    }
    write_json(folder / MANIFEST, body | {"checksum": _checksum(body)})


def _checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def _search(file: Any, length: int, value: int) -> int:
    """How many of the `length` sorted uint32 of a file are below `value`; reads at most 16 KiB and a few probes."""
    low, high = 0, length
    while high - low > 4096:
        middle = (low + high) // 2
        file.seek(4 * middle)
        if int.from_bytes(file.read(4), "little") < value:
            low = middle + 1
        else:
            high = middle
    file.seek(4 * low)
    return low + int(np.searchsorted(np.frombuffer(file.read(4 * (high - low)), "<u4"), value))


class Split:
    """The tokens of one source, or of the validation text, as one sequence over all its shards.

    Files are opened for each read: nothing is mapped, memory does not grow with what was read, and there are no more
    open files for more shards.
    """

    def __init__(
        self, folder: Path, name: str, shards: list[dict], dtype: np.dtype, tokenizer: Tokenizer | None = None
    ) -> None:
        """`tokenizer`: for `text_bytes` of shards that do not keep it."""
        shards = [shard for shard in shards if shard["tokens"]]  # an empty one has no files
        self.folder, self.name, self.shards, self.dtype, self._tokenizer = folder, name, shards, dtype, tokenizer
        self._token_ends = list(accumulate(shard["tokens"] for shard in shards))
        self._document_ends = list(accumulate(shard["documents"] for shard in shards))
        self.n_tokens: int = self._token_ends[-1] if shards else 0
        self.n_documents: int = self._document_ends[-1] if shards else 0
        self.n_bytes: int = sum(shard["bytes"] for shard in shards)

    def __repr__(self) -> str:
        return f"Split({self.name}: {self.n_tokens:,} tokens, {self.n_documents:,} documents, {self.n_bytes:,} bytes)"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop), uint16 or uint32 (stop - start,)."""
        ids = self._read(start, stop, "bin", self.dtype)
        entries = self._tokenizer.vocab_size if self._tokenizer else None
        if entries is not None and len(ids) and (largest := int(ids.max())) >= entries:
            raise DataError(
                f"{self.folder}: {self.name} has the token id {largest}, its tokenizer only {entries} entries: "
                f"somebody changed it. Delete {self.folder} and prepare again."
            )
        return ids

    def text_bytes(self, start: int, stop: int) -> int:
        """How many bytes of text the tokens [start, stop) stand for; over all of a split exactly `n_bytes`."""
        if any(f"{shard['name']}.sizes" in shard["files"] for shard in self.shards):
            return int(self._read(start, stop, "sizes", np.dtype("<u4")).sum(dtype=np.int64))
        if self._tokenizer is None:
            raise ValueError("a split without a tokenizer does not know the bytes of its tokens")
        return int(self._tokenizer.token_bytes[self.tokens(start, stop)].sum())

    def _read(self, start: int, stop: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        """Entries [start, stop) of the shards' files of a kind."""
        parts = self._parts(start, stop)
        out = np.empty(stop - start, dtype)
        for shard, base, first, last in parts:
            with open(self.folder / f"{shard['name']}.{suffix}", "rb", buffering=0) as file:
                file.seek((first - base) * dtype.itemsize)
                view = memoryview(out[first - start : last - start].data).cast("B")
                if file.readinto(view) != len(view):
                    raise DataError(
                        f"{file.name}: shorter than its manifest says. Delete {self.folder} and prepare again."
                    )
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) where a document begins (its end-of-text token), int64."""
        found = [np.empty(0, np.int64)]
        for shard, base, first, last in self._parts(start, stop):
            with self._open_starts(shard) as file:
                low = _search(file, shard["documents"], first - base)
                file.seek(4 * low)
                # A document has at least its end-of-text token, so no more of them fit.
                data = file.read(4 * min(last - first, shard["documents"] - low))
            starts = np.frombuffer(data, "<u4").astype(np.int64) + base
            found.append(starts[(first <= starts) & (starts < last)])
        return np.concatenate(found)

    def document_names(self, start: int, stop: int) -> list[str]:
        """Where the text of tokens [start, stop) came from, in order; their place, if that cannot be read: names are
        for messages about something else."""
        numbers = list[int]()
        try:
            for shard, base, first, last in self._parts(start, stop):
                with self._open_starts(shard) as file:
                    low = _search(file, shard["documents"], first - base + 1) - 1
                    high = _search(file, shard["documents"], last - base)
                before = self._document_ends[self.shards.index(shard)] - shard["documents"]
                numbers += range(max(0, before + low), before + high)
            names = [self._name(number) for number in numbers]
        except (OSError, ValueError, zstandard.ZstdError):
            names = []
        if start < stop and not names:
            names = [f"tokens {start} to {stop} of {self.name}"]
        return list(dict.fromkeys(names))

    def _open_starts(self, shard: dict) -> Any:
        return open(self.folder / f"{shard['name']}.docs", "rb", buffering=0)

    def _name(self, number: int) -> str:
        index = bisect_right(self._document_ends, number)
        shard = self.shards[index]
        names = _read_names(self.folder / f"{shard['name']}.names.zst", shard["documents"])
        return names[number - (self._document_ends[index] - shard["documents"])]

    def _parts(self, start: int, stop: int) -> list[tuple[dict, int, int, int]]:
        """(shard, its first position, first and last position wanted) for each shard that [start, stop) touches."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens} in {self.name}")
        parts, index = [], bisect_right(self._token_ends, start)
        while start < stop:
            end, shard = self._token_ends[index], self.shards[index]
            parts.append((shard, end - shard["tokens"], start, min(stop, end)))
            start, index = end, index + 1
        return parts


@lru_cache(maxsize=2)
def _read_names(path: Path, documents: int) -> list[str]:
    """The names of all documents of a shard. Raises ValueError, ZstdError for a file that is not as it was written."""
    packed = path.read_bytes()
    if zstandard.frame_content_size(packed) > documents * MOST_NAME_BYTES:
        raise ValueError("names of more documents than there are")
    names = zstandard.ZstdDecompressor().decompress(packed).decode("utf-8", "surrogateescape").split("\n")[:-1]
    if len(names) != documents:
        raise ValueError(f"{len(names)} names of {documents} documents")
    return names


@dataclass(frozen=True)
class Dataset:
    """An open data set. `train`: each source with its share of the training tokens (they add up to 1).

    `proportional`: no weights were given, the shares are the sources' sizes. `fingerprint` is of the tokens and the
    tokenizer: it does not depend on where the data lies, what its files were called, or the weights. `report` has the
    keys documents, bytes, tokens, training, validation (with its `rule`), sources, tokenizer (what it loses), notes
    (what a user should be told, in sentences), problems (a list of {origin, line, what, action, kind}, the first of
    each kind), n_problems (of all) and problem_counts (by kind).
    """

    path: Path
    fingerprint: str
    tokenizer: Tokenizer
    train: list[tuple[Split, float]]
    validation: Split | None
    report: dict[str, Any]
    proportional: bool = True

    @property
    def lossless(self) -> bool:
        """Whether the tokenizer keeps the text whole, so that bits per byte say something: tried on a sample of it."""
        return bool(self.report.get("tokenizer", {}).get("lossless", True))

    @property
    def unknown_share(self) -> float:
        """Share of the text that is unknown to the tokenizer, by the same sample."""
        return float(self.report.get("tokenizer", {}).get("unknown_share", 0.0))

    def verify(self) -> None:
        """Read every file and compare with its checksum; DataError names the damaged ones."""
        _verify(self.path, _shards(self))


def open_dataset(
    path: str | Path, weights: Sequence[float | None] | None = None, names: Sequence[str] | None = None
) -> Dataset:
    """Open prepared data. Checks the manifest, the size of every file, and up to 1 GiB their checksums (see `verify`).

    `weights`: of the sources, relative; none: in proportion to their tokens. `names`: what all the sources
    are called now, in messages and in the report; the same text may have been prepared under another name.
    """
    path = Path(path)
    body = _read_manifest(path)
    tokenizer = Tokenizer.load(path / "tokenizer", trusted=True)
    if tokenizer.digest != body["tokenizer"]:
        raise DataError(f"{path / 'tokenizer'}: not the tokenizer of this data. Delete {path} and prepare again.")
    dtype = np.dtype(body["dtype"])
    if names is not None and len(names) != len(body["report"]["sources"]):
        raise DataError(f"{path}: {len(names)} names for {len(body['report']['sources'])} sources")
    report = _named(body["report"], names)
    splits = [
        Split(path, f"source {source['path']}", shards, dtype, tokenizer)
        for source, shards in zip(report["sources"], body["train"], strict=False)
    ]
    given = [weight for weight in weights or [] if weight is not None]
    if given and len(given) != len(splits):
        raise DataError(f"{path}: {len(given)} weights for {len(splits)} sources")
    shares = given or [split.n_tokens for split in splits]
    total = sum(shares) or 1
    dataset = Dataset(
        path,
        _fingerprint(body),
        tokenizer,
        [(split, share / total) for split, share in zip(splits, shares, strict=True)],
        Split(path, "validation", body["validation"], dtype, tokenizer),
        report,
        not given,
    )
    _check_sizes(path, _shards(dataset))
    if sum(facts["bytes"] for shard in _shards(dataset) for facts in shard["files"].values()) <= VERIFY_UP_TO:
        dataset.verify()
    return dataset


def _named(report: dict, names: Sequence[str] | None) -> dict:
    """The report with the sources' present names, and the rule of the validation text in one sentence."""
    sources = [
        source | {"path": name}
        for source, name in zip(
            report["sources"], names or [source["path"] for source in report["sources"]], strict=True
        )
    ]
    rule = "; ".join(f"{s['path']}: {s['held_out']}" for s in sources if s["held_out"] != NOT_HELD_OUT)
    return report | {"sources": sources, "validation": report["validation"] | {"rule": rule}}


def _fingerprint(body: dict) -> str:
    content = [body["dtype"], body["tokenizer"], [_contents(s) for s in body["train"]], _contents(body["validation"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _contents(shards: list[dict]) -> list[str]:
    return [shard["files"][f"{shard['name']}.{suffix}"]["sha256"] for shard in shards for suffix in ("bin", "docs")]


def _splits(dataset: Dataset) -> list[Split]:
    return [*(split for split, _ in dataset.train), *([dataset.validation] if dataset.validation else [])]


def _shards(dataset: Dataset) -> list[dict]:
    return [shard for split in _splits(dataset) for shard in split.shards]


def _read_manifest(path: Path) -> dict:
    try:
        body = read_json(path / MANIFEST)
        checksum = body.pop("checksum")
        told = checksum == _checksum(body)
    except FileNotFoundError:
        raise DataError(
            f"{path}: not prepared data (no {MANIFEST}; it is written last, so preparing did not finish). Prepare "
            f"the text again: it continues where it stopped."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"{path / MANIFEST}: damaged ({why:.200}). Delete {path} and prepare again.") from None
    if body.get("format") != FORMAT:
        raise DataError(
            f"{path}: data of format {body.get('format')!r}, this version reads format {FORMAT}. Prepare "
            "the text again."
        )
    if not told:
        raise DataError(f"{path / MANIFEST}: damaged (checksum mismatch). Delete {path} and prepare again.")
    if not is_manifest(body):
        raise DataError(f"{path / MANIFEST}: not as Kiem writes it. Delete {path} and prepare again.")
    return body


def _check_sizes(path: Path, shards: list[dict]) -> None:
    for shard in shards:
        for name, facts in shard["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != facts["bytes"]:
                found = "missing" if size is None else f"{size:,} bytes where there should be {facts['bytes']:,}"
                raise DataError(f"{path / name}: {found}. Delete {path} and prepare again.")


def _verify(path: Path, shards: list[dict]) -> None:
    _check_sizes(path, shards)
    bad = [
        name for shard in shards for name, facts in shard["files"].items() if _sha256(path / name) != facts["sha256"]
    ]
    if bad:
        raise DataError(f"{path}: damaged: {', '.join(bad)} (checksum mismatch). Delete {path} and prepare again.")


def check_shard(path: Path, shard: dict) -> bool:
    """Whether a finished shard is there and whole."""
    try:
        _verify(path, [shard])
    except DataError:
        return False
    return True
