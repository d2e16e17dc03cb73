"""One spelling, torch's: American. What users and readers of the code see; records are kept as they were written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = {".py", ".js", ".css", ".html", ".md"}
SOURCES = [f for f in sorted((ROOT / "src").rglob("*")) if f.suffix in KINDS and "vendor" not in f.parts]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md")), *SOURCES]
BRITISH = re.compile(
    r"""(initial|normal|optim|token|quant|util|organ|serial|summar|minim|maxim|general|special|synchron|factor|visual
        |random|vector|parametr|material|final|recogn|penal|equal|local|standard)is(e|es|ed|er|ers|ing|ation|ations)\b
        |colour|centre|behaviour|neighbour|favour|honour|(label|cancel|model|travel)l(ed|ing)\b|analys(e|ed|ing)\b
        |licence|artefact|catalogue|grey|programme\b|judgement|whilst|learnt""",
    re.IGNORECASE | re.VERBOSE,
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_spelling_is_american(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    found = [f"{number}: {word}" for number, line in lines for word in (m[0] for m in BRITISH.finditer(line))]
    assert not found
