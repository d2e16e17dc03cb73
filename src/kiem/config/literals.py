"""JSON and Python texts -> plain values, read as data: nothing in them is ever run.

JSON, JSON with comments, a pasted Python dict (`NAME = {...}`), `dict(...)` and `GPTConfig(...)` calls, the definition
of a dataclass, and a list of assignments (`n_layer = 6`). One scan leaves strings alone, blanks comments and maps true,
false and null: what is left is Python in the same lines, and its syntax tree is read. A number may be a product or sum
of numbers (`5 * 8`), and a name may stand for a value written above it.
"""

import ast
import json
import operator
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kiem.errors import ConfigError

MAX_DEPTH = 50

# A string or comment that is not closed goes on to the end, so that each character is looked at once.
_TOKEN = re.compile(
    r"""(?P<string>\'\'\'(?:\\.|[^\\])*?(?:\'\'\'|\\?\Z)|\"\"\"(?:\\.|[^\\])*?(?:\"\"\"|\\?\Z)"""
    r"""|"(?:\\.|[^"\\\n])*(?:"|(?=\n)|\\?\Z)|'(?:\\.|[^'\\\n])*(?:'|(?=\n)|\\?\Z))"""
    r"""|(?P<comment>//[^\n]*|\#[^\n]*|/\*.*?(?:\*/|\Z))|(?P<word>[A-Za-z_]\w*)|(?P<other>[^"'/\#A-Za-z_]+|.)""",
    re.DOTALL,
)
_JS_ASSIGNMENT = re.compile(r"\s*(?:(?:const|let|var)\s+)[A-Za-z_]\w*\s*(?::[^={}]*)?=\s*(?=[{(\[a-z])")
_WORDS = {"true": "True", "false": "False", "null": "None"}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Unread:
    """A value that only running the text would give; where its key matters, `problem` says so."""

    problem: str


@dataclass(frozen=True)
class Written:
    """A mapping as it is written. form: the class it is a call or definition of, "assignments", or "" for a dict."""

    values: Any
    form: str = ""


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """The strings, comments, words and other parts of a text, each as (kind, text)."""
    for match in _TOKEN.finditer(text):
        yield match.lastgroup or "other", match[0]


def bound_depth(text: str, name: str) -> None:
    """Refuse brackets nested deeper than any configuration is, before a parser meets them."""
    depth = 0
    for kind, token in tokens(text):
        if kind == "other":
            for character in token:
                depth += (character in "([{") - (character in ")]}")
                if depth > MAX_DEPTH:
                    raise ConfigError(f"{name}: is nested too deeply: no configuration has {MAX_DEPTH} levels")


def parse_literal(text: str, name: str) -> Written:
    """The values of a JSON or Python text. Raises ConfigError with the line of what is not a value."""
    bound_depth(text, name)
    clean = _as_python(text)
    if not clean.strip():
        raise ConfigError(f"{name}: holds only comments: write a model or run configuration into it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree: ast.AST = ast.parse(f"({clean.rstrip().rstrip(';')}\n)", mode="eval")
            except SyntaxError:
                if re.match(r"\s*[\[{]", clean):
                    raise
                tree = ast.parse(textwrap.dedent(clean), mode="exec")
        return _Reader(name).read(tree)
    except SyntaxError as error:
        line = min(error.lineno or 1, text.count("\n") + 1)
        raise ConfigError(f"{name}:{line}: is not valid JSON or Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error).split(":")[0] if isinstance(error, ValueError) else "nested too deeply"
        raise ConfigError(f"{name}: is not valid JSON or Python: {reason}") from None


def _as_python(text: str) -> str:
    pieces = []
    for kind, token in tokens(text):
        if kind == "comment":
            token = "\n" * token.count("\n") or " "
        elif kind == "word":
            token = _WORDS.get(token, token)
        elif kind == "string" and token[0] == '"':
            token = _json_string(token)
        pieces.append(token)
    clean = "".join(pieces)
    if assignment := _JS_ASSIGNMENT.match(clean):
        clean = "\n" * assignment[0].count("\n") + clean[assignment.end() :]
    return clean


def _json_string(token: str) -> str:
    """A JSON string as a Python literal; text that is not JSON stays, as it may be Python."""
    try:
        return repr(json.loads(token))
    except ValueError:
        return token


class _Reader:
    """Reads a syntax tree as data. `names`: what was assigned above."""

    def __init__(self, name: str):
        self.name = name
        self.names: dict[str, Any] = {}
        self.used: set[str] = set()

    def read(self, tree: ast.AST) -> Written:
        """The one configuration of a text: an expression, or the statements of a Python file."""
        if isinstance(tree, ast.Expression):
            return self._written(tree.body)
        found: list[tuple[str, int, Written]] = []
        for node in tree.body if isinstance(tree, ast.Module) else []:
            self._statement(node, found)
        plain = {key: value for key, value in self.names.items() if key not in self.used}
        if not found and self.names:
            return Written(self.names, "assignments")
        if len(found) == 1 and not plain:
            return found[0][2]
        places = [f"{what} (line {line})" for what, line, _ in found] + list(plain)
        raise ConfigError(
            f"{self.name}: holds {len(places)} values side by side, {', '.join(places[:5])}: keep the one that is the "
            "configuration, with its final values"
            if places
            else f"{self.name}: holds no configuration: write a dict, a call such as GPTConfig(...), or assignments"
        )

    def _statement(self, node: ast.stmt, found: list[tuple[str, int, Written]]) -> None:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
                return
            case ast.ClassDef():
                found.append((node.name, node.lineno, Written(self._fields(node), node.name)))
                return
            case ast.Expr(value=ast.expr() as value) if _is_whole(value):
                found.append(("a value", node.lineno, self._written(value)))
                return
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                pass
            case _:
                raise self._refused(
                    node, "would have to be executed, and a configuration is only read: keep just its values"
                )
        if _is_whole(value):
            found.append((target, node.lineno, self._written(value)))
            self.names.pop(target, None)
            return
        try:
            self.names[target] = self._value(value)
        except ConfigError as error:
            self.names[target] = Unread(str(error))

    def _written(self, node: ast.expr) -> Written:
        match node:
            case ast.Call(func=ast.Name(id=called), args=[], keywords=keywords) if _is_whole(node):
                return Written(self._keywords(keywords), "" if called == "dict" else called)
        return Written(self._value(node))

    def _fields(self, node: ast.ClassDef) -> dict[str, Any]:
        """The defaults of a dataclass."""
        fields: dict[str, Any] = {}
        for statement in node.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                    fields[target] = self._value(value)
                case ast.Assign(targets=[ast.Name(id=target)], value=value):
                    fields[target] = self._value(value)
                case ast.AnnAssign() | ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
                    continue
                case _:
                    raise self._refused(statement, "would have to be executed: keep just the fields and their values")
        return fields

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression; anything that would have to be run is refused."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.expr() as operand):
                value = self._value(operand)
                if _is_number(value):
                    return -value if isinstance(sign, ast.USub) else value
            case ast.Name(id="NaN" | "Infinity" as word):
                return float(word)
            case ast.Name(id=word) if word in self.names:
                self.used.add(word)
                if isinstance(value := self.names[word], Unread):
                    raise ConfigError(value.problem)
                return value
            case ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy" | "jnp"), attr=attribute):
                return attribute  # a data type
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return self._keywords(keywords)
            case ast.Dict(keys=keys, values=values):
                return self._dict(keys, values)
        raise self._refused(node, "is not a value: write numbers, text, true, false, null, lists and mappings")

    def _arithmetic(self, node: ast.BinOp) -> Any:
        left, right = self._value(node.left), self._value(node.right)
        apply = _ARITHMETIC.get(type(node.op))
        if apply is None or not all(_is_number(value) and abs(value) < 2**63 for value in (left, right)):
            raise self._refused(node, "is not a value: only +, -, * and / of numbers are computed")
        try:
            return apply(left, right)
        except ZeroDivisionError:
            raise self._refused(node, "divides by zero") from None

    def _keywords(self, keywords: list[ast.keyword]) -> dict[str, Any]:
        for keyword in keywords:
            if keyword.arg is None:
                raise self._refused(keyword.value, "is not a value: write its keys out instead of **")
        return {str(keyword.arg): self._value(keyword.value) for keyword in keywords}

    def _dict(self, keys: list[ast.expr | None], values: list[ast.expr]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in zip(keys, values, strict=True):
            if isinstance(key, ast.Name):
                word = key.id
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                word = key.value
            else:
                raise ConfigError(f"{self.name}:{value.lineno}: a key must be text")
            if word in found:
                raise ConfigError(f"{self.name}:{key.lineno}: key '{word[:60]}' is given twice: keep one")
            found[word] = self._value(value)
        return found

    def _refused(self, node: ast.stmt | ast.expr, reason: str) -> ConfigError:
        return ConfigError(f"{self.name}:{node.lineno}: {ast.unparse(node)[:60]!r} {reason}")


def _is_whole(node: ast.expr) -> bool:
    """Whether an expression writes a whole configuration: a dict, `dict(...)`, or a call such as `GPTConfig(...)`."""
    match node:
        case ast.Call(func=ast.Name(id=called), args=[]):
            return called == "dict" or called.endswith(("Config", "Args", "Arguments"))
    return isinstance(node, ast.Dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
