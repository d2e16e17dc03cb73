"""Where verbs print: results on standard output, what is only of interest on the way on standard error."""

import json
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_rich(renderable: Any) -> None:
    """A rich renderable on standard output."""
    from rich.console import Console

    Console().print(renderable)


def to_stderr(renderable: Any) -> None:
    """A rich renderable on standard error."""
    from rich.console import Console

    Console(stderr=True).print(renderable)
