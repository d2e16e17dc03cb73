"""What a model's numbers are held against: compressors on the same text, and Python's own parser on its samples."""

import codeop
import gzip
import lzma
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

MOST_JUDGED_CHARACTERS = 100_000


def compression_baselines(text: bytes) -> dict[str, float | int]:
    """Bits per byte of `gzip -9` and `xz -9` on `text`: compressed size x 8 / size. Empty text has none.

    Both see the text as one stream, and so may use what an earlier document said; a model that does not look
    across documents is held against the stronger form.
    """
    if not text:
        return {}
    # A dictionary larger than the text changes nothing but the memory: 674 MiB for -9's own 64 MiB.
    dictionary = min(max(len(text), 4096), 64 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    sizes = {
        "gzip_9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz_9": len(lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)),
    }
    return {"text_bytes": len(text)} | {f"{name}_bits_per_byte": 8 * size / len(text) for name, size in sizes.items()}


def is_python_beginning(text: str) -> bool | None:
    """Whether `text`, cut after its last complete line, is a valid beginning of a Python program. None for empty text.

    The rule is codeop's, by which the interactive interpreter lives: the compiler takes it, or would take more of it.
    It is only compiled, never run. Text that exhausts the parser (nesting, NUL, surrogates) is not accepted.
    """
    text = text[:MOST_JUDGED_CHARACTERS]
    source = text[: text.rfind("\n") + 1]
    while source.endswith("\\\n"):  # a line that goes on is not complete
        source = source[: source.rfind("\n", 0, -1) + 1]
    if not source.strip():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(source, "<sample>", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def parse_rates(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, float | int]]:
    """Per step at which samples were drawn, in order: how many were judged, accepted, and the share (0..1)."""
    verdicts: dict[int, list[bool]] = {}
    for sample in samples:
        verdict = is_python_beginning(f"{sample['prompt']}{sample['text']}")
        if verdict is not None:
            verdicts.setdefault(sample["step"], []).append(verdict)
    return [
        {"step": step, "judged": len(of), "accepted": sum(of), "accepted_share": sum(of) / len(of)}
        for step, of in sorted(verdicts.items())
    ]


def is_python_corpus(config: Mapping[str, Any]) -> bool:
    """Whether every source of a run's configuration is Python source: the standard library, or .py files."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    paths = [s.get("path") if isinstance(s, Mapping) else s for s in sources or []]
    suffixes = (".py", ".py.gz", ".py.zst", ".pyi")
    return bool(paths) and all(isinstance(p, str) and (p == "python" or p.endswith(suffixes)) for p in paths)
