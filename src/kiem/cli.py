"""The command line: each verb reads its arguments, calls its function of api.py, and prints. Nothing heavy loads for
--help."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from kiem.cli_inspect import explain, verify
from kiem.console import print_json, print_rich, to_stderr
from kiem.errors import ConfigError, KiemError

EXIT_CODES = """
\b
Exit codes: 0 done, 1 a wrong gradient, a program that failed, or a bug of Kiem, 2 arguments or configuration,
            3 text or tokenizer, 4 checkpoint or run folder,
            5 a number that is not finite, 6 run folder in use, 7 disk, 130 stopped and saved.
"""


class Count(click.ParamType):
    """A number of tokens: 4096, 1_000_000, 1e6, 10M, 2k."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from kiem.config.formats import parse_count

        count = parse_count(str(value))
        if count is None:
            self.fail(f"{value!r} is not a number of tokens; write for example 500000, 1e6, 10M or 2k", param, ctx)
        return count


def _verb_options(function):
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")(function)
    return click.option("--quiet", "-q", is_flag=True, help="No progress.")(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="kiem", message="kiem %(version)s")
def cli() -> None:
    """Train language models on your text, and see what happens inside.

    \b
    Examples:
      kiem train --minutes 3                      the Python standard library, on this machine
      kiem train --data books/ --depth 6 --out runs/books
      kiem train runs/books                       go on after an interruption
      kiem generate runs/books --prompt "Once"
    """


@cli.command()
@click.argument("target", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--depth", type=int, help="Layers of the default family; sets width, batch, rates and length.")
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="PATH[=WEIGHT]",
    help="File, folder, glob, '-', 'python' or hf:NAME. Repeatable.",
)
@click.option("--tokens", type=Count(), help="Length of the run in tokens.")
@click.option("--minutes", type=float, help="Length of the run in minutes on this machine, all included.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/NAME.")
@click.option("--seed", type=int, help="Of weights, order, dropout and samples.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@_verb_options
def train(target, overrides, depth, data, tokens, minutes, out, seed, device, quiet, as_json) -> None:
    """Train a model. TARGET is a config file, a preset (gpt2-124m, ...), or the folder of a run, which is resumed.

    \b
    Examples:
      kiem train
      kiem train --data notes.txt --depth 4 --minutes 10
      kiem train --data web.jsonl.zst=3 --data books/=1 --tokens 50M
      kiem train GPT_CONFIG_124M.json --data corpus/ train.optimizer=adamw
      kiem train runs/books tokens=100M
    """
    from kiem import api

    target, overrides = _split(target, overrides)
    show = None if as_json or quiet else to_stderr
    run = api.train(
        target,
        data=_sources(data),
        out=out,
        depth=depth,
        tokens=tokens,
        minutes=minutes,
        seed=seed,
        device=device,
        overrides=overrides,
        quiet=quiet,
        show=show,
    )
    if as_json:
        print_json({"run": str(run.folder), "report": run.report})
    else:
        from kiem.report.summary import render_terminal

        print_rich(render_terminal(run.report))
        click.echo(f"report: {run.folder / 'report.html'}\nsample: kiem generate {run.folder}")


@cli.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]... [KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="Take the data section of this file.")
@click.option("--tokenizer", help="bpe, bytes, chars, a tokenizer.json, or a folder with vocab.json and merges.txt.")
@_verb_options
def prepare(sources, config, tokenizer, quiet, as_json) -> None:
    """Turn text into tokens on disk. `kiem train` does this by itself; here it happens ahead of time.

    \b
    Examples:
      kiem prepare books/ --tokenizer bpe data.tokenizer_vocab_size=8192
      kiem prepare a.jsonl.gz=2 b.parquet=1
      cat big.txt | kiem prepare - --tokenizer bytes
    """
    from kiem import api

    overrides = [s for s in sources if _is_override(s)]
    paths = [s for s in sources if s not in overrides]
    dataset = api.prepare(config, data=_sources(paths), tokenizer=tokenizer, overrides=overrides, quiet=quiet)
    report = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "vocab_size": dataset.tokenizer.vocab_size,
        **dataset.report,
    }
    if as_json:
        print_json(report)
        return
    from kiem.format import bytes_text, integer_text

    train, held_out = report["training"], report["validation"]
    click.echo(
        f"{integer_text(report['documents'])} documents, {bytes_text(report['bytes'])}, "
        f"{integer_text(report['tokens'])} tokens, "
        f"vocabulary of {integer_text(report['vocab_size'])}"
    )
    click.echo(
        f"training {integer_text(train['tokens'])} tokens, "
        f"held out {integer_text(held_out['tokens'])} ({held_out['rule']})"
    )
    for problem in report["problems"][:10]:
        line = "" if problem["line"] is None else f":{problem['line']}"
        click.echo(f"  {problem['origin']}{line}: {problem['what']} ({problem['action']})", err=True)
    if report["n_problems"] > 10:
        click.echo(f"  and {report['n_problems'] - 10} more (all with --json)", err=True)
    click.echo(f"in {report['path']}")


@cli.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data", "data", multiple=True, metavar="PATH", help="Other text to evaluate on; default: the run's held-out text."
)
@click.option("--device", default="auto", show_default=True)
@_verb_options
def evaluate(run, data, device, quiet, as_json) -> None:
    """Loss, perplexity and bits per byte of a run's model on held-out text, or on all of --data.

    \b
    Examples:
      kiem eval runs/books
      kiem eval runs/books --data other.txt --json
    """
    from dataclasses import asdict

    from kiem import api
    from kiem.format import integer_text, number_text

    found = api.evaluate(run, data=_sources(data), device=device, quiet=quiet)
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(
            f"loss {number_text(found.loss)} nats per token, perplexity {number_text(found.perplexity, 2)}, "
            f"{number_text(found.bits_per_byte)} bits per byte "
            f"({integer_text(found.tokens)} tokens, {integer_text(found.bytes)} bytes)"
        )


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue; '-' reads standard input. Default: the start of a document.")
@click.option("--max-tokens", type=int, default=200, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Only the K likeliest tokens.")
@click.option("--top-p", type=float, help="Only the likeliest tokens that make up this probability.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--stop", multiple=True, help="End before this text. Repeatable.")
@click.option("--seed", type=int, help="The same text each time.")
@click.option("--n", "n", type=int, default=1, show_default=True, help="How many texts.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def generate(
    run, prompt, max_tokens, temperature, top_k, top_p, repetition_penalty, stop, seed, n, device, as_json
) -> None:
    """Continue a prompt with a run's newest model.

    \b
    Examples:
      kiem generate runs/books --prompt "Once upon a time" --max-tokens 100
      kiem generate runs/demo --prompt "def main(" --temperature 0 --stop "\\n\\n"
      echo "import" | kiem generate runs/demo --prompt - --n 3 --seed 1 --json
    """
    from kiem import api

    prompt = sys.stdin.read() if prompt == "-" else prompt or ""
    model = api.load(run, device)
    request = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
               "repetition_penalty": repetition_penalty, "stop": list(stop), "seed": seed}  # fmt: skip
    if as_json or n != 1:
        texts = model.generate([prompt], n=n, **request)
        if as_json:
            print_json({"prompt": prompt, "texts": texts, "seed": seed})
        for number, text in enumerate([] if as_json else texts, 1):
            click.echo(f"--- {number}\n{_shown(prompt + text)}")
        return
    pieces = model.stream(prompt, **request)
    click.echo(_shown(prompt), nl=False)
    for piece in pieces:
        click.echo(_shown(piece), nl=False)
        sys.stdout.flush()
    click.echo()


@cli.command()
@click.argument("target", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--depth", type=int, help="Layers of the default family.")
@click.option("--no-measure", is_flag=True, help="Skip timing on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def plan(target, overrides, depth, no_measure, as_json) -> None:
    """Parameters, FLOPs, memory and time of a run before anything is built.

    \b
    Examples:
      kiem plan gpt2-124m
      kiem plan GPT_CONFIG_124M.json train.batch_tokens=16384
      kiem plan --depth 6 --no-measure --json
    """
    from kiem import api
    from kiem.plan.predict import render

    target, overrides = _split(target, overrides)
    found = api.plan(target, depth=depth, overrides=overrides, measure=not no_measure)
    print_json(found.to_dict()) if as_json else print_rich(render(found))


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


cli.add_command(explain)
cli.add_command(verify)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code. A KiemError is one message on standard error, never a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        code = cli.main(args=given, prog_name="kiem", standalone_mode=False)  # of an Exit that a verb raised
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as problem:
        hint = f" Try: {problem.ctx.command_path} --help" if getattr(problem, "ctx", None) else ""
        return _failed(ConfigError(problem.format_message() + hint), as_json)
    except KiemError as problem:
        return _failed(problem, as_json)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except SystemExit:  # so click tells that the reader of our output is gone
        return 0


def _failed(problem: KiemError, as_json: bool) -> int:
    kind = type(problem).__name__
    if as_json:
        print_json({"error": {"kind": kind, "message": str(problem), "exit_code": problem.exit_code}})
    from kiem.format import printable

    message = "\n".join(map(printable, str(problem).split("\n")))  # it may quote a file's name or its contents
    word = "stopped" if kind == "Stopped" else "error"
    click.echo(
        click.style(f"{word}:", fg="yellow" if kind == "Stopped" else "red", bold=True) + f" {message}", err=True
    )
    return problem.exit_code


def _split(target: str | None, overrides: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The first argument is the target, unless it is an override (key=value of a known key)."""
    if target is not None and "=" in target and not os.path.exists(target):
        return None, [target, *overrides]
    return target, list(overrides)


def _sources(entries: Any) -> list[str | dict[str, Any]] | None:
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


def _is_override(text: str) -> bool:
    """`key=value` of a known key, or of a section (then it is misspelt, which the configuration says)."""
    from kiem.config.keys import SECTIONS, schema

    key, sign, _ = text.partition("=")
    if not sign or os.path.exists(text):
        return False
    known = {name for path in schema() for name in (path, path.rpartition(".")[2])}
    section, dot, _ = key.partition(".")
    return key in known or bool(dot and section in SECTIONS and not os.path.exists(key))


def _shown(text: str) -> str:
    """A model wrote it: on a terminal, control characters are shown as escapes."""
    from kiem.format import printable

    return printable(text) if sys.stdout.isatty() else text


def script() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
