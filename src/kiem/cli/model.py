"""The subcommands that use a trained model: eval, generate."""

import errno
import sys
from pathlib import Path

import click

from kiem.cli.arguments import output_options, parse_sources
from kiem.cli.console import print_json
from kiem.errors import ConfigError


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data", "data", multiple=True, metavar="PATH", help="Other text to evaluate on; default: the run's held-out text."
)
@click.option("--device", default="auto", show_default=True)
@output_options
def evaluate(run, data, device, quiet, as_json) -> None:
    """Loss, perplexity and bits per byte of a run's model on held-out text, or on all of --data.

    \b
    Examples:
      kiem eval runs/books
      kiem eval runs/books --data other.txt --json
    """
    from dataclasses import asdict

    from kiem import api
    from kiem.format import number_text, plural

    found = api.evaluate(run, data=parse_sources(data), device=device, quiet=quiet)
    if as_json:
        print_json(asdict(found))
    else:
        bits = found.bits_per_byte
        per_byte = "no bits per byte (lossy tokenizer)" if bits is None else f"{number_text(bits)} bits per byte"
        click.echo(
            f"loss {number_text(found.loss)} nats per token, perplexity {number_text(found.perplexity, 2)}, "
            f"{per_byte} "
            f"({plural(found.tokens, 'token')}, {plural(found.bytes, 'byte')})"
        )


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue; '-' reads standard input. Default: the start of a document.")
@click.option("--max-tokens", type=int, default=200, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 always takes the most likely token.")
@click.option("--top-k", type=int, help="Sample from the K most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens that together reach this probability.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--stop", multiple=True, help="Stop before this text. Repeatable.")
@click.option("--seed", type=int, help="Seed of the sampling; the same seed gives the same text.")
@click.option("--n", "n", type=int, default=1, show_default=True, help="Number of texts.")
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

    prompt = _standard_input() if prompt == "-" else prompt or ""
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


def _standard_input() -> str:
    """The prompt that is piped in. Raises ConfigError where there is none, or it is not text."""
    try:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "it is closed")
        return sys.stdin.read()
    except UnicodeDecodeError as problem:
        reason = f"it is not {problem.encoding.upper()} text (byte 0x{problem.object[problem.start]:02x})"
    except (OSError, ValueError) as problem:  # a folder, a closed stream
        reason = getattr(problem, "strerror", None) or str(problem)
    raise ConfigError(f"--prompt -: standard input cannot be read: {reason}: pipe a text into the command")


def _shown(text: str) -> str:
    """A model wrote it: on a terminal, control characters are shown as escapes."""
    from kiem.format import printable

    return printable(text) if sys.stdout.isatty() else text
