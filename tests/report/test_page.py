"""report.html: one file, no network, nothing foreign becomes markup, readable without JavaScript."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from kiem.files import embedded_json
from kiem.report.summary import write

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\x1b[31m\u202e --> ]]> &amp; \"'"
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Elements, attributes, text by element; fails on an element that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture
def page_of(make_run):
    def make(dataset=None, **parts) -> str:
        folder = make_run(**parts)
        write(folder, dataset)
        return (folder / "report.html").read_text(encoding="utf-8")

    return make


def test_policy_forbids_the_network_and_allows_only_the_own_style_and_script(page_of, dataset):
    text = page_of(dataset)
    page = Page(text)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and set(rules) == {
        "default-src",
        "style-src",
        "script-src",
        "base-uri",
        "form-action",
    }
    for kind, pattern in (("style-src", r"<style>(.*?)</style>"), ("script-src", r"<script>(.*?)</script>")):
        own = re.findall(pattern, text, re.DOTALL)
        assert len(own) == 1
        assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()}'"
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe", text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "style", "href"} and not any(name.startswith("on") for name in names)


def test_foreign_text_stays_text(page_of, records, dataset):
    clean = Page(page_of(dataset, name="clean"))
    config = {**records.config, "data": {"sources": [{"path": "python", "text_key": HOSTILE}]}}
    dataset.report["problems"][0]["what"] = dataset.report["validation"]["rule"] = HOSTILE
    metrics = [*records.whole[:-1], records.mark("stop", 4, HOSTILE)]
    samples = [records.sample(1, HOSTILE, HOSTILE), *records.samples[1:]]
    text = page_of(dataset, metrics=metrics, samples=samples, config=config, name="x&lt;<i>")
    page = Page(text)
    assert page.count("img") == page.count("i") == 0
    assert page.count("script") == clean.count("script") == 2
    assert not set(text) & {"\u2028", "\x1b", "\u202e"}
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in "".join(page.text["pre"])
    assert r"\u2028\x1b[31m\u202e" in "".join(page.text["pre"])
    assert page.text["h1"] == ["x&lt;<i>"]


@pytest.mark.parametrize("text", [HOSTILE, "<!--", "<script", "\u2029", "]]>"])
def test_embedded_json_cannot_leave_its_element(text):
    made = embedded_json({"a": [text]})
    assert not re.search(r"[<>&\u2028\u2029]", made)
    assert json.loads(made) == {"a": [text]}


def test_charts_are_there_without_javascript(page_of):
    page = Page(page_of())
    plots = [a for tag, a in page.elements if tag == "svg" and "plot" in a.get("class", "")]
    assert [a["data-chart"] for a in plots] == ["loss", "rate", "gradient", "speed", "share"]
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert all(a["role"] == "img" and a["tabindex"] == "0" for a in plots)
    assert all(set(a["aria-labelledby"].split()) <= ids for a in plots)
    assert len(ids) == sum("id" in a for _, a in page.elements), "an id stands twice"
    descriptions = page.text["desc"]
    assert "training, each step: from 4 at step 1 to 1 at step 4, lowest 1, highest 4" in descriptions[0]
    assert "held-out: from 2.5 at step 2 to 2.75 at step 4" in descriptions[0]
    radios = [a for tag, a in page.elements if tag == "input"]
    assert [(a["id"], "checked" in a) for a in radios] == [
        ("x-tokens", True),
        ("x-time", False),
        ("scale-linear", True),
        ("scale-log", False),
    ]
    assert page.count("fieldset") == page.count("legend") == 2


def test_tables_have_headers(page_of, dataset):
    page = Page(page_of(dataset))
    assert page.count("table") == page.count("thead") >= 6
    heads = [a for tag, a in page.elements if tag == "th"]
    assert {a["scope"] for a in heads} == {"col", "row"}
    cells = "|".join(page.text["td"])
    assert "1.05 MiB|977 KiB|1.10" in cells  # planned and measured peak memory, and their ratio
    assert "1.650" in cells and "160" in cells


def test_the_problems_of_the_text_are_counted_by_kind(page_of, dataset):
    dataset.report |= {"n_problems": 4, "problem_counts": {"not UTF-8": 1, "no text": 3, "<unheard of>": 2}}
    text = page_of(dataset)
    kinds = ["3 records have no text", "1 document is not valid UTF-8"]
    assert "<ul>" + "".join(f"<li>{kind}</li>" for kind in kinds) + "</ul>" in text
    assert "4 problems in the text" in text


def test_chart_values_for_the_pointer(page_of):
    text = page_of()
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', text)[1])
    loss = data["loss"]["lines"]
    assert [line["name"] for line in loss] == [
        "training, each step",
        "training, smoothed over about 5 steps",
        "held-out",
    ]
    assert loss[0]["y"] == [4.0, 3.0, 2.0, 1.0] and loss[0]["time"] == [0.5, 1.5, 2.0, 2.5]
    assert loss[2] == {"name": "held-out", "step": [2, 4], "tokens": [200, 400], "time": [1.5, 2.5], "y": [2.5, 2.75]}
    assert data["loss"]["axes"]["tokens-linear"] == [0.0, 400.0] and data["loss"]["axes"]["time-log"] == [0.5, 2.5]


def test_a_run_without_anything_says_what_is_missing(page_of):
    text = page_of(metrics=[], samples=None, plan=None)
    Page(text)
    for said in (
        "No step has been logged yet",
        "No samples were generated",
        "has not been evaluated yet",
        "plan.json is missing",
    ):
        assert said in text


def test_one_step_and_a_first_evaluation_before_it(page_of, records):
    text = page_of(metrics=[records.evaluation(0, 5.0, 3.0), records.step(1, 4.0)])
    Page(text)
    assert not re.search(r"[\s\"]-?nan|inf[\s\"%]", re.sub(r"<s(cript|tyle).*?</s\1>", "", text, flags=re.DOTALL))
