"""What a user's text becomes, document by document, and what is said of text that cannot be used."""

import errno
import gzip
import io
import json
import os
import sys
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.run import Source
from kiem.data import formats, sources
from kiem.data.formats import PIECE, Problems, pieces
from kiem.data.sources import list_items, read_documents
from kiem.errors import DataError


def read(path, on_bad_text="skip", text_key="text", cache=None):
    """(documents as {origin: text}, problems as text)."""
    found, problems = {}, []
    source = Source(path=str(path), text_key=text_key)
    for document in read_documents(source, on_bad_text, problems.append, cache):
        found[document.origin] = found.get(document.origin, "") + document.text
    return found, [str(problem) for problem in problems]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_folder_is_read_in_order_without_hidden_and_binary_kinds(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", ".hidden", ".git/config", "pic.png", "x.pyc"):
        write(tmp_path / name, f"text of {name}\n")
    write(tmp_path / "empty.txt", "")
    found, problems = read(tmp_path)
    assert list(found) == [str(tmp_path / name) for name in ("a/y.py", "a/z.md", "b.txt")]
    assert found[str(tmp_path / "b.txt")] == "text of b.txt\n"
    assert problems == [f"{tmp_path}/pic.png: a .png file; passed over", f"{tmp_path}/x.pyc: a .pyc file; passed over"]


def test_globs_reach_below_and_a_circle_of_links_ends(tmp_path):
    write(tmp_path / "one.txt", "1")
    write(tmp_path / "deep/er/two.txt", "2")
    write(tmp_path / "deep/three.md", "3")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert sorted(read(tmp_path / "**" / "*.txt")[0].values()) == ["1", "2"]
    assert list(read(tmp_path / "*.txt")[0].values()) == ["1"]
    assert sorted(read(tmp_path)[0].values()) == ["1", "2", "3"]


def test_compressed_text_and_records(tmp_path):
    text, records = "one\ntwo é\n", '{"text": "r1"}\n\n{"text": "r2"}\n'
    write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))
    frames = zstandard.compress(b"one\n") + zstandard.compress("two é\n".encode())
    write(tmp_path / "b.txt.zst", frames)
    write(tmp_path / "c.jsonl", records)
    write(tmp_path / "d.jsonl.gz", gzip.compress(records.encode()))
    write(tmp_path / "e.jsonl.zst", zstandard.compress(records.encode()))
    found, problems = read(tmp_path)
    base = str(tmp_path)
    assert found == {f"{base}/a.txt.gz": text, f"{base}/b.txt.zst": text} | {
        f"{base}/{name}:{line}": f"r{number}"
        for name in ("c.jsonl", "d.jsonl.gz", "e.jsonl.zst")
        for number, line in ((1, 1), (2, 3))
    }
    assert problems == []


BAD_FILES = [
    # name, contents, what the problem says, text with "replace" (None: left out there too)
    ("bad.txt", "ünd\n".encode() + b"\xff\n", ", line 2: not UTF-8 (byte 0xff at offset 5)", "ünd\n�\n"),
    ("cut.txt", b"ab\n\xe2\x82", ", line 2: not UTF-8 (byte 0xe2 at offset 3)", "ab\n�"),
    ("nul.txt", b"a\nb\0c", ", line 2: binary file, not text (NUL byte at offset 3)", None),
    ("wide.txt", "text".encode("utf-16")[:-1], ": not valid UTF-16, which its first bytes declare", None),
    ("cut.txt.gz", gzip.compress(os.urandom(2000).hex().encode())[:-900], ": truncated gzip file", "some"),
    ("not.txt.gz", b"plain text", ": damaged gzip file", None),
    ("cut.txt.zst", zstandard.compress(os.urandom(2000).hex().encode())[:-900], ": truncated zstd file", None),
    ("not.txt.zst", b"plain text", ": damaged zstd file", None),
]


@pytest.mark.parametrize(("name", "data", "says", "replaced"), BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_bad_files_are_reported_and_handled_by_the_rule(tmp_path, name, data, says, replaced):
    write(tmp_path / "good.txt", "good")
    bad = str(write(tmp_path / name, data))
    found, problems = read(tmp_path)
    assert list(found.values()) == ["good"] and len(problems) == 1
    assert problems[0].startswith(bad + says) and problems[0].endswith("left out")
    found, problems = read(tmp_path, "replace")
    assert len(problems) == 1
    if replaced == "some":
        assert len(found[bad]) > 100
    else:
        assert found.get(bad) == replaced
    with pytest.raises(DataError, match=r"on_bad_text") as caught:
        read(tmp_path, "error")
    assert bad + says in str(caught.value)


BAD_RECORDS = [
    (b'{"text": "a"', "not a JSON record", None),
    (b'["a"]', "a JSON record must be an object, this is an array", None),
    (b'{"body": "a", "id": 1}', "no field 'text', it has 'body', 'id': set data.text_key=FIELD", None),
    (b'{"text": null}', "field 'text' is null, not text", None),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at byte 13 of the record)", "caf�"),
    (rb'{"text": "a\ud800"}', "a lone surrogate (U+D800) is not text", "a�"),
    (b"[" * 100_000, "not a JSON record (too deeply nested)", None),
    (b'{"text": ' + b"9" * 6000 + b"}", "field 'text' is a number, not text", None),
    (
        b'{"a": 1, "content": {"text": "a"}}',
        "no field 'text', it has 'a', 'content': set data.text_key=content.text",
        None,
    ),
    (b'{"text": {"body": "a"}}', "field 'text' is a group with 'body': set data.text_key=text.body", None),
    (
        b'{"messages": [{"role": "user"}]}',
        "no field 'text'; field 'messages' is a list of chat messages, which is data for",
        None,
    ),
    (b'{"text": [{"role": "user", "content": "hi"}]}', "field 'text' is a list of chat messages", None),
]


@pytest.mark.parametrize(("line", "says", "replaced"), BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_bad_records_name_their_line_and_leave_the_others(tmp_path, line, says, replaced):
    file = write(tmp_path / "a.jsonl", b'{"text": "first"}\n' + line + b'\n{"text": "last"}')
    found, problems = read(file)
    assert list(found) == [f"{file}:1", f"{file}:3"] and list(found.values()) == ["first", "last"]
    assert len(problems) == 1 and problems[0].startswith(f"{file}, line 2: {says}")
    assert read(file, "replace")[0].get(f"{file}:2") == replaced
    with pytest.raises(DataError, match="line 2"):
        read(file, "error")


ROWS = [{"text": f"record {i}", "meta": {"n": [i, {"deep": None}]}} for i in range(50)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("array.jsonl", json.dumps(ROWS)),
        ("pretty.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("wide.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16")),
    ],
)
def test_records_in_an_array_or_over_several_lines_are_records(tmp_path, name, content):
    found, problems = read(write(tmp_path / name, content))
    assert list(found.values()) == [row["text"] for row in ROWS] and problems == []


def test_json_that_holds_no_records_is_plain_text(tmp_path):
    text = json.dumps({"name": "a package", "version": [1, 2]}, indent=1)
    assert list(read(write(tmp_path / "package.json", text))[0].values()) == [text]
    assert read(write(tmp_path / "rows.json", '[{"body": "a"}]'))[1] == [
        f"{tmp_path}/rows.json, line 1: no field 'text', it has 'body': set data.text_key=FIELD; left out"
    ]


def test_a_field_in_a_group_is_reached_by_its_path(tmp_path):
    rows = [{"content": {"text": f"text {i}"}, "a.b": f"named {i}"} for i in range(3)]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read(file, text_key="content.text")[0].values()) == ["text 0", "text 1", "text 2"]
    assert list(read(file, text_key="a.b")[0].values()) == ["named 0", "named 1", "named 2"]
    assert "no field 'content.body'" in read(file, text_key="content.body")[1][0]


def test_a_group_in_a_table_is_reached_by_its_path(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"content": [{"text": "one"}, {"text": "two"}, None], "n": [1, 2, 3]})
    parquet.write_table(rows, tmp_path / "a.parquet")
    found, problems = read(tmp_path / "a.parquet", text_key="content.text")
    assert list(found.values()) == ["one", "two"] and "row" not in problems[0] and "is null, not text" in problems[0]
    parquet.write_table(pyarrow.table({"messages": [[{"role": "user"}]]}), tmp_path / "b.parquet")
    assert "column 'messages' is a list of chat messages" in read(tmp_path / "b.parquet")[1][0]


def test_a_record_without_end_is_left_out_in_bounded_memory(tmp_path, monkeypatch):
    """One record of 40 MB in a small file; the records around it stay."""
    monkeypatch.setattr(formats, "LONGEST_RECORD", 3 << 20)
    lines = b'{"text": "one"}\n{"text": "' + b"x" * (40 << 20) + b'"}\n{"text": "two"}\n'
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(lines, 1))
    tracemalloc.start()
    try:
        found, problems = read(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(found.values()) == ["one", "two"]
    assert problems == [f"{file}, line 2: a record of more than 3,145,728 bytes; left out"]
    assert peak < 20 << 20


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_read_by_their_mark(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1000)
    text = "".join(f"Zeile {i}: Straße, 東京\n" for i in range(400))
    data = ("\ufeff" + text).encode(encoding) if encoding.endswith("e") else text.encode(encoding)
    found, problems = read(write(tmp_path / "a.txt", data))
    assert list(found.values()) == [text]
    assert problems == [f"{tmp_path}/a.txt: its encoding is {encoding[:6]}; read as {encoding[:6]}"]


def test_western_text_is_read_and_said(tmp_path):
    pytest.importorskip("charset_normalizer")
    text = "Le café est très près de la gare, à côté de l’hôtel où naît l’été.\n" * 20
    file = write(tmp_path / "a.txt", text.encode("cp1252"))
    for rule in ("skip", "replace"):
        found, problems = read(file, rule)
        assert list(found.values()) == [text]
        assert problems == [f"{file}: its encoding is cp1252; read as cp1252"]
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        read(file, "error")


def test_no_kind_of_problem_crowds_out_another():
    problems = Problems()
    for i in range(500):
        problems(formats.Problem("many.jsonl", i, "no field", "left out", "no text"))
    problems(formats.Problem("a.png", None, "a .png file", "passed over", "not text"))
    problems = problems.merged(Problems())
    assert problems.count == 501 and problems.counts == {"no text": 500, "not text": 1}
    assert len(problems.first) == 21 and problems.first[-1]["origin"] == "a.png"
    assert problems.sentences() == [
        "500 records have no text (for example many.jsonl, line 0: no field): left out",
        "1 file is not text (a.png: a .png file): passed over",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipes_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "a.txt", "text")
    for path in (tmp_path, tmp_path / "*.txt"):
        found, problems = read(path)
        assert list(found.values()) == ["text"]
        assert problems == [f"{tmp_path}/pipe.txt: a named pipe (FIFO); passed over"]
    with pytest.raises(DataError, match=r"pipe\.txt: a named pipe \(FIFO\), which is not read"):
        read(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="/dev/null: a device"):
        read("/dev/null")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_files_of_the_operating_system_are_passed_over(tmp_path):
    write(tmp_path / "a.txt", "text")
    for name in ("proc", "sys", "dev"):
        (tmp_path / name).symlink_to(f"/{name}")
    found, problems = read(tmp_path)
    assert list(found.values()) == ["text"]
    assert problems == [
        f"{tmp_path}/{n}: a folder of the operating system; passed over" for n in ("dev", "proc", "sys")
    ]
    with pytest.raises(DataError, match="whole file system"):
        read("/")


def test_a_folder_whose_name_looks_like_a_pattern_is_found(tmp_path):
    write(tmp_path / "[D] x" / "a.txt", "one")
    write(tmp_path / "D x" / "a.txt", "two")
    assert list(read(tmp_path / "[D] x" / "*.txt")[0].values()) == ["one"]
    assert list(read(tmp_path / "[D] x" / "a.txt")[0].values()) == ["one"]
    with pytest.raises(DataError, match=r"\[ \] are special"):
        read(tmp_path / "[D] x" / "*.md")


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_a_name_that_is_not_utf8_is_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path / name, "text")
    assert list(read(tmp_path)[0].values()) == ["text"]
    assert list(read(tmp_path / name)[0].values()) == ["text"]
    with pytest.raises(ValueError, match="no file can have this name"):
        Source(path="caf\ud800")


def test_standard_input_that_cannot_be_read_or_was_interrupted(tmp_path, monkeypatch):
    (tmp_path / "stdin").mkdir()
    left_over = [tmp_path / "stdin" / name for name in ("tmpabc123", "tmp-4194999-x")]
    for path in left_over:
        path.write_text("half of it")
    ours = tmp_path / "stdin" / f"tmp-{os.getpid()}-x"
    ours.write_text("being written")

    class Folder(io.BytesIO):
        def read(self, size=-1):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Folder(), "utf-8"))
    with pytest.raises(DataError, match="standard input cannot be read: Is a directory"):
        read("-", cache=tmp_path)
    assert sorted((tmp_path / "stdin").iterdir()) == [ours]


def test_a_truncated_archive_of_records_keeps_those_before(tmp_path):
    lines = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(2000))
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:60_000])
    found, problems = read(file)
    assert 500 < len(found) < 2000
    where = f"{file}, line {len(found) + 1}"
    assert problems == [f"{where}: truncated gzip file; the records before it are kept, the rest is left out"]


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = pyarrow.array([b"fine", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken, "n": [1, 2]}), tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    assert read(file) == (
        {f"{file}:1": "fine"},
        [f"{file}, line 2: not UTF-8 (byte 0xe9 at byte 3 of 'text'); left out"],
    )
    assert read(file, "replace")[0][f"{file}:2"] == "caf�"
    assert read(file, text_key="body")[1] == [
        f"{file}: no column 'body', it has 'text', 'n': set data.text_key=COLUMN; left out"
    ]
    file.write_bytes(file.read_bytes()[:-20])
    assert "damaged Parquet file" in read(file)[1][0]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'kiem\[parquet\]'"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


def test_datasets_without_the_library_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'kiem\[hub\]'"):
        read("hf:somebody/something")


def test_a_local_data_set_and_its_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "plain")
    path = f"hf:{tmp_path}/dict"
    assert read(path)[0] == {f"{path}:1": "one", f"{path}:2": "two"}
    assert list(read(f"{path}:test")[0].values()) == ["two"]
    assert list(read(f"hf:{tmp_path}/plain")[0].values()) == ["one", "two"]
    digests = [list_items(Source(path=p))[0].digest for p in (path, f"{path}:test", path)]
    assert digests[0] == digests[2] != digests[1]
    with pytest.raises(DataError, match=r"no split 'dev', but \['test', 'train'\]"):
        read(f"{path}:dev")
    with pytest.raises(DataError, match=r"hf:NAME\[:CONFIG\]\[:SPLIT\]"):
        read("hf:a:b:c:d")


def test_standard_input_is_kept_by_its_contents(tmp_path, monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    pipe(b"piped text")
    for _ in range(2):  # it can be asked for again in the same process
        assert read("-", cache=tmp_path / "a")[0] == {"standard input": "piped text"}
    pipe(b"")
    with pytest.raises(DataError, match="standard input is empty"):
        read("-", cache=tmp_path / "b")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match="is a terminal"):
        read("-", cache=tmp_path / "c")


def test_the_standard_library(tmp_path):
    names = [item.name for item in list_items(Source(path="python"), tmp_path)]
    digests = [item.digest for item in list_items(Source(path="python"), tmp_path)]
    assert names == sorted(names) and len(set(digests)) == len(digests) > 300
    assert "python:json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name or "__pycache__" in name]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: write(p / "e.txt", ""), "the file is empty"),
        (lambda p: (p / "only").mkdir() or write(p / "only/.x", "hidden").parent, "has no text files"),
        (lambda p: p / "*.nothing", "no file matches"),
    ],
)
def test_where_there_is_nothing_to_read(tmp_path, make, says):
    with pytest.raises(DataError, match=says):
        read(make(tmp_path))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    file = write(tmp_path / "a.txt", "old text")
    documents = read_documents(Source(path=str(file)), "skip", print)
    next(documents)
    file.write_text("another text")
    with pytest.raises(DataError, match="changed while it was read"):
        list(documents)


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\0"])
def test_a_large_file_is_checked_before_any_of_it_is_used(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(formats, "BLOCK", 1000)
    monkeypatch.setattr(formats, "PIECE", 700)
    text = "".join(f"line {i} €\n" for i in range(2000))
    found, problems = read(write(tmp_path / "a.txt", text.encode() + tail))
    assert found == ({} if tail else {str(tmp_path / "a.txt"): text})
    if tail:
        offset = len(text.encode())
        assert f"line 2001: {'binary file' if tail == bytes(1) else 'not UTF-8'}" in problems[0]
        assert f"offset {offset}" in problems[0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert list(read(write(tmp_path / "a.txt", b"\xef\xbb\xbftext"))[0].values()) == ["text"]
    assert list(read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "r"}'))[0].values()) == ["r"]


@given(st.lists(st.text(alphabet="ab \n", max_size=40), max_size=8), st.integers(4, 30))
@settings(max_examples=60, deadline=None)
def test_pieces_join_to_the_text_wherever_the_blocks_end(blocks, size):
    text, before = "".join(blocks), formats.PIECE
    formats.PIECE = size
    try:
        streamed, whole = list(pieces(blocks, "x")), list(pieces([text], "x"))
    finally:
        formats.PIECE = before
    assert streamed == whole and "".join(piece.text for piece in whole) == text
    assert all(0 < len(piece.text) <= size for piece in whole)
    assert [piece.continues for piece in whole] == [False, *[True] * (len(whole) - 1)][: len(whole)]


def test_pieces_are_cut_after_newlines():
    text = ("x" * 99 + "\n") * (PIECE // 100 + 10)
    first, second = pieces([text], "x")
    assert first.text.endswith("\n") and len(first.text) == PIECE // 100 * 100 and second.continues


def test_digests_of_large_files_are_remembered_and_never_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "REMEMBER", 1)
    hashed = []
    real = sources._sha256
    monkeypatch.setattr(sources, "_sha256", lambda file: hashed.append(1) or real(file))
    file, cache = write(tmp_path / "big.txt", "one"), tmp_path / "cache"

    def digest():
        hashed.clear()
        return list_items(Source(path=str(file)), cache)[0].digest, len(hashed)

    first, _ = digest()
    assert digest() == (first, 1)  # changed a moment ago: not trusted yet
    monkeypatch.setattr(sources, "RACY", -1.0)
    assert digest() == (first, 1) and digest() == (first, 0)
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same modification time
    second, count = digest()
    assert second != first and count == 1
