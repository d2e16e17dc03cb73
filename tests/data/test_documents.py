"""Web pages, notebooks, PDF and Word files are read as the text in them, and that is said."""

import json

import pytest

from kiem.config.run import Source
from kiem.data import documents
from kiem.data.sources import list_items, read_documents
from kiem.errors import DataError

PAGE = (
    "<html><head><style>p {color: red}</style></head><body><p>Hello</p><script>bad()</script><p>you</p></body></html>"
)


def read(path, cache):
    """(texts, problems as text)."""
    problems = []
    found = [document.text for document in read_documents(Source(path=str(path)), "skip", problems.append, cache)]
    return found, [str(problem) for problem in problems]


def notebook(*cells):
    return json.dumps({"cells": [{"cell_type": "code", "source": cell, "outputs": ["noise"]} for cell in cells]})


def test_a_notebook_is_its_cells(tmp_path):
    (tmp_path / "a.ipynb").write_text(notebook(["x = 1\n", "y = 2"], "# Title"))
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == ["x = 1\ny = 2\n\n# Title\n\n"]
    assert problems == [f"{tmp_path}/a.ipynb: a .ipynb file; the text of a notebook is read"]
    before = list_items(Source(path=str(tmp_path / "a.ipynb")), tmp_path / "cache")[0].digest
    (tmp_path / "a.ipynb").write_text(notebook("other"))
    assert read(tmp_path / "a.ipynb", tmp_path / "cache")[0] == ["other\n\n"]
    assert list_items(Source(path=str(tmp_path / "a.ipynb")), tmp_path / "cache")[0].digest != before


def test_what_cannot_be_converted_is_said_and_the_rest_is_read(tmp_path):
    for name, content in (("a.ipynb", "{"), ("b.ipynb", "[1]"), ("c.ipynb", notebook()), ("d.ipynb", notebook("good"))):
        (tmp_path / name).write_text(content)
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == ["good\n\n"] and len(problems) == 4
    assert all("cannot be converted to text" in problem and problem.endswith("left out") for problem in problems[:3])
    with pytest.raises(DataError, match="it holds no readable text"):
        read(tmp_path / "c.ipynb", tmp_path / "cache")


def test_a_file_that_takes_too_long_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_WAIT", 0.0)
    (tmp_path / "a.ipynb").write_text(notebook("text"))
    (tmp_path / "b.txt").write_text("text")
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == ["text"] and "took more than 0.0 s" in problems[0]


def test_without_the_library_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    for name in ("a.html", "b.pdf", "c.docx"):
        (tmp_path / name).write_text(PAGE)
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == [PAGE] and len(problems) == 3
    assert problems[0].endswith("reading a .html file needs pip install 'kiem[documents]'; read with its markup")
    assert problems[1].endswith("reading a .pdf file needs pip install 'kiem[documents]'; left out")
    with pytest.raises(DataError, match=r"kiem\[documents\]"):
        read(tmp_path / "b.pdf", tmp_path / "cache")


def test_pages_and_word_files(tmp_path):
    pytest.importorskip("selectolax")
    docx = pytest.importorskip("docx")
    (tmp_path / "a.html").write_text(PAGE)
    word = docx.Document()
    word.add_paragraph("A paragraph.")
    word.save(tmp_path / "b.docx")
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == ["Hello\nyou\n", "A paragraph.\n"] and len(problems) == 2


def test_pdf(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (tmp_path / "a.txt").write_text("text")
    texts, problems = read(tmp_path, tmp_path / "cache")
    assert texts == ["text"] and "there is no text in it" in problems[0] and len(problems) == 2
