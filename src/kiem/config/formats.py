"""Text of a configuration file -> a mapping of plain values. Nothing in a file is ever executed.

JSON; JSON with comments; a pasted Python dict (`NAME = {...}`, True, None, trailing commas, single quotes); YAML; TOML.
"""

import ast
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from kiem.errors import ConfigError

MAX_BYTES = 2**20
MAX_NODES = 20_000
LITERAL_SUFFIXES = (".json", ".jsonc", ".json5", ".py")
YAML_SUFFIXES = (".yaml", ".yml")


def read_mapping(path: Path) -> tuple[dict[str, Any], str]:
    """The values of a configuration file and its text. Raises ConfigError (file, line, what is wrong)."""
    text = _read_text(path)
    return parse_mapping(text, str(path), path.suffix.lower()), text


def parse_mapping(text: str, name: str, suffix: str = "") -> dict[str, Any]:
    """Parse text in the format that the suffix says or, without a telling suffix, that the content shows."""
    if not text.strip():
        raise ConfigError(f"{name}: the file is empty: write a model or run configuration into it")
    if suffix in LITERAL_SUFFIXES:
        values = _parse_literal(text, name)
    elif suffix in YAML_SUFFIXES:
        values = _parse_yaml(text, name)
    elif suffix == ".toml":
        values = _parse_toml(text, name)
    else:
        values = _parse_by_content(text, name)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: the file holds {describe(values)}, not keys with values: write `key: value` lines")
    return values


def parse_value(text: str) -> Any:
    """A list or mapping written in one line (JSON, Python); any other text is itself."""
    if text.lstrip()[:1] in ("[", "{"):
        return _parse_literal(text, repr(text))
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
    return _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, a configuration file was expected")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB, which no configuration is: give a configuration file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not text (byte {error.start} is not UTF-8): give a text file") from None
    if "\0" in text:
        raise ConfigError(f"{path}: is a binary file, a configuration in text was expected")
    return text


def _parse_by_content(text: str, name: str) -> Any:
    bare = "".join(token for kind, token in _tokens(text) if kind != "comment").strip()
    if bare.startswith(("{", "[")) or _ASSIGNMENT.match(bare):
        return _parse_literal(text, name)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if lines and re.match(r"\[|[\w.\"'-]+\s*=", lines[0]):
        return _parse_toml(text, name)
    return _parse_yaml(text, name)


# JSON, JSON with comments, Python. One scan leaves strings alone, blanks comments and maps true, false and null: what
# is left is a Python literal in the same lines, and its syntax tree is read as data.

_TOKEN = re.compile(
    r"""(?P<string>'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<comment>//[^\n]*|\#[^\n]*|/\*.*?\*/)|(?P<word>[A-Za-z_]\w*)|(?P<other>[^"'/\#A-Za-z_]+|.)""",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(r"\s*(?:(?:const|let|var)\s+)?[A-Za-z_]\w*\s*(?::[^={}]*)?=\s*(?=[{(\[a-z])")
_WORDS = {"true": "True", "false": "False", "null": "None"}


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    for match in _TOKEN.finditer(text):
        yield match.lastgroup or "other", match[0]


def _parse_literal(text: str, name: str) -> Any:
    pieces = []
    for kind, token in _tokens(text):
        if kind == "comment":
            token = "\n" * token.count("\n") or " "
        elif kind == "word":
            token = _WORDS.get(token, token)
        elif kind == "string" and token[0] == '"':
            token = _json_string(token)
        pieces.append(token)
    clean = "".join(pieces)
    assignment = _ASSIGNMENT.match(clean)
    if assignment:
        clean = "\n" * assignment[0].count("\n") + clean[assignment.end() :]
    if not clean.strip():
        raise ConfigError(f"{name}: holds only comments: write a model or run configuration into it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(f"({clean.rstrip().rstrip(';')}\n)", mode="eval")
        return _literal(tree.body, name)
    except SyntaxError as error:
        line = min(error.lineno or 1, text.count("\n") + 1)
        raise ConfigError(f"{name}:{line}: is not valid JSON or a Python dict: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error).split(":")[0] if isinstance(error, ValueError) else "nested too deeply"
        raise ConfigError(f"{name}: is not valid JSON or a Python dict: {reason}") from None


def _json_string(token: str) -> str:
    """A JSON string as a Python literal; text that is not JSON stays, as it may be Python."""
    try:
        return repr(json.loads(token))
    except ValueError:
        return token


def _literal(node: ast.expr, name: str) -> Any:
    """The value of a literal's syntax tree; anything that would compute is refused."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.expr() as operand):
            value = _literal(operand, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value if isinstance(sign, ast.USub) else value
        case ast.Name(id="NaN" | "Infinity" as word):
            return float(word)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item, name) for item in items]
        case ast.Dict(keys=keys, values=values):
            return _literal_dict(keys, values, name)
    raise ConfigError(
        f"{name}:{node.lineno}: {ast.unparse(node)[:60]!r} is not a value: write numbers, text, true, "
        "false, null, lists and mappings; nothing is computed"
    )


def _literal_dict(keys: list[ast.expr | None], values: list[ast.expr], name: str) -> dict:
    found: dict[Any, Any] = {}
    for key, value in zip(keys, values, strict=True):
        if isinstance(key, ast.Name):
            word = key.id
        elif isinstance(key, ast.Constant) and isinstance(key.value, str):
            word = key.value
        else:
            raise ConfigError(f"{name}:{value.lineno}: a key must be text")
        if word in found:
            raise ConfigError(f"{name}:{key.lineno}: key '{word}' is given twice: keep one")
        found[word] = _literal(value, name)
    return found


def _parse_toml(text: str, name: str) -> Any:
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
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


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
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)


def _parse_yaml(text: str, name: str) -> Any:
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
                f"{name}:{node.start_mark.line + 1}: an alias (*) points to what it is part of: write the values out"
            )
        return known

    if size(root) > MAX_NODES:
        raise ConfigError(
            f"{name}: holds more than {MAX_NODES} values once its aliases (*) are written out: no "
            "configuration is that large; remove the aliases"
        )
