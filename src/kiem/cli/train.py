"""The subcommands on the way to a model: plan, prepare, train."""

from pathlib import Path

import click

from kiem.cli.arguments import Count, is_override, output_options, parse_sources, split_target
from kiem.cli.console import print_json, print_rich, to_stderr


@click.command()
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
@output_options
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

    target, overrides = split_target(target, overrides)
    show = None if as_json or quiet else to_stderr
    run = api.train(
        target,
        data=parse_sources(data),
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


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]... [KEY=VALUE]...")
@click.option("--config", type=click.Path(path_type=Path), help="Take the data section of this file.")
@click.option("--tokenizer", help="bpe, bytes, chars, a tokenizer.json, or a folder with vocab.json and merges.txt.")
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


@click.command()
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
    from kiem.planning.predict import render

    target, overrides = split_target(target, overrides)
    found = api.plan(target, depth=depth, overrides=overrides, measure=not no_measure)
    print_json(found.to_dict()) if as_json else print_rich(render(found))
