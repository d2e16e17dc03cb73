"""What is printed of a recorded program: the chapter's numbers, 80 columns, folding, and foreign names as text."""

import io
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from kiem.inspect.explain.chain import chain_rule
from kiem.inspect.record.recorder import Recorder
from kiem.inspect.show import chain as explanation
from kiem.inspect.show import summary as program_text
from kiem.inspect.show import terminal as words

PROGRAMS = Path(__file__).parents[1] / "programs"
NAMESPACES = []  # modules keep their names as long as they live


@pytest.fixture(autouse=True)
def _let_go():
    yield
    NAMESPACES.clear()
    torch.set_default_dtype(torch.float32)


def program(name):
    with Recorder() as recorder:
        NAMESPACES.append(runpy.run_path(str(PROGRAMS / name), run_name="__main__"))
    return recorder.graph


def text(show, *given, encoding="utf-8", width=80, **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    show(*given, console=Console(file=file, width=width, legacy_windows=False), **options)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def chain_to(graph, name, call=-1):
    return chain_rule(graph, graph.backwards[call], graph.find(name).index)


def one_line(shown):
    return " ".join(shown.split())


def test_the_chapter_reads_as_in_the_book():
    shown = text(explanation.print_chain, chain_to(program("chapter/gradients.py"), "w1"))
    flat = one_line(shown)
    assert "loss ← binary_cross_entropy ← sigmoid ← add ← mul ← w1" in flat
    assert "dL/dw1 = dL/da · da/dz · dz/dw1 = -1.0889 · 0.0750 · 1.1 = -0.0898" in flat
    assert "dL/dz = g · y · (1 − y) = −1.089 · 0.9183 · (1 − 0.9183)" in flat
    assert "gradients.py:11" in flat and "matches" in flat and "bound 1e-06" in flat
    assert max(map(cell_len, shown.splitlines())) <= 80


def test_matrices_are_written_with_their_shapes():
    flat = one_line(text(explanation.print_chain, chain_to(program("right/gpt2.py"), "model.h.0.attn.c_attn.weight")))
    assert "dL/dB = Aᵀ G (32×96) = (32×32)(32×96)" in flat


def test_a_long_chain_is_folded_by_module_unless_all_is_asked_for():
    chain = chain_to(program("right/gpt2.py"), "model.wte.weight")
    short, long = text(explanation.print_chain, chain), text(explanation.print_chain, chain, everything=True)
    assert "model.h.1 … 29 nodes" in short and "2 contributions" in short
    assert len(long.splitlines()) > 3 * len(short.splitlines())
    assert all(f"\n{i + 1}  {step.label}" in long for i, step in enumerate(chain.steps))
    folded = explanation.modules(chain)
    assert sum(m["last"] - m["first"] + 1 for m in folded) == len(chain.steps)
    assert all(later > i for i, m in enumerate(folded) for later in m["to"])


@pytest.mark.parametrize("name", ["chapter/gradients.py", "right/gpt2.py", "right/hooks.py", "right/inplace_views.py"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_everything_prints_in_80_columns(name, encoding):
    graph = program(name)
    shown = text(program_text.print_summary, graph, encoding=encoding)
    for everything in (False, True):
        shown += text(program_text.print_operations, graph, encoding=encoding, everything=everything)
        shown += text(program_text.print_tensors, graph, encoding=encoding, everything=everything)
    shown += text(program_text.print_backward, graph, graph.backwards[0], encoding=encoding)
    for leaf in graph.backwards[-1].leaf_grads:
        chain = chain_rule(graph, graph.backwards[-1], leaf)
        shown += text(explanation.print_chain, chain, encoding=encoding)
        json.dumps(explanation.document(chain), allow_nan=False)
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert f"{Path(name).name}:" in shown


def test_names_are_text_and_not_markup():
    with Recorder() as recorder:
        w = torch.ones(2, requires_grad=True)
        loss = (w * 2).sum()
        loss.backward()
    graph = recorder.graph
    graph.find("w").name = "[bold red]x[/] \x1b[31m"
    graph.find("loss").name = "[link=http://x]L[/link]"
    for show, given in [(explanation.print_chain, (chain_to(graph, "[bold red]x[/] \x1b[31m"),)),
                        (program_text.print_tensors, (graph,)), (program_text.print_operations, (graph,)),
                        (program_text.print_backward, (graph, graph.backwards[0])),
                        (program_text.print_summary, (graph,))]:  # fmt: skip
        shown = text(show, *given)
        assert "[bold red]x[/]" in shown and "\x1b" not in shown and r"\x1b[31m" in shown


def test_the_summary_counts():
    with Recorder() as recorder:
        w = torch.nn.Parameter(torch.ones(3, 4))
        x = torch.ones(2, 3)
        for _ in range(4):
            loss = (x @ w).exp().sum()
            loss.backward()
    numbers = program_text.totals(recorder.graph)
    assert numbers["leaf_elements"] == 12 and numbers["leaves"] == 1
    # In each pass x (6 numbers) for the product, and exp keeps its result (8 numbers).
    assert numbers["saved_bytes"] == 4 * (6 + 8)
    shown = text(program_text.print_summary, recorder.graph)
    assert "ran" in shown and re.search(
        r"loop body \(lines \d+ to \d+ of .*test_chain.py\) ran 4 times; first 2 shown", one_line(shown)
    )


def test_a_failure_is_shown_with_its_line():
    with pytest.raises(RuntimeError), Recorder() as recorder:
        torch.ones(2, 3) @ torch.ones(2, 3)
    shown = text(program_text.print_summary, recorder.graph)
    assert "RuntimeError" in shown and "test_chain.py:" in shown


@pytest.mark.parametrize("x, written", [(-1.08892, "-1.0889"), (0.0749918, "0.0750"), (1.10000002, "1.1"), (2.0, "2"),
                                        (float("nan"), "NaN"), (1e-9, "1.00e-09"), (0.0, "0")])  # fmt: skip
def test_numbers(x, written):
    assert words.number(x) == written


def test_two_paths_are_a_sum_of_products():
    with Recorder() as recorder:
        w = torch.tensor(2.0, requires_grad=True)
        loss = w * w - 3 * w
        loss.backward()
    lines = explanation.equations(chain_to(recorder.graph, "w"))
    assert sorted(lines[:3]) == ["dL/dw = -3", "dL/dw = 2", "dL/dw = 2"]
    assert lines[3].startswith("dL/dw over all paths = ") and lines[3].endswith(" = 1")
