"""Text to token ids and back. Every tokenizer is a Hugging Face `tokenizer.json`, whatever it was made from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kiem.data.bounds import all_bounded, bounded
from kiem.data.trial import try_out
from kiem.errors import DataError
from kiem.files import read_json, write_atomically

EOT = "<|endoftext|>"
# Names of the end of text in published tokenizers, the first that is found counts.
KNOWN_EOT = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<|end|>", "[EOS]", "[SEP]")
# How text is split before merging: words with their leading space, digits in threes, punctuation with the line end
# behind it, runs of spaces but for the last one, which goes with the word. It is Llama 3's: llama.cpp knows it by name.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LARGEST_FILE = 256 * 1024 * 1024  # bytes of a tokenizer.json
MOST_ENTRIES = 10_000_000  # of a vocabulary


class Tokenizer:
    """Wraps `tokenizers.Tokenizer`. Text that spells a special token is encoded as ordinary text."""

    def __init__(self, core: Any, eot: str | None = None) -> None:
        """`eot`: the end of text; without it, a known one of the vocabulary, else `<|endoftext|>` is added.

        Raises DataError for an empty vocabulary, ids that are far apart, and for encoding that depends on chance.
        """
        vocabulary = core.get_vocab(with_added_tokens=True)
        if eot not in vocabulary:
            eot = next((name for name in KNOWN_EOT if name in vocabulary), EOT)
        core.add_special_tokens([eot])  # in the vocabulary already: the id stays, the token becomes special
        core.no_padding()
        core.no_truncation()
        core.encode_special_tokens = True
        self.core, self.eot = core, eot
        self.notes: list[str] = []  # what a user should know of it
        self.eot_id: int = core.token_to_id(eot)
        self.vocab_size: int = max(core.get_vocab(with_added_tokens=True).values()) + 1
        self._spec = json.loads(core.to_str())
        _check_spec(self._spec, len(vocabulary), self.vocab_size)
        self._byte_level = "ByteLevel" in json.dumps(self._spec.get("decoder"))
        self._no_merges = self._spec["model"].get("type") == "BPE" and not self._spec["model"]["merges"]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary, rules and end of text: equal digests give equal ids."""
        text = json.dumps([self._spec, self.eot], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters of a tokenizer that knows no others."""
        if not self._no_merges or self._byte_level or self._spec["model"].get("unk_token") is not None:
            return None
        return frozenset(c for c in self._spec["model"]["vocab"] if len(c) == 1)

    @cached_property
    def _plain_bytes(self) -> bool:
        """Ids are the bytes of the text."""
        vocabulary = self._spec["model"].get("vocab") or {}
        return (
            self._no_merges
            and self._byte_level
            and self._spec["normalizer"] is None
            and all(vocabulary.get(c) == b for b, c in enumerate(_byte_alphabet()))
        )

    @cached_property
    def exact(self) -> bool:
        """The text comes back unchanged, and `token_bytes` says exactly how much of it each id stands for: byte-level
        tokenizers that change nothing beforehand, and those of characters."""
        if self._alphabet is not None:
            return self._spec["normalizer"] is None and self._spec["pre_tokenizer"] is None
        vocabulary = self._spec["model"].get("vocab") or {}
        return (
            self._byte_level
            and self._spec["normalizer"] is None
            and '"add_prefix_space": true' not in json.dumps(self._spec["pre_tokenizer"])
            and "ByteLevel" in json.dumps(self._spec["pre_tokenizer"])
            and self._spec["model"].get("type") == "BPE"
            and all(c in vocabulary for c in _byte_alphabet())
        )

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for what is not in the vocabulary, if there is one."""
        model = self._spec["model"]
        if isinstance(model.get("unk_id"), int):
            return model["unk_id"]
        name = model.get("unk_token")
        return self.core.token_to_id(name) if isinstance(name, str) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens. `decode(encode(text)) == text` for the tokenizers made here."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; uses all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each text's ids as a uint32 array."""
        for text in texts:
            self._check(text)
        if self._plain_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        parts = [bounded(text) for text in texts]
        encodings = iter(self._encode(self.core.encode_batch_fast, [part for text in parts for part in text]))
        found = [[np.array(next(encodings).ids, np.uint32) for _ in text] for text in parts]
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in found]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, uint32 (n,), and where each one's characters are in it, int64 (n, 2): start and end."""
        self._check(text)
        parts = bounded(text)
        ids, spans, start = [], [], 0
        for part, encoding in zip(parts, self._encode(self.core.encode_batch, parts), strict=True):
            ids.append(np.array(encoding.ids, np.uint32))
            spans.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + start)
            start += len(part)
        return np.concatenate(ids), np.concatenate(spans)

    def _encode(self, encode: Any, texts: list[str]) -> list[Any]:
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises a bare Exception
            raise DataError(
                f"the tokenizer cannot encode the text ({error}). Its tokenizer.json is incomplete: use another "
                "tokenizer, such as bpe or bytes."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are written out, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if bad := next((i for i in ids if not 0 <= i < self.vocab_size), None):
            raise DataError(f"token id {bad} is not in the vocabulary of {self.vocab_size} entries")
        return self.core.decode(ids, skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int64 (vocab_size,); special tokens have 0."""
        special = {i for i, token in self.core.get_added_tokens_decoder().items() if token.special}
        counts = np.zeros(self.vocab_size, np.int64)
        for token, i in self.core.get_vocab(with_added_tokens=True).items():
            if i not in special:
                # In the byte-level alphabet one character is one byte; elsewhere the decoder knows best.
                counts[i] = len(token) if self._byte_level else len(self.core.decode([i]).encode())
        return counts

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers' PreTrainedTokenizerFast reads them.

        Raises StorageError, or OSError for a folder that cannot be made.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eot,
            "bos_token": None,
            "pad_token": None,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        for name, text in (
            ("tokenizer.json", self.core.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(settings, indent=2)),
        ):
            write_atomically(folder / name, text)

    @staticmethod
    def load(path: str | Path, trusted: bool = False) -> "Tokenizer":
        """Read a `tokenizer.json`, or a folder with one, or with GPT-2's `vocab.json` and `merges.txt`.

        Unless it is `trusted`, or as plain as those made here, it is first loaded and tried in a process of its own
        (trial.py): a hostile one can hang or abort the library. Raises DataError.
        """
        path = Path(path).expanduser()
        if len(os.fsencode(path.name)) > 255:
            raise DataError(f"tokenizer {path}: the name is too long for a file. Use bpe, bytes, chars, or a path.")
        folder = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            text = _read_text(file)
            if not trusted and not _plain(text):
                _check_ids(file, text)
                try_out(file)
            return _loaded(file, folder, lambda: _core(file, text))
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        if path.is_dir() and vocabulary.is_file() and merges.is_file():
            return _loaded(path, folder, lambda: _gpt2_core(vocabulary, merges))
        found = "it does not exist" if not path.exists() else f"it has neither (given: {path})"
        raise DataError(
            f"tokenizer {path}: {found}. Use bpe, bytes, chars, a tokenizer.json, or a folder with "
            "tokenizer.json, or with vocab.json and merges.txt."
        )

    def _check(self, text: str) -> None:
        if self._alphabet is not None and (unknown := set(text) - self._alphabet):
            at = min(text.index(c) for c in unknown)
            raise DataError(
                f"the character tokenizer does not know {text[at]!r} (U+{ord(text[at]):04X}, character {at} of the "
                f"text; {len(unknown)} unknown in all): it knows the {len(self._alphabet)} characters of the text "
                "it was built from. Use tokenizer bpe or bytes, which encode any text."
            )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: the end of text, 256 bytes, then merges learned from `texts`. Equal texts, equal tokenizer.

    The vocabulary is smaller than `vocab_size` where the text has no more pairs to merge. (Sennrich et al. 2016.)
    """
    if vocab_size < 257:
        raise DataError(f"a bpe tokenizer needs at least 257 entries (256 bytes and {EOT}), given: {vocab_size}")
    from tokenizers import AddedToken, trainers

    core = _byte_level_core(SPLIT)
    alphabet = sorted(_byte_alphabet())
    core.train_from_iterator(
        all_bounded(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(EOT, special=True, normalized=False)],
            initial_alphabet=alphabet,
            show_progress=False,
            max_token_length=32,
        ),
    )
    return Tokenizer(core, EOT)


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end of text."""
    return Tokenizer(_byte_level_core(None, {c: b for b, c in enumerate(_byte_alphabet())}), EOT)


def chars_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One id per character that occurs in `texts`, in code point order, then the end of text."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models

    alphabet = sorted(set().union(*map(set, texts)))
    if not alphabet:
        raise DataError("a character tokenizer needs text: there is none")
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.decoder = decoders.Fuse()
    return Tokenizer(core, EOT)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level alphabet: printable ones for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _byte_level_core(split: str | None, vocabulary: dict | None = None, merges: Sequence = ()) -> Any:
    """Byte-level BPE; `split` None: GPT-2's own split."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Core

    core = Core(models.BPE(vocab=vocabulary, merges=list(merges)) if vocabulary else models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    core.pre_tokenizer = (
        to_bytes
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), to_bytes])
    )
    core.decoder = decoders.ByteLevel()
    return core


def _check_spec(spec: dict[str, Any], n_entries: int, vocab_size: int) -> None:
    """Refuse what cannot serve as a tokenizer of training text."""
    if not n_entries:
        raise DataError("its vocabulary is empty")
    _check_largest(vocab_size - 1, n_entries)
    if spec["model"].get("dropout"):
        raise DataError(
            f"it has BPE dropout ({spec['model']['dropout']}), so that the same text gives different tokens each "
            "time: set model.dropout to null in its tokenizer.json"
        )


def _check_largest(largest: int, n_entries: int) -> None:
    if largest >= min(MOST_ENTRIES, 4 * n_entries + 10_000):
        raise DataError(f"its ids go up to {largest:,}, for {n_entries:,} entries: ids must count from 0")


def _check_ids(file: Path, text: str) -> None:
    """Refuse ids for which the library would take memory by the gigabyte; whatever else is wrong is found later."""
    try:
        spec = json.loads(text)
        ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
        largest = max(ids, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    try:
        _check_largest(largest, len(ids))
    except DataError as error:
        raise DataError(f"tokenizer {file}: {error}") from None


def _loaded(path: Path, folder: Path, make: Callable[[], Any]) -> Tokenizer:
    """The tokenizer with the end of text that is stated beside it. A DataError names its file."""
    try:
        stated = _stated_eot(folder)
        tokenizer = Tokenizer(make(), stated)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith("tokenizer ") else f"tokenizer {path}: {text}") from None
    if stated not in (None, tokenizer.eot):
        tokenizer.notes.append(
            f"its end of text is {stated!r} (eos_token of tokenizer_config.json), which is not in its vocabulary: "
            f"{tokenizer.eot!r} is used"
        )
    return tokenizer


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise DataError(f"tokenizer {file}: {file.stat().st_size:,} bytes, at most {LARGEST_FILE:,} are read")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"tokenizer {file}: not a Hugging Face tokenizer.json (not UTF-8 text)") from None
    except OSError as error:
        raise DataError(f"tokenizer {file}: cannot be read: {error.strerror}") from None


def _plain(text: str) -> bool:
    """Whether a tokenizer.json is of the kind made here: BPE with dense ids, and no other part than ours."""
    try:
        spec = json.loads(text)
        model, parts = spec["model"], (spec["normalizer"], spec["post_processor"])
        ids = sorted({**model["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}.values())
        made = [_byte_level_core(split).to_str() for split in (SPLIT, None)]
        splits = [None, *(json.loads(core)["pre_tokenizer"] for core in made)]
        return (
            model["type"] == "BPE"
            and parts == (None, None)
            and spec["pre_tokenizer"] in splits
            and spec["decoder"] in ({"type": "Fuse"}, json.loads(made[0])["decoder"])
            and ids == list(range(len(ids)))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _core(file: Path, text: str) -> Any:
    from tokenizers import Tokenizer as Core

    try:
        return Core.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"tokenizer {file}: not a Hugging Face tokenizer.json ({error})") from None


def _gpt2_core(vocabulary_file: Path, merges_file: Path) -> Any:
    try:
        vocabulary = read_json(vocabulary_file, LARGEST_FILE)
        lines = (line.rstrip("\r") for line in _read_text(merges_file).split("\n"))
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        _check_largest(max(vocabulary.values(), default=0), len(vocabulary))
        core = _byte_level_core(None, vocabulary, merges)
    except DataError:
        raise
    except Exception as error:  # the library raises a bare Exception
        folder = vocabulary_file.parent
        raise DataError(f"tokenizer {folder}: vocab.json and merges.txt do not make a tokenizer ({error})") from None
    if missing := [b for b, c in enumerate(_byte_alphabet()) if c not in vocabulary]:
        raise DataError(
            f"tokenizer {vocabulary_file}: not byte-level BPE as GPT-2's: {len(missing)} of 256 bytes have no entry"
        )
    return core


def _stated_eot(folder: Path) -> str | None:
    """The end of text that `tokenizer_config.json` beside the tokenizer names, if any."""
    file = folder / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"tokenizer {file}: cannot be read as JSON ({str(error)[:200]}): repair or remove it") from None
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise DataError(f"tokenizer {file}: eos_token is {type(name).__name__}: it takes one token, as text")
    return name
