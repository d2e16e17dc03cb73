"""What the tests of data share, small corpora, and what became of them."""

from pathlib import Path

from kiem.config.run import DataConfig, Source


def config(*paths, **fields):
    sources = [path if isinstance(path, Source) else Source(path=str(path)) for path in paths]
    return DataConfig(**({"sources": sources, "tokenizer": "bytes"} | fields))


def folder_of(path, count, text=lambda i: f"document {i}\n" * (3 + i % 5)):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:04d}.txt").write_text(text(i))
    return path


def texts(dataset, split):
    """The documents of a split, checked to be laid out as the contract says."""
    eot = dataset.tokenizer.eot_id
    ids, starts = split.tokens(0, split.n_tokens).tolist(), split.document_starts(0, split.n_tokens).tolist()
    assert ids[-1] == eot and all(ids[start] == eot for start in starts) and starts[:1] == [0] * bool(starts)
    ends = [*starts[1:], len(ids) - 1]
    return [dataset.tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def contents(path):
    """Every file of a prepared folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}
