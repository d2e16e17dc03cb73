"""What several subcommands read from the command line: counts, sources with weights, overrides."""

import os
from typing import Any

import click

from kiem.errors import ConfigError


class Count(click.ParamType):
    """A number of tokens: 4096, 1_000_000, 1e6, 10M, 2k."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from kiem.config.formats import parse_count

        count = parse_count(str(value))
        if count is None:
            self.fail(f"{value!r} is not a number of tokens; write for example 500000, 1e6, 10M or 2k", param, ctx)
        return count


def output_options(function: Any) -> Any:
    """--json and --quiet."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")(function)
    return click.option("--quiet", "-q", is_flag=True, help="No progress.")(function)


def parse_sources(entries: Any) -> list[str | dict[str, Any]] | None:
    """`PATH` or `PATH=WEIGHT`; the weight stands behind the last '=' if that is a number and no such file exists."""
    found: list[str | dict[str, Any]] = []
    for entry in entries:
        path, sign, weight = entry.rpartition("=")
        if not sign or os.path.exists(entry):
            found.append(entry)
            continue
        try:
            found.append({"path": path, "weight": float(weight)})
        except ValueError:
            raise ConfigError(
                f"--data {entry}: {weight!r} is not a weight: write PATH or PATH=WEIGHT, a number above 0"
            ) from None
    return found or None


def split_target(target: str | None, overrides: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The first argument is the target, unless it is an override (key=value of a known key)."""
    if target is not None and "=" in target and not os.path.exists(target):
        return None, [target, *overrides]
    return target, list(overrides)


def is_override(text: str) -> bool:
    """`key=value` of a known key, or of a section (then it is misspelt, which the configuration says)."""
    from kiem.config.keys import SECTIONS, schema

    key, sign, _ = text.partition("=")
    if not sign or os.path.exists(text):
        return False
    known = {name for path in schema() for name in (path, path.rpartition(".")[2])}
    section, dot, _ = key.partition(".")
    return key in known or bool(dot and section in SECTIONS and not os.path.exists(key))
