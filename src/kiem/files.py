"""Files on disk and JSON: one atomic write, one spelling of non-finite numbers."""

import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from kiem.errors import StorageError


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at once, so that a reader sees the old one or the new one. Raises StorageError."""
    name = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror or error}. The run itself is untouched"
        raise StorageError(what) from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def embedded_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element, open a comment or break a line of JavaScript."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy names a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
