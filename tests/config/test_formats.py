"""Text of a configuration file to plain values: each format as it is written, nothing executed, no text too strange."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.formats import parse_count, parse_mapping, read_mapping
from kiem.errors import ConfigError


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(name, content) -> the message of the ConfigError."""
    monkeypatch.chdir(tmp_path)

    def read(name, content):
        path = tmp_path.relative_to(tmp_path) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError) as caught:
            read_mapping(path)
        return str(caught.value)

    return read


def test_text_in_strings_is_left_alone():
    text = r"""{"a": "x // no # comment /* at all */", 'b': "False, null", "c": "\u00e9\/\ud83d\ude00"}"""
    found = parse_mapping(text, "x")
    assert found == {"a": "x // no # comment /* at all */", "b": "False, null", "c": "é/\U0001f600"}


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1e6", 1e6), ("1.0e-05", 1e-5), (".5", 0.5), ("-2", -2), ("1_000", 1000), ("no", "no"),
    ("on", "on"),
    ("12:30", "12:30"), ("2020-01-01", "2020-01-01"), ("true", True), ("False", False), ("~", None), ("null", None),
    ("'3'", "3"), ("10M", "10M"), ("[1, a]", [1, "a"]),
])  # fmt: skip
def test_yaml_scalars_are_what_they_look_like(text, value):
    found = parse_mapping(f"key: {text}\n", "x.yaml", ".yaml")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.yaml", "seed: 1\ndepth: 2\nseed: 3\n", ["a.yaml:3", "seed", "twice"]),
    ("a.json", '{"seed": 1,\n "seed": 2}', ["a.json:2", "seed", "twice"]),
    ("a.toml", "seed = 1\nseed = 2\n", ["a.toml:2", "TOML"]),
    ("a.json", '{"seed": 1,\n\n "depth" 2}', ["a.json:3"]),
    ("a.yaml", "a:\n b: [1\n", ["a.yaml", "YAML"]),
    ("a.py", "c = {'seed': 2 **\n 9}", ["a.py:1", "2 ** 9", "numbers are computed"]),
    ("a.py", "c = {'seed': 1 / 0}", ["a.py:1", "zero"]),
    ("a.py", f"c = {{'seed': {'9' * 30} * {'9' * 30}}}", ["a.py:1", "numbers are computed"]),
    ("a.py", "c = {'seed': f(1)}", ["a.py:1", "f(1)", "not a value"]),
    ("a.py", "c = dict(**d)", ["a.py:1", "d", "**"]),
    ("a.py", "c = dict(d)", ["a.py:1", "dict(d)", "not a value"]),
    ("a.py", "def f():\n    pass", ["a.py:1", "would have to be executed"]),
    ("a.py", "class A:\n  def f(self): pass", ["a.py:2", "would have to be executed"]),
    ("a.py", "a = {'seed': 1}\nb = {'depth': 1}\n", ["a (line 1), b (line 2)", "keep the one"]),
    ("a.py", "n_layer = 6\nb = {'depth': 1}\n", ["b (line 2), n_layer", "keep the one"]),
    ("a.py", "a = {'seed': 1}\na.update(seed=2)\n", ["a.py:2", "a.update(seed=2)", "only read"]),
    ("a.py", "c = {'seed': f'{1}'}", ["a.py:1"]),
    ("a.py", "import os\nos.system('true')", ["a.py:2", "would have to be executed"]),
    ("a.yaml", "x: &x [*x]\n", ["a.yaml:1", "alias"]),
    ("a.yaml", "x: !!python/name:os.system\n", ["a.yaml:1"]),
    ("a.yaml", "# nothing\n", ["a.yaml", "only comments"]),
    ("a.json", "// nothing\n", ["a.json", "only comments"]),
    ("a.yaml", "just words\n", ["a.yaml", "just words"]),
    ("a.yaml", b"seed: 1\n# caf\xe9\n", ["a.yaml:2", "UTF-8"]),
    ("a.json", "[" * 5000, ["a.json"]),
    ("a.yaml", "[" * 5000, ["a.yaml", "deep"]),
    ("a.json", '{"seed": ' + "9" * 5000 + "}", ["a.json"]),
    ("a.yaml", "seed: " + "9" * 5000, ["a.yaml"]),
    ("a.yaml", "seed: 1\n" + "#" * 2**20, ["a.yaml", "256 KiB"]),
    ("a.yaml", '!!int "": 1', ["a.yaml"]),
    ("a.yaml", 'seed: !!int ""', ["a.yaml:1", "whole number"]),
    ("a.yaml", "seed: !!bool maybe", ["a.yaml:1", "true or false"]),
    ("a.yaml", "seed: !!float x", ["a.yaml:1", "number"]),
    ("a.yaml", "seed: !!null x", ["a.yaml:1", "null"]),
    ("a.yaml", "seed: !!timestamp abc", ["a.yaml:1", "timestamp"]),
    ("a.yaml", "seed: !!map [a]", ["a.yaml:1", "keys with values"]),
    ("a.yaml", "!!map [a]", ["a.yaml:1", "keys with values"]),
    ("a.yaml", "seed: !!seq {a: 1}", ["a.yaml:1"]),
    ("a.yaml", "seed: !!binary x", ["a.yaml:1", "binary"]),
    ("a.yaml", "<<: 3", ["a.yaml:1"]),
    ("a.yaml", "[" * 100_000, ["a.yaml", "deep"]),
    ("a.json", "[" * 100_000, ["a.json", "deep"]),
    ("a.toml", "a = " + "[" * 100_000, ["a.toml", "deep"]),
    ("a", "{" * 100_000, ["a", "deep"]),
    ("a.py", "a = " + "-" * 100_000 + "1", ["a.py"]),
    ("a.yaml", "- " * 50_000, ["a.yaml", "deep"]),
])  # fmt: skip
def test_a_file_that_cannot_be_read(refused, name, text, words):
    message = refused(name, text)
    assert all(word in message for word in words), message
    assert len(message) < 400


def test_a_yaml_bomb_is_refused_before_it_grows(refused):
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
    assert "aliases" in refused("bomb.yaml", text)


@given(st.text(alphabet=string.printable + "é\U0001f600\u2028\x00", max_size=80),
       st.sampled_from(["", ".json", ".yaml", ".toml", ".py"]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_the_reader(text, suffix):
    try:
        assert isinstance(parse_mapping(text, "x" + suffix, suffix), dict)
    except ConfigError as error:
        assert str(error).startswith("x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(min_size=1, max_size=8), VALUES, min_size=1, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_is_read_as_json(values, escaped):
    text = json.dumps(values, ensure_ascii=escaped)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse_mapping(text, "x.json", ".json") == json.loads(text)


@pytest.mark.parametrize(("text", "count"), [
    ("1e6", 10**6), ("10M", 10**7), ("2k", 2000), ("1_000_000", 10**6), ("2.5k", 2500), ("1B", 10**9),
    ("3T", 3 * 10**12),
    ("1.5e3", 1500), ("-4", -4), ("1.5", None), ("1e-3", None), ("ten", None), ("", None), ("1e999", None), ("k", None),
    ("1,000", None), ("0x10", None), ("nan", None), ("٣", None),
])  # fmt: skip
def test_counts(text, count):
    assert parse_count(text) == count
