"""A tokenizer.json of somebody else is tried in a process of its own before it is loaded.

It can make the library abort or run for hours. A child process (foreign.child) loads it and encodes texts that are
known to be costly, with limits of time and memory; only what comes through is loaded here.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from kiem.errors import DataError

SECONDS = 8  # of processor time that loading and trying may take
LONGEST_WAIT = 60  # seconds, where the machine is busy
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from kiem.data.foreign import child; child(sys.argv[2])"


def try_out(file: Path) -> None:
    """Load a tokenizer.json in a child process and encode with it. Raises DataError when that fails."""
    stat = file.stat()
    if reason := _reason(file.resolve(), stat.st_size, stat.st_mtime_ns):
        raise DataError(f"tokenizer {file}: {reason}. Use another tokenizer, such as bpe or bytes.")


@lru_cache(maxsize=64)
def _reason(file: Path, size: int, mtime_ns: int) -> str | None:
    """Why a tokenizer cannot be used, if so; the arguments name the contents of the file."""
    if not sys.executable:
        return None  # embedded in another program: there is no interpreter to start
    source = str(Path(__file__).parents[2])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, source, str(file)], capture_output=True, timeout=LONGEST_WAIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"loading it and encoding a few texts took more than {LONGEST_WAIT} s"
    if done.returncode == 0:
        return None
    try:
        return str(json.loads(done.stdout)["error"]).removeprefix(f"tokenizer {file}: ")
    except (ValueError, KeyError, TypeError):
        pass
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode in (-9, -24, 137, 152):  # SIGKILL and SIGXCPU of the limits
        return f"loading it and encoding a few texts took more than {SECONDS} s of processor time"
    if any("panicked" in line or "memory" in line for line in done.stderr.decode(errors="replace").splitlines()):
        last = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()][:1]
    return f"the tokenizers library crashed on it ({(last or ['no message'])[0][:200]})"
