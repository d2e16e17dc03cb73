"""The subcommands that look inside a program: explain and verify."""

from typing import Any

import click

from kiem.cli.console import StatusLine, print_json, print_rich, to_stderr


@click.command(context_settings={"show_default": True})
@click.argument("target")
@click.argument("arguments", nargs=-1)
@click.option(
    "--wrt",
    "leaves",
    multiple=True,
    metavar="NAME",
    help="Show the chain rule with respect to this tensor. Repeatable.",
)
@click.option("--call", type=int, default=-1, help="Number of the backward pass, from 1; -1 is the last.")
@click.option("--tensors", is_flag=True, help="List all tensors.")
@click.option("--operations", is_flag=True, help="List all operations.")
@click.option("--backward", is_flag=True, help="List the nodes of the backward pass in order.")
@click.option("--all", "whole", is_flag=True, help="Do not shorten long lists.")
@click.option("--eager", is_flag=True, help="Run torch.compile'd functions eagerly, to see inside them.")
@click.option(
    "--html",
    "page",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write an interactive page; it works offline.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def explain(target, arguments, leaves, call, tensors, operations, backward, whole, eager, page, as_json) -> None:
    """Show what a PyTorch program does: every operation, tensor and gradient.

    TARGET is a Python file, module:function, a model configuration, a preset, or a run folder (its model on its next
    batch). The program's own arguments follow TARGET; put `--` before its options.

    \b
    Examples:
      kiem explain train_step.py
      kiem explain train_step.py --wrt model.0.weight
      kiem explain train_step.py --html page.html -- --lr 0.1
      kiem explain gpt2-124m --html gpt2.html
      kiem explain runs/books --tensors
    """
    _check_folder(page)
    trace, _ = _recorded(target, arguments, verify=False, eager=eager, quiet=as_json)
    call, chains = _chains(trace, leaves, call)
    if page:
        trace.html(page)
    if as_json:
        from kiem.inspect.show.chain import document

        print_json({**trace.to_dict(), "chains": [document(chain) for chain in chains]})
    else:
        _print_trace(trace, chains, call, tensors, operations, backward, whole)
        if page:
            click.echo(f"page: {page}")
    _end(trace)


@click.command()
@click.argument("target")
@click.argument("arguments", nargs=-1)
@click.option("--eager", is_flag=True, help="Run torch.compile'd functions eagerly, to see inside them.")
@click.option(
    "--html", "page", type=click.Path(dir_okay=False), metavar="FILE", help="Write the interactive page, with verdicts."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress line and no program to reproduce an error.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
def verify(target, arguments, eager, page, quiet, as_json) -> None:
    """Check every gradient of a PyTorch program, on its own data, device and data types.

    The gradient of each operation is compared with a numeric derivative in float64 and with an independent rule, then
    the gradient of each parameter end to end. TARGET is that of `kiem explain`. For a model configuration, preset or
    run, its fast paths (fused, bfloat16, compiled, accumulated) are compared with a reference too.

    \b
    Exit codes:
      0  every gradient was checked and is right
      1  a gradient is wrong or not finite, or the program failed
      8  nothing wrong was found, but not everything could be checked

    \b
    Examples:
      kiem verify train_step.py
      kiem verify mypackage.model:one_step --json
      kiem verify gpt2-124m
      kiem verify runs/books
    """
    _check_folder(page)
    status = StatusLine(not quiet)
    trace, program = _recorded(target, arguments, verify=True, eager=eager, quiet=as_json, told=status)
    status.clear()
    verification = trace.verify()
    if page:
        trace.html(page, verification.result)
    examples = [] if quiet else verification.minimal_programs()
    compared = _compared(program, as_json or quiet) if trace.graph.failure is None else None
    if as_json:
        from kiem.model_checks.comparison_table import comparison_dict

        print_json({
            "target": trace.title, **verification.to_dict(), "minimal_programs": examples,
            "comparison": None if compared is None else comparison_dict(compared),
        })  # fmt: skip
    else:
        from kiem.inspect.show.verdicts import print_result
        from kiem.model_checks.comparison_table import ComparisonReport

        _on_stdout(lambda console: print_result(trace.graph, verification.result, console))
        for example in examples[:1]:
            click.echo(f"\nA program that reproduces it:\n\n{example}")
        if compared is not None:
            print_rich(ComparisonReport(compared))
        if page:
            click.echo(f"page: {page}")
    wrong = verification.ok is False or (compared is not None and not compared.ok)
    _end(trace, 1 if wrong else 8 if verification.ok is None else 0)


def _recorded(
    target: str, arguments: tuple[str, ...], verify: bool, eager: bool, quiet: bool, told: StatusLine | None = None
) -> tuple[Any, Any]:
    """Run the target under a recorder. What the program prints stays; its exceptions are kept in the trace."""
    import sys
    from contextlib import redirect_stdout, suppress

    from kiem.errors import KiemError
    from kiem.inspect.trace import Trace
    from kiem.model_checks.targets import load_program
    from kiem.runtime import keep_freed_memory

    keep_freed_memory()
    program = load_program(target, arguments)
    trace = Trace(verify, eager, program.library, program.title, told)
    try:
        stream = sys.stderr if quiet else sys.stdout
        with redirect_stdout(stream if told is None else told.beside(stream)), trace:
            program.run()
    except KiemError:
        raise
    except (Exception, SystemExit):
        if trace.graph.failure is None:
            raise
    with suppress(AttributeError):
        sys.stdout.flush()
    return trace, program


def _check_folder(page: str | None) -> None:
    """Before a program runs, which may take long."""
    from pathlib import Path

    from kiem.errors import ConfigError

    if page and not Path(page).resolve().parent.is_dir():
        raise ConfigError(f"--html {page}: the folder {Path(page).parent} does not exist: create it, or choose another")


def _chains(trace: Any, leaves: tuple[str, ...], call: int) -> tuple[int, list]:
    """The backward call to show and its chains: to `leaves`, or to all where they are few and small. What a program
    did not come to because it failed is no mistake of the user's: its failure is told instead."""
    from kiem.errors import ConfigError
    from kiem.inspect.explain.numbering import numbered, with_number

    index = -1 if call == -1 else with_number(trace.graph, call)
    try:
        if index is None:
            calls = sum(one.times for one in numbered(trace.graph))
            made = f"{calls} backward call{'s' if calls != 1 else ''}"
            raise ConfigError(f"--call {call}: the program made {made}, counted from 1; -1 is the last")
        return index, [trace.explain(name, index).chain for name in leaves] or trace.small_chains(index)
    except ConfigError:
        if trace.graph.failure is None:
            raise
        return -1, []


def _print_trace(
    trace: Any, chains: list, call: int, tensors: bool, operations: bool, backward: bool, whole: bool
) -> None:
    from kiem.inspect.show import chain as explanation
    from kiem.inspect.show import summary as program

    graph = trace.graph

    def show(console: Any) -> None:
        program.print_summary(graph, console)
        if operations:
            program.print_operations(graph, console, whole)
        if tensors:
            program.print_tensors(graph, console, whole)
        if backward and graph.backwards:
            program.print_backward(graph, graph.backwards[call], console, whole)
        for chain in chains:
            explanation.print_chain(chain, console, whole)
        if not chains and graph.backwards:
            program.print_hint(graph, graph.backwards[call], console)

    _on_stdout(show)


def _compared(program: Any, quiet: bool) -> Any:
    """A model's fast paths compared with the reference; None for other programs."""
    from kiem.model_checks.targets import ModelProgram

    if not isinstance(program, ModelProgram):
        return None
    from kiem.model_checks.compare import compare

    if not quiet:
        to_stderr("comparing the model's fast paths with the reference ...")
    return compare(program.model, program.namespace["batch"], program.documents_apart)


def _on_stdout(show: Any) -> None:
    from rich.console import Console

    show(Console())


def _end(trace: Any, code: int = 0) -> None:
    """Exit with a code: 1 for a program that failed, whatever the code."""
    failure = trace.graph.failure
    if failure is not None:
        where = f"{failure.source}: " if failure.source else ""
        click.echo(f"{where}{failure.kind}: {failure.message}", err=True)
        if failure.explanation:
            click.echo(failure.explanation, err=True)
    if failure is not None or code:
        raise click.exceptions.Exit(1 if failure is not None else code)
