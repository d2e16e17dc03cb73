"""Whether a manifest, or the note of a shard, is as Kiem writes it: somebody else may have made the file.

A form is a type, a list of one form, a mapping with named keys (each must be there), or EACH: a mapping of any names.
"""

import re
from typing import Any

EACH = "*"
FILE = {"bytes": int, "sha256": str}
SHARD = {"name": str, "tokens": int, "documents": int, "begun": int, "bytes": int, "files": {EACH: FILE}}
TOTAL = {"documents": int, "bytes": int, "tokens": int}
REPORT = {
    **TOTAL,
    "training": TOTAL,
    "validation": TOTAL,
    "sources": [{"path": str, "files": int, "documents": int, "bytes": int, "held_out": str}],
    "tokenizer": {"lossless": bool, "unknown_share": float},
    "notes": [str],
    "problems": [{"origin": str, "what": str, "action": str, "kind": str}],
    "n_problems": int,
    "problem_counts": {EACH: int},
}
MANIFEST = {
    "dtype": str,
    "tokenizer": str,
    "options": {EACH: object},
    "train": [[SHARD]],
    "validation": [SHARD],
    "report": REPORT,
}
NOTE = {"shards": [SHARD], "next": [int], "ended": bool}
ITEM_BYTES = {"<u2": 2, "<u4": 4}
_NAME = re.compile(r"(train|validation)-[0-9-]{1,19}", re.ASCII)


def is_manifest(body: Any) -> bool:
    """Whether it says all that is read from it, and the shards' files have the sizes of what is in them."""
    if not _has_form(body, MANIFEST) or body["dtype"] not in ITEM_BYTES:
        return False
    shards = [shard for source in [*body["train"], body["validation"]] for shard in source]
    return len(body["report"]["sources"]) >= len(body["train"]) and all(
        _is_shard(shard, ITEM_BYTES[body["dtype"]]) for shard in shards
    )


def is_note(note: Any) -> bool:
    """Whether a note says which shards are done and where the next ones begin."""
    return _has_form(note, NOTE) and len(note["shards"]) == 2 and len(note["next"]) == 2


def _is_shard(shard: dict[str, Any], item_bytes: int) -> bool:
    name, tokens = shard["name"], shard["tokens"]
    if not _NAME.fullmatch(name) or min(tokens, shard["documents"], shard["bytes"]) < 0:
        return False
    if not tokens:
        return True  # it has no files
    sizes = {f"{name}.bin": item_bytes * tokens, f"{name}.docs": 4 * shard["documents"], f"{name}.names.zst": None}
    optional = {f"{name}.sizes": 4 * tokens}
    files = shard["files"]
    return sizes.keys() <= files.keys() <= sizes.keys() | optional.keys() and all(
        size is None or files[file]["bytes"] == size for file, size in (sizes | optional).items() if file in files
    )


def _has_form(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(entry, form[0]) for entry in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if EACH in form:
            return all(_has_form(entry, form[EACH]) for entry in value.values())
        return all(key in value and _has_form(value[key], inner) for key, inner in form.items())
    if form is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if form is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, form)
