"""Beside every valid option and tokenizer lie many wrong ones: each is taken, or refused in one error."""

import json
from contextlib import suppress

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiem.cli.arguments import is_override, parse_sources, split_target
from kiem.data.tokenizer import Tokenizer, bytes_tokenizer
from kiem.errors import ConfigError, DataError

PIECES = st.sampled_from(["=", "1", "-1", "nan", "inf", "1e999", "/", "..", "*", "[", "\x00", "\ud800", "é", "٣", " ",
                          "train.", "lr", "data/", "hf:", "-", "x" * 300])  # fmt: skip
GIVEN = st.lists(PIECES | st.text(max_size=5), max_size=6).map("".join)


@given(GIVEN, st.lists(GIVEN, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_argument(target, others):
    for text in (target, *others):
        assert is_override(text) in (True, False)
    first, overrides = split_target(target, tuple(others))
    assert [*([] if first is None else [first]), *overrides] == [target, *others]
    try:
        sources = parse_sources(others)
    except (ConfigError, click.ClickException) as error:
        assert "--data" in str(error)
    else:
        assert len(sources or []) == len(others)


ODD = [None, True, -1, 2**31, 2**64, 1.5, "", "x", [], {}, [[]], {"type": "Nothing"}, "\ud800"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_tokenizer(spec, tmp_path, data):
    changed = json.loads(json.dumps(spec))
    group = changed
    while isinstance(group, dict) and group:
        key = data.draw(st.sampled_from(sorted(group)))
        if not (isinstance(group[key], dict) and group[key] and data.draw(st.booleans())):
            group[key] = data.draw(st.sampled_from(ODD))
            break
        group = group[key]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed), encoding="utf-8")
    try:
        tokenizer = Tokenizer.load(file)
    except DataError as error:
        assert str(error).startswith("tokenizer ") and "tokenizer.json" in str(error)
    else:
        with suppress(DataError):  # it may be a tokenizer that has no token for this text
            assert isinstance(tokenizer.decode(tokenizer.encode("a b")), str)
