"""Tensors in one safetensors file: written without a copy and hashed on the way, read when the checksum is right.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header that gives each
tensor's data type, shape and place, then the bytes. Any safetensors reader opens these files. The library reads them;
it does not write them because it neither hashes on the way nor passes on the operating system's error.
"""

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiem.files import from_json, open_regular

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIASES = "kiem.aliases"  # in the header's metadata: {name: the name it is stored under}


def tensor_bytes(named: Mapping[str, Tensor]) -> int:
    """Bytes that `named` takes in a file, header aside; a tensor under two names counts once."""
    kept, _ = _unique(named)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new file, flushed to the disk; return its size and checksum, {"bytes": int, "sha256": str}.

    Names that share one tensor are stored once. Raises OSError as the system gives it, ValueError for a data type or
    layout that the format does not have.
    """
    kept, aliases = _unique(named)
    # Widest types first: then every tensor starts at a multiple of its item's size.
    order = sorted(kept, key=lambda name: (-kept[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _ALIASES: json.dumps(aliases, sort_keys=True)}}
    start = 0
    for name in order:
        tensor = kept[name]
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ValueError(f"{name}: {tensor.dtype} {tensor.layout} cannot be stored")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file, ThreadPoolExecutor(1) as pool:
        blocks: list[bytes | Tensor] = [struct.pack("<Q", len(text)) + text, *(kept[name] for name in order)]
        for block in blocks:
            data = _raw(block) if isinstance(block, Tensor) else memoryview(block)
            hashing = pool.submit(digest.update, data)
            file.write(data)
            hashing.result()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a file of `write_tensors`: tensors on the CPU, each with memory of its own.

    Of its own, because torch.set_rng_state reads from the beginning of the storage, wherever in it the tensor is.
    Raises ValueError if the checksum differs or the file is not whole safetensors; no byte is interpreted before its
    checksum is right.
    """
    with open_regular(path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError("checksum differs")
    try:
        with _utf8_name(path) as name, safe_open(name, "pt") as opened:
            aliases = from_json((opened.metadata() or {}).get(_ALIASES, "{}"))
            # What the library gives may be a view of the mapped file.
            named = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as problem:
        raise ValueError(str(problem)) from problem
    if not isinstance(aliases, dict) or not all(
        isinstance(stored, str) and stored in named and name not in named for name, stored in aliases.items()
    ):
        raise ValueError("its list of shared tensors does not fit its tensors")
    return named | {name: named[stored] for name, stored in aliases.items()}


@contextlib.contextmanager
def _utf8_name(path: Path) -> Iterator[Path]:
    """The path; one that is not UTF-8, which the library cannot open, has another name inside the block."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "tensors"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def _unique(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor under its first name, and {other name: first name}."""
    kept: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named.items():
        key = None
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a layout without storage: refused later, by name
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key is None or tensor.numel() == 0 or key not in first:
            kept[name] = tensor
            first.setdefault(key, name)
        else:
            aliases[name] = first[key]
    return kept, aliases


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order; no copy if it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
