"""Text of a configuration file -> a mapping of plain values. Nothing in a file is ever executed.

JSON, JSON with comments and Python as people paste it (config/literals.py); YAML; TOML.
"""

import json
import re
import stat
import tomllib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from kiem.config.literals import MAX_DEPTH, Unread, Written, bound_depth, parse_literal, tokens
from kiem.errors import ConfigError
from kiem.files import open_regular

MAX_BYTES = 2**18
MAX_NODES = 20_000
LITERAL_SUFFIXES = (".json", ".jsonc", ".json5", ".py")
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Document:
    """A configuration as a file has it. form: see literals.Written."""

    values: dict[str, Any]
    text: str
    form: str = ""


def read_document(path: Path) -> Document:
    """The values of a configuration file. Raises ConfigError (file, line, what is wrong)."""
    text = _read_text(path)
    written = _parse(text, str(path), path.suffix.lower())
    return Document(written.values, text, written.form)


def read_mapping(path: Path) -> tuple[dict[str, Any], str]:
    """The values of a configuration file and its text. Raises ConfigError (file, line, what is wrong)."""
    document = read_document(path)
    return _all_read(document.values), document.text


def parse_mapping(text: str, name: str, suffix: str = "") -> dict[str, Any]:
    """The values of a text in the format that the suffix says or, without a telling suffix, that the content shows."""
    return _all_read(_parse(text, name, suffix).values)


def _all_read(values: dict[str, Any]) -> dict[str, Any]:
    for value in values.values():
        if isinstance(value, Unread):
            raise ConfigError(value.problem)
    return values


def _parse(text: str, name: str, suffix: str) -> Written:
    if not text.strip():
        raise ConfigError(f"{name}: the file is empty: write a model or run configuration into it")
    if suffix in LITERAL_SUFFIXES:
        written = parse_literal(text, name)
    elif suffix in YAML_SUFFIXES:
        written = Written(_parse_yaml(text, name))
    elif suffix == ".toml":
        written = Written(_parse_toml(text, name))
    else:
        written = _parse_by_content(text, name)
    if not isinstance(written.values, dict):
        raise ConfigError(
            f"{name}: the file holds {describe(written.values)}, not keys with values: write `key: value` lines"
        )
    return written


def parse_value(text: str) -> Any:
    """A list or mapping written in one line (JSON, Python); any other text is itself."""
    if text.lstrip()[:1] in ("[", "{"):
        return parse_literal(text, repr(_short(text))).values
    return text


def parse_count(text: str) -> int | None:
    """A whole number written as 1000000, 1_000_000, 1e6, 10M, 2.5k (k, M, B or G, T are powers of 1000), or None."""
    match = re.fullmatch(r"([+-]?\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)\s*([kmbgt]?)", text.strip(), re.ASCII | re.I)
    if not match:
        return None
    power = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}[match[2].lower()]
    number = Decimal(match[1].replace("_", ""))
    if number.adjusted() > 40:
        return None
    number = number.scaleb(power)
    return int(number) if number == number.to_integral_value() else None


def describe(value: Any) -> str:
    """A value as a message shows it: short, and with its type where that matters."""
    if isinstance(value, dict):
        return "a group of keys" if value else "an empty group"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        return f"text {_short(json.dumps(value, ensure_ascii=False))}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"a whole number of about {int(value.bit_length() * 0.30103)} digits"
    return _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{path}: is a folder: give a configuration file")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path}: is a pipe or device: give a configuration file")
        with open_regular(path) as file:  # a pipe would be waited for
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 256 KiB, too large for a configuration: give a configuration file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not text (byte {error.start} is not UTF-8): give a text file") from None
    if "\0" in text:
        raise ConfigError(f"{path}: is a binary file: give a text file")
    return text


# What a Python text begins with: an assignment of a dict, list or call, a call, a decorator, a class, an import.
_PYTHON = re.compile(
    r"(?:(?:const|let|var)\s+)?[A-Za-z_]\w*\s*(?::[^={}\n]*)?=\s*(?=[{(\[A-Za-z_])|[A-Za-z_]\w*\(|@|(?:class|import|from)\s"
)


def _parse_by_content(text: str, name: str) -> Written:
    bare = "".join(token for kind, token in tokens(text) if kind != "comment").strip()
    if bare.startswith(("{", "[")) or _PYTHON.match(bare):
        return parse_literal(text, name)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if lines and re.match(r"[A-Za-z_]\w*\s*=", lines[0]):
        try:
            return parse_literal(text, name)
        except ConfigError:
            return Written(_parse_toml(text, name))
    if lines and re.match(r"\[|[\w.\"'-]+\s*=", lines[0]):
        return Written(_parse_toml(text, name))
    return Written(_parse_yaml(text, name))


def _parse_toml(text: str, name: str) -> Any:
    bound_depth(text, name)
    if any(line.partition("=")[0].count(".") > MAX_DEPTH for line in text.splitlines()):
        raise ConfigError(f"{name}: is nested too deeply: no configuration has {MAX_DEPTH} levels")
    try:
        return _plain(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        line = re.search(r"\(at line (\d+), column \d+\)", str(error))
        message = str(error).split(" (at ")[0]
        raise ConfigError(f"{name}{':' + line[1] if line else ''}: is not valid TOML: {message}") from None


def _plain(value: Any) -> Any:
    """Dates, sets and bytes have no place in a configuration: the checks see them as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# YAML with the scalars of YAML 1.2's core schema: `3e-4` is a number, `no` and `12:30` are text.

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|None|)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = (
    ("bool", _BOOL, "tTfF"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", re.compile(r"^<<$"), "<"),
)


class Loader(yaml.SafeLoader):
    """Plain values only; a key given twice is an error."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own name and form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A dict with text keys, each once."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "keys with values were expected", node.start_mark)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is given twice: keep one", key.start_mark
                )
            seen[key.value] = key.start_mark.line
        return {str(key): value for key, value in super().construct_mapping(node, deep=True).items()}

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A float; one too large for the type is infinite, which the checks then refuse."""
        text = self._scalar(node, _FLOAT, "number").replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number."""
        return int(self._scalar(node, _INT, "whole number").replace("_", ""))

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        """true or false."""
        return self._scalar(node, _BOOL, "true or false").lower() == "true"

    def construct_yaml_null(self, node: yaml.ScalarNode) -> None:
        """null."""
        self._scalar(node, _NULL, "null")

    def _scalar(self, node: yaml.ScalarNode, form: re.Pattern[str], what: str) -> str:
        """The text of a scalar whose tag was written out (`!!int x`) or found: it has that form."""
        text = str(self.construct_scalar(node))
        if not form.match(text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{_short(repr(text))} is not a {what}, as its tag says", node.start_mark
            )
        return text


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back exactly: it quotes the texts that Loader would take for numbers."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out each time: a configuration has no anchors."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text with a line break of any kind is escaped: between single quotes a reader folds a break into a space."""
        breaks = any(mark in text for mark in "\n\r\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


Dumper.add_representer(str, Dumper.represent_text)
for _class in (Loader, Dumper):
    for _tag, _regexp, _first in _RESOLVERS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, list(_first))
# Plain values only: what other tags (!!timestamp, !!binary, !!set, !!python/...) stand for is no configuration.
Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
}
for _tag in ("float", "int", "bool", "null"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(Loader, f"construct_yaml_{_tag}"))


def _parse_yaml(text: str, name: str) -> Any:
    bound_depth(text, name)
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{name}: holds only comments: write a model or run configuration into it")
        _bound(node, name)
        return _plain(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0].split(":")[0]
        raise ConfigError(f"{name}: is not valid YAML: {reason}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _bound(root: yaml.Node, name: str) -> None:
    """Refuse a document that aliases blow up: its size with every alias written out, counted without writing it out."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = None
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            sizes[id(node)] = 1 + sum(
                size(part) for child in children for part in (child if isinstance(child, tuple) else (child,))
            )
        known = sizes[id(node)]
        if known is None:
            raise ConfigError(
                f"{name}:{node.start_mark.line + 1}: an alias (*) refers to a value that contains it: write the "
                "values out"
            )
        return known

    if size(root) > MAX_NODES:
        raise ConfigError(
            f"{name}: holds more than {MAX_NODES} values once its aliases (*) are written out: no "
            "configuration is that large; remove the aliases"
        )
