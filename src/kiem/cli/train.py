"""The subcommands on the way to a model: plan, prepare, train."""

from pathlib import Path

import click

from kiem.cli.arguments import Count, is_override, output_options, parse_sources, split_target
from kiem.cli.console import print_json, print_rich, to_stderr

TOKENIZER = "bpe, bytes, chars, a tokenizer.json, or a folder with one or with vocab.json and merges.txt."


@click.command()
@click.argument("target", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--depth", type=int, help="Number of layers; width, batch size, learning rates and length follow from it."
)
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="PATH[=WEIGHT]",
    help="File, folder, glob, '-', 'python' or hf:NAME. Repeatable.",
)
@click.option("--tokens", type=Count(), help="Training length in tokens.")
@click.option("--minutes", type=float, help="Target wall-clock time, including evaluation and saving.")
@click.option("--tokenizer", help=TOKENIZER)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. Default: runs/NAME, from the data.")
@click.option("--fork", type=click.Path(path_type=Path), help="Start a new run in this folder from TARGET's weights.")
@click.option("--seed", type=int, help="Seed of weights, data order, dropout and samples.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@output_options
def train(target, overrides, quiet, as_json, **options) -> None:
    """Train a model. TARGET is a config file, a preset (gpt2-124m, ...), or a run folder, which is resumed.

    \b
    Examples:
      kiem train
      kiem train --data notes.txt --depth 4 --minutes 10
      kiem train --data web.jsonl.zst=3 --data books/=1 --tokens 50M
      kiem train GPT_CONFIG_124M.json --data corpus/ train.optimizer=adamw
      kiem train runs/books                           resume it
      kiem train runs/books tokens=100M               make it longer
      kiem train runs/books --fork runs/poems --data poems/ train.lr=1e-4
    """
    from kiem import api

    target, overrides = split_target(target, overrides)
    show = None if as_json or quiet else to_stderr
    options["data"] = parse_sources(options["data"])
    run = api.train(target, overrides=overrides, quiet=quiet, show=show, **options)
    if as_json:
        print_json({"run": str(run.folder), "report": run.report})
        return
    from kiem.format import shell_word
    from kiem.report.facts import overfitting
    from kiem.report.summary import render_terminal

    report, folder = run.report, shell_word(run.folder)
    print_rich(render_terminal(report))
    click.echo(f"report: {run.folder / 'report.html'}\nsample: kiem generate {folder}")
    if report.get("tokens") and not overfitting(report):
        click.echo(f"train longer: kiem train {folder} tokens={2 * report['tokens']}")


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]... [KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="Config file whose data section is used.")
@click.option("--tokenizer", help=TOKENIZER)
@output_options
def prepare(sources, config, tokenizer, quiet, as_json) -> None:
    """Turn text into tokens on disk. `kiem train` does this by itself; here it happens ahead of time.

    \b
    Examples:
      kiem prepare books/ --tokenizer bpe data.tokenizer_vocab_size=8192
      kiem prepare a.jsonl.gz=2 b.parquet=1
      cat big.txt | kiem prepare - --tokenizer bytes
    """
    from kiem import api

    overrides = [s for s in sources if is_override(s)]
    paths = [s for s in sources if s not in overrides]
    dataset = api.prepare(config, data=parse_sources(paths), tokenizer=tokenizer, overrides=overrides, quiet=quiet)
    report = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "vocab_size": dataset.tokenizer.vocab_size,
        **dataset.report,
    }
    if as_json:
        print_json(report)
        return
    from kiem.format import bytes_text, integer_text, plural, printable

    train, held_out = report["training"], report["validation"]
    click.echo(
        f"{plural(report['documents'], 'document')}, {bytes_text(report['bytes'])}, "
        f"{plural(report['tokens'], 'token')}, vocabulary of {integer_text(report['vocab_size'])}"
    )
    click.echo(
        f"training {plural(train['tokens'], 'token')}, held out {integer_text(held_out['tokens'])} ({held_out['rule']})"
    )
    for note in report["notes"]:
        click.echo(f"  {printable(note)}", err=True)
    click.echo(f"in {report['path']}")


@click.command()
@click.argument("target", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--depth", type=int, help="Number of layers of the default family.")
@click.option(
    "--data", "data", multiple=True, metavar="PATH[=WEIGHT]", help="Training text, prepared first. Repeatable."
)
@click.option("--minutes", type=float, help="Target wall-clock time; the length follows from it.")
@click.option("--no-measure", is_flag=True, help="Skip timing on this machine.")
@output_options
def plan(target, overrides, depth, data, minutes, no_measure, quiet, as_json) -> None:
    """Parameters, FLOPs, memory and time of a run before anything is built.

    \b
    Examples:
      kiem plan gpt2-124m
      kiem plan GPT_CONFIG_124M.json train.batch_tokens=16384
      kiem plan --data books/ --minutes 10
      kiem plan --depth 6 --no-measure --json
    """
    from kiem import api
    from kiem.planning.predict import render

    target, overrides = split_target(target, overrides)
    found = api.plan(
        target,
        data=parse_sources(data),
        depth=depth,
        minutes=minutes,
        overrides=overrides,
        measure=not no_measure,
        quiet=quiet or as_json,
    )
    print_json(found.to_dict()) if as_json else print_rich(render(found))
