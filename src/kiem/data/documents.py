"""Web pages, notebooks, PDF and Word files become text, once: it is kept in the cache by the contents of the file.

A library reads them in a process of its own, with limits of time and memory, as such files come from anywhere.
Notebooks need no library; pages (selectolax), PDF (pypdf) and Word files (python-docx) need kiem[documents].
"""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from kiem.files import write_atomically

# The library that a kind of file needs, by its suffix.
LIBRARIES = {"html": "selectolax", "htm": "selectolax", "ipynb": None, "pdf": "pypdf", "docx": "docx"}
INSTALL = "pip install 'kiem[documents]'"
LONGEST_WAIT = 60  # seconds for one file
MEMORY = 4 << 30  # bytes of address space
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from kiem.data.documents import child; child()"


def needs(suffix: str) -> str | None:
    """The library that is missing for a kind of file; None if it can be read."""
    library = LIBRARIES[suffix]
    return None if library is None or find_spec(library) else library


def convert(files: list[tuple[Path, str]], folder: Path) -> Iterator[Path | str]:
    """For each file and the digest of its contents: the file of its text in `folder`, or why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = None
    try:
        for path, digest in files:
            target = folder / f"{digest[:32]}.txt"
            if target.is_file():
                yield target
                continue
            reader = reader if reader and reader.alive else _Reader()
            answer = reader.ask(path)
            text = answer.get("text")
            if text is None:
                yield str(answer["error"])
                continue
            write_atomically(target, text.encode("utf-8", "replace"))
            yield target
    finally:
        if reader:
            reader.close()


class _Reader:
    """The process that reads files, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: Path) -> dict[str, str | None]:
        """{"text": ...} or {"error": ...}."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=LONGEST_WAIT)
        except queue.Empty:
            self.close()
            return {"error": f"reading it took more than {LONGEST_WAIT} s"}
        except OSError:
            line = b""
        if not line:
            self.close()
            return {"error": "the library that reads it crashed, or it needs too much memory"}
        answer: dict[str, str | None] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(OSError):  # what was not written yet
                    stream.close()


def _forward(stream: IO[bytes], answers: "queue.Queue[bytes]") -> None:
    """Lines of the child, then an empty one."""
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # closed
        pass
    answers.put(b"")


# -- in the process of its own -----------------------------------------------------------------------------------------


def child() -> None:
    """Read the paths on standard input, and write the text of each as a line of JSON."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    for line in sys.stdin:
        path = Path(json.loads(line))
        try:
            text = text_of(path)
            answer = {"text": text} if text.strip() else {"error": "there is no text in it"}
        except Exception as error:  # the libraries raise whatever they meet
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def text_of(path: Path) -> str:
    """The text of a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".ipynb":
        return _notebook(path)
    if suffix == ".pdf":
        from pypdf import PdfReader

        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages)
    if suffix == ".docx":
        import docx

        return "".join(f"{paragraph.text}\n" for paragraph in docx.Document(str(path)).paragraphs)
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(path.read_bytes())
    page.strip_tags(["script", "style", "noscript", "template", "svg"], recursive=True)
    text = page.body.text(separator="\n", strip=True) if page.body else ""
    return f"{text}\n" if text else ""


def _notebook(path: Path) -> str:
    """The cells of a notebook, code and text, without what they printed."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook.get("cells") or [cell for sheet in notebook.get("worksheets", []) for cell in sheet["cells"]]
    sources = [cell.get("source", cell.get("input", "")) for cell in cells]
    return "".join(f"{source if isinstance(source, str) else ''.join(source)}\n\n" for source in sources)
