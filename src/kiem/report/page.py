"""report.html: one file that needs no network and reads well without JavaScript.

A Content-Security-Policy in the page forbids every request, and every script and style but the page's own two, which it
names by their hash. Text from the model, the data and the configuration is escaped; the charts' data is JSON
that cannot leave its element.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from kiem.data.formats import PROBLEMS
from kiem.files import digest, embedded_json
from kiem.format import (
    bytes_text,
    count_of,
    count_text,
    integer_text,
    is_number,
    number_text,
    percent_text,
    plural,
    printable,
    seconds_text,
)
from kiem.report.charts import charts_of
from kiem.report.facts import facts, headline, plan_rows
from kiem.report.read import Run
from kiem.report.svg import chart_data, render_chart

MOST_SAMPLE_CHARACTERS = 6000
MOST_PROBLEM_ROWS = 50


def render_page(report: dict[str, Any], run: Run) -> str:
    """The whole page. `report` is that of report/summary.py, `run` has the full curves."""
    charts = charts_of(run)
    style, script = (files("kiem.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    data = {chart.name: chart_data(chart) for chart, _ in charts}
    body = "".join(
        [
            _header(report),
            _tiles(report),
            _curves(charts),
            _compression(report),
            _plan(report),
            _samples(report),
            _evaluations(report),
            _data(report),
            _problems(report),
            _details(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(report['name'])} – Kiem</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n"
        f'<script type="application/json" id="chart-data">{embedded_json(data)}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    """Foreign text for the page."""
    return escape(printable(str(value)))


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n{''.join(parts)}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table whose first column names the row; the other columns are numbers, aligned right."""
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _header(report: dict[str, Any]) -> str:
    said = []
    if report["started_at"]:
        said.append(f"started {report['started_at']}")
    if report["ended_at"]:
        said.append(f"ended {report['ended_at']}")
    if report["starts"] > 1:
        said.append("resumed once" if report["starts"] == 2 else f"resumed {report['starts'] - 1} times")
    if report["reason"] and report["status"] != "finished":
        said.append(f"reason: {report['reason']}")
    return (
        f'<header><p class="status {report["status"]}">{report["status"]}</p><h1>{_text(report["name"])}</h1>\n'
        f'<p>{_text(headline(report))}</p>\n<p class="quiet">{_text(" · ".join(said))}</p></header>\n'
    )


def _tiles(report: dict[str, Any]) -> str:
    big = [
        ("bits per byte", number_text(report["bits_per_byte"], 3), "held-out text"),
        ("held-out loss", number_text(report["loss"], 3), "nats per token"),
        ("speed", integer_text(report["tokens_per_second"]), "tokens/s"),
        ("utilization", percent_text(report["matmul_share"]), "of peak matmul throughput"),
        ("training time", seconds_text(report["seconds"]), count_of(report["tokens"], "token")),
        ("peak memory", bytes_text(report["peak_memory_bytes"]), "of the process"),
    ]
    tiles = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(unit)}</small></dd></div>"
        for name, value, unit in big
    )
    return f'<dl class="tiles">{tiles}</dl>\n'


def _curves(charts: list) -> str:
    if not charts:
        return _section("Curves", "<p>No step has been logged yet.</p>")
    choose = "".join(
        f"<fieldset><legend>{legend}</legend>"
        + "".join(
            f'<label><input type="radio" name="{group}" id="{group}-{value}"{" checked" if value == values[0] else ""}>'
            f"{value}</label>"
            for value in values
        )
        + "</fieldset>"
        for legend, group, values in (("x-axis", "x", ("tokens", "time")), ("scale", "scale", ("linear", "log")))
    )
    drawn = "\n".join(render_chart(chart, said) for chart, said in charts)
    return (
        f'<section class="curves"><h2>Curves</h2><div class="choose">{choose}</div>\n'
        '<p class="quiet">Time is training time; evaluations and saves are not counted.</p>\n'
        f'<div class="charts">{drawn}</div>\n<p id="values" class="visually-hidden" aria-live="polite"></p>'
        '<div id="tip" hidden></div></section>\n'
    )


def _compression(report: dict[str, Any]) -> str:
    """The model beside the compressors, as a table with bars. A model that is no better shows it."""
    kept, rows = report["compression"], [("this model", report["bits_per_byte"])]
    if not kept["text_bytes"] or not is_number(report["bits_per_byte"]):
        return ""
    rows += [("xz -9", kept["xz_9_bits_per_byte"]), ("gzip -9", kept["gzip_9_bits_per_byte"])]
    most = max(value for _, value in rows) or 1.0
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{number_text(value, 3)}</td><td class="bar"><svg width="100%" height="12" '
        f'aria-hidden="true"><rect class="{"own" if name == "this model" else ""}" width="{100 * value / most:.1f}%" '
        'height="12" rx="2"/></svg></td></tr>\n'
        for name, value in rows
    )
    head = '<th scope="col">predictor</th><th scope="col">bits per byte</th><td class="bar"></td>'
    note = (
        f'<p class="quiet">Lower is better. The compressors packed {bytes_text(kept["text_bytes"])} of held-out text; '
        f"the last evaluation scored {bytes_text(report['eval_bytes'])}.</p>"
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return _section("Held-out text, bits per byte", table, note)


def _plan(report: dict[str, Any]) -> str:
    results = _table(("measure", "value"), facts(report))
    plan = _table(("", "planned", "measured", "planned / measured"), plan_rows(report["planned"]))
    return _section("Plan against measured", plan) + _section("Results", results)


def _samples(report: dict[str, Any]) -> str:
    if not report["samples"]:
        return _section("Samples", "<p>No samples were generated.</p>")
    rates = report["python_samples"]
    parts = []
    if rates:
        parts.append(
            _table(
                ("step", "accepted", "judged", "share"),
                [
                    (integer_text(r["step"]), r["accepted"], r["judged"], percent_text(r["accepted_share"]))
                    for r in rates
                ],
                "Samples that Python's own parser accepts as the beginning of a program",
            )
        )
    steps = sorted({s["step"] for s in report["samples"]})
    for step in steps:
        drawn = [s for s in report["samples"] if s["step"] == step]
        opened = " open" if step in (steps[0], steps[-1]) else ""
        title = f"step {integer_text(step)} <small>{count_of(drawn[0]['tokens'], 'token')}</small>"
        texts = "".join(_sample(s) for s in drawn)
        parts.append(f"<details{opened}><summary>{title}</summary>{texts}</details>\n")
    return _section("Samples over training", *parts)


def _sample(sample: dict[str, Any]) -> str:
    text = sample["text"]
    rest = len(text) - MOST_SAMPLE_CHARACTERS
    more = plural(rest, "more character")
    cut = f'\n<i class="quiet">… {more} in samples.jsonl</i>' if rest > 0 else ""
    prompt = f'<b class="prompt">{_text(sample["prompt"])}</b>' if sample["prompt"] else ""
    return f'<pre tabindex="0">{prompt}{_text(text[:MOST_SAMPLE_CHARACTERS])}{cut}</pre>'


def _evaluations(report: dict[str, Any]) -> str:
    rows = [
        (
            integer_text(e["step"]),
            count_text(e["tokens"]),
            number_text(e["loss"]),
            number_text(e["perplexity"], 2),
            number_text(e["bits_per_byte"]),
        )
        for e in report["evaluations"]
    ]
    if not rows:
        return _section("Evaluations", "<p>The held-out text has not been evaluated yet.</p>")
    table = _table(("step", "tokens", "loss (nats per token)", "perplexity", "bits per byte"), rows)
    return _section("Evaluations", f"<details><summary>{plural(len(rows), 'evaluation')}</summary>{table}</details>")


def _data(report: dict[str, Any]) -> str:
    """Amounts, sources and problems of the prepared text (data/prepare.py)."""
    data = report["data"]
    if not isinstance(data, dict) or not data:
        return _section("Data", "<p>The text's facts were not available when this report was written.</p>")
    validation = data.get("validation")
    parts = [
        _table(
            ("", "documents", "bytes", "tokens"),
            [
                _amounts(name, of)
                for name, of in (("training", data.get("training")), ("held out", validation), ("all", data))
                if isinstance(of, dict)
            ],
        )
    ]
    if isinstance(validation, dict) and validation.get("rule"):
        parts.append(f'<p class="quiet">Held out: {_text(validation["rule"])}.</p>')
    sources = [s for s in data.get("sources") or () if isinstance(s, dict)]
    if len(sources) > 1:
        parts.append(
            _table(
                ("source", "documents", "bytes", "tokens"),
                [_amounts(s.get("path"), {**s, **(s.get("training") or {})}) for s in sources],
            )
        )
    return _section("Data", *parts, _text_problems(data))


def _amounts(name: Any, of: dict[str, Any]) -> tuple[Any, ...]:
    return name, integer_text(of.get("documents")), bytes_text(of.get("bytes")), integer_text(of.get("tokens"))


def _text_problems(data: dict[str, Any]) -> str:
    problems = data.get("problems") or []
    if not problems:
        return '<p class="quiet">No problems in the text.</p>'
    count = data.get("n_problems", len(problems))
    counts = data.get("problem_counts")
    kinds = "".join(f"<li>{_text(text)}</li>" for text in _by_kind(counts if isinstance(counts, dict) else {}))
    rows = "".join(f"<li>{_text(_problem(p))}</li>" for p in problems[:MOST_PROBLEM_ROWS])
    rest = count - min(len(problems), MOST_PROBLEM_ROWS)
    more = f"<li>and {integer_text(rest)} more</li>" if rest > 0 else ""
    listed = f"<details><summary>{plural(count, 'problem')} in the text</summary><ul>{rows}{more}</ul></details>"
    return f"<ul>{kinds}</ul>{listed}" if kinds else listed


def _by_kind(counts: dict[str, Any]) -> list[str]:
    """How often each kind of problem was met, the most frequent first."""
    known = {kind: n for kind, n in counts.items() if kind in PROBLEMS and is_number(n)}
    return [plural(int(n), *PROBLEMS[kind]) for kind, n in sorted(known.items(), key=lambda item: -item[1])]


def _problem(problem: Any) -> str:
    if not isinstance(problem, dict):
        return str(problem)
    line = f", line {problem['line']}" if problem.get("line") else ""
    return f"{problem.get('origin', '')}{line}: {problem.get('what', '')} ({problem.get('action', '')})"


def _value(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return f"{bytes_text(value)} ({integer_text(value)} bytes)"
    if isinstance(value, int) and not isinstance(value, bool):
        return integer_text(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _problems(report: dict[str, Any]) -> str:
    notes = "".join(f"<li>{_text(p)}</li>" for p in report["problems"])
    return _section("Notes on this report", f"<ul>{notes}</ul>") if notes else ""


def _details(report: dict[str, Any]) -> str:
    config = yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True) if report["config"] else ""
    rows = [(name.replace("_", " "), _value(name, value)) for name, value in report["environment"].items()]
    environment = _table(("what", "value"), rows)
    pre = f'<pre tabindex="0">{_text(config)}</pre>'
    shown = f"<details><summary>config.yaml</summary>{pre}</details>" if config else ""
    written = f'<p class="quiet">Written {_text(report["written_at"])} by Kiem {_text(report["kiem_version"])}.</p>'
    changes = "".join(
        f"<li>{_text(change['key'])} was {_text(change['before'])} up to step {integer_text(change['step'])}, then "
        f"{_text(change['now'])} ({_text(change['time'])})</li>"
        for change in report["changes"]
    )
    shown += f"<p>Changed when the run was resumed:</p><ul>{changes}</ul>" if changes else ""
    configuration = _section("Configuration", shown or "<p>config.yaml is missing.</p>")
    return configuration + _section("Environment", environment, written)
