"""The command line: each subcommand reads its arguments, calls its function of api.py, and prints. Nothing heavy loads
for --help."""

import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import click

from kiem.cli.console import OutputError, ReaderGone, print_json, safe_streams, silence_output
from kiem.cli.inspect import explain, verify
from kiem.cli.model import evaluate, generate
from kiem.cli.train import plan, prepare, train
from kiem.errors import ConfigError, KiemError, KiemWarning
from kiem.format import printable, shortened

EXIT_CODES = """
\b
Exit codes: 0 done, 1 a wrong gradient, a failed program, or a bug in Kiem, 2 arguments or configuration,
            3 text or tokenizer, 4 checkpoint or run folder,
            5 a non-finite number, 6 run folder in use, 7 disk, 8 nothing wrong found, not everything checked,
            130 stopped and saved.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="kiem", message="kiem %(version)s")
def cli() -> None:
    """Train language models on your text, and see what happens inside.

    \b
    Examples:
      kiem train --minutes 3                      the Python standard library, on this machine
      kiem train --data books/ --depth 6 --out runs/books
      kiem train runs/books                       resume after an interruption
      kiem generate runs/books --prompt "Once"
    """


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell) -> None:
    """Print the script that completes kiem's commands in a shell.

    \b
    Examples:
      kiem completion bash >> ~/.bashrc
      kiem completion fish > ~/.config/fish/completions/kiem.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    click.echo(found(cli, {}, "kiem", "_KIEM_COMPLETE").source())


for _command in (plan, prepare, train, evaluate, generate, explain, verify):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code. A KiemError is one message on standard error, never a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = safe_streams()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", KiemWarning)
            warnings.showwarning = _warner(warnings.showwarning)
            code = _run(given, "--json" in given)
        sys.stdout.flush()
        return code
    except ReaderGone:
        return 0
    except OutputError as problem:
        return _failed(problem, as_json=False)
    finally:
        sys.stdout, sys.stderr = before


def _run(given: list[str], as_json: bool) -> int:
    try:
        code = cli.main(args=given, prog_name="kiem", standalone_mode=False)  # of an Exit that a subcommand raised
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as problem:
        context = getattr(problem, "ctx", None)
        hint = f" Try: {context.command_path} --help" if context else ""
        return _failed(ConfigError(problem.format_message() + hint), as_json)
    except OutputError:
        raise
    except KiemError as problem:
        return _failed(problem, as_json)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130


def _failed(problem: KiemError, as_json: bool) -> int:
    kind = "StorageError" if isinstance(problem, OutputError) else type(problem).__name__
    message = "\n".join(map(printable, shortened(str(problem)).split("\n")))  # it may quote a file
    word = "stopped" if kind == "Stopped" else "error"
    click.echo(
        click.style(f"{word}:", fg="yellow" if kind == "Stopped" else "red", bold=True) + f" {message}", err=True
    )
    if as_json:
        print_json({"error": {"kind": kind, "message": shortened(str(problem)), "exit_code": problem.exit_code}})
    return problem.exit_code


def _warner(usual: Any) -> Any:
    """How a warning is shown: Kiem's own are messages, also with --quiet; a program's are as Python shows them."""

    def show(message: Any, category: Any, *rest: Any) -> None:
        if issubclass(category, KiemWarning):
            click.echo(click.style("warning:", fg="yellow", bold=True) + f" {printable(str(message))}", err=True)
        else:
            usual(message, category, *rest)

    return show


def script() -> None:
    """Entry point of the installed command."""
    for number in (0, 1, 2):  # a file that is opened must not get the number of a closed standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    code = main()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        silence_output()
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.flush()
    sys.exit(code)
