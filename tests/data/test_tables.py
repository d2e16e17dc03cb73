"""Tables with cells of any size: a giant one is left out and counted, in bounded memory."""

import subprocess
import sys

import pytest

from kiem.config.run import Source
from kiem.data import formats, tables
from kiem.data.pages import pages
from kiem.data.sources import read_documents

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MEASURED = """
import sys
from kiem.config.run import Source
from kiem.data import formats, tables
from kiem.data.sources import read_documents
from kiem.runtime import peak_memory
import pyarrow.parquet
formats.LONGEST_RECORD, tables.LARGEST_PAGE = 1 << 20, 16 << 20
list(read_documents(Source(path=sys.argv[1]), "skip", print))
before = peak_memory()
problems = []
found = list(read_documents(Source(path=sys.argv[2]), "skip", problems.append))
print(len(found), peak_memory() - before, *problems, sep="\\n")
"""


def read(path, **source):
    problems = []
    found = {
        d.origin.rpartition(":")[2]: d.text
        for d in read_documents(Source(path=str(path), **source), "skip", problems.append)
    }
    return found, problems


def write(path, texts, **options):
    parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), path, **options)
    return path


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(tables, "LARGEST_PAGE", 20_000)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_giant_cell_is_left_out_and_counted(tmp_path, small_limits, compression, version, dictionary):
    texts = [f"row {i}" for i in range(10)]
    texts[3] = "x" * 1001
    options = {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
    file = write(tmp_path / "a.parquet", texts, **options)
    found, problems = read(file)
    assert found == {str(i + 1): text for i, text in enumerate(texts) if i != 3}
    assert [str(problem) for problem in problems] == [f"{file}, line 4: a record of more than 1,000 bytes; left out"]
    assert problems[0].kind == "too long"


@pytest.mark.parametrize("compression", ["snappy", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_behind_a_page_that_is_too_large_are_left_out_and_the_others_read(
    tmp_path, small_limits, compression, dictionary
):
    texts = [f"row {i}" for i in range(30)]
    texts[13] = "x" * 30_000
    options = {"compression": compression, "use_dictionary": dictionary, "row_group_size": 10}
    file = write(tmp_path / "a.parquet", texts, **options)
    found, problems = read(file)
    assert found == {str(i + 1): text for i, text in enumerate(texts) if not 10 <= i < 20}
    assert [str(problem) for problem in problems] == [
        f"{file}, line 11: a part of 10 rows has a page of more than 20,000 bytes; these rows are left out"
    ]


def test_a_value_that_a_dictionary_repeats_is_never_there_often(tmp_path, small_limits, monkeypatch):
    """16 KB, 500 times: with all rows at once 8 MB."""
    sizes = []
    cells = tables._cells
    monkeypatch.setattr(tables, "_cells", lambda column, *rest: sizes.append(column.nbytes) or cells(column, *rest))
    _, problems = read(write(tmp_path / "a.parquet", ["x" * 16_000] * 500))
    assert len(problems) == 500 and max(sizes) <= 20_000


def test_a_field_of_a_group_and_lists(tmp_path, small_limits):
    rows = [{"body": "short", "tags": ["a", "b"]}, None, {"body": "x" * 1001, "tags": []}, {"body": None, "tags": None}]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": rows}), file)
    found, problems = read(file, text_key="text.body")
    assert found == {"1": "short"}
    assert [(p.line, p.kind) for p in problems] == [(2, "no text"), (3, "too long"), (4, "no text")]
    assert [p.kind for p in read(file, text_key="text.tags")[1]] == ["no text"] * 4


def test_memory_is_bounded(tmp_path):
    """A cell of 256 MiB in a file of some kilobytes, and one of 12 MiB, which is read and left out."""
    usual = write(tmp_path / "usual.parquet", ["text"] * 100)
    for size, rows in ((256 << 20, 0), (12 << 20, 1)):
        texts = pyarrow.array(["small", "x" * size], pyarrow.large_string())
        file = write(tmp_path / "giant.parquet", texts, compression="zstd", use_dictionary=False)
        assert file.stat().st_size < 100_000
        command = [sys.executable, "-c", MEASURED, str(usual), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        found, grown, *problems = done.stdout.splitlines()
        assert (int(found), len(problems)) == (rows, 1) and "more than" in problems[0]
        # A page of at most 16 MiB, as it is unpacked and as a column, and the packed file; the heap keeps some more.
        assert int(grown) < 3 * (16 << 20), grown


def test_the_pages_are_those_that_were_written(tmp_path):
    texts = [str(i) * 100 for i in range(5000)]
    options = {"use_dictionary": False, "data_page_size": 50_000, "write_statistics": False}
    chunk = parquet.ParquetFile(write(tmp_path / "a.parquet", texts, **options)).metadata.row_group(0).column(0)
    with open(tmp_path / "a.parquet", "rb") as opened:
        found = list(pages(opened, chunk))
    assert sum(page.values for page in found) == 5000 and len(found) > 1
    headers = chunk.total_uncompressed_size - sum(page.bytes for page in found)
    assert 0 < headers < 60 * len(found)  # a dozen numbers of at most 5 bytes each


@pytest.mark.parametrize("place", range(0, 60, 4))
def test_a_damaged_page_header_is_a_damaged_file(tmp_path, place):
    file = write(tmp_path / "a.parquet", [str(i) for i in range(100)], use_dictionary=False)
    data = bytearray(file.read_bytes())
    data[4 + place] ^= 0xFF
    file.write_bytes(data)
    _, problems = read(file)  # what is read may be damaged, which Parquet's checksums would say, if it had them
    assert all(problem.kind in ("damaged", "not UTF-8", "no text", "too long") for problem in problems)


def test_a_giant_row_of_a_data_set(tmp_path, small_limits, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i}" for i in range(40)]
    texts[7] = "x" * 1001
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.save_to_disk(tmp_path / "plain")
    rows.select([7, 1, 2]).save_to_disk(tmp_path / "some")
    found, problems = read(f"hf:{tmp_path}/plain")
    assert found == {str(i + 1): text for i, text in enumerate(texts) if i != 7}
    assert [(p.line, p.kind) for p in problems] == [(8, "too long")]
    found, problems = read(f"hf:{tmp_path}/some")
    assert found == {"2": "row 1", "3": "row 2"} and [p.line for p in problems] == [1]
