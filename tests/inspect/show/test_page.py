"""The page of `kiem explain --html` as text: one file, no network, nothing foreign becomes markup."""

import base64
import hashlib
import json
import re
import runpy
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from kiem.inspect.show.page import SCRIPTS, render

DOCUMENTS = runpy.run_path(str(Path(__file__).with_name("graph_documents.py")))
ASSETS = files("kiem.inspect.show").joinpath("assets")


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.title = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.elements.append(("", {}))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag in ("script", "style"):
            self.texts.append((attributes.get("type", tag), data))
        elif tag == "title":
            self.title += data


@pytest.fixture(scope="module")
def hostile() -> Page:
    return Page(render(DOCUMENTS["hostile"](), DOCUMENTS["HOSTILE"]))


def test_the_document_comes_back_whole():
    document = DOCUMENTS["sigmoid"]()
    data = dict(Page(render(document, "a title")).texts)["application/json"]
    assert json.loads(data) == document | {"title": "a title"}


def test_nothing_foreign_becomes_an_element(hostile):
    assert [tag for tag, _ in hostile.elements].count("script") == 3
    assert not any(tag == "img" for tag, _ in hostile.elements)
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert "<script>alert(1)</script>" in hostile.title


def test_the_json_cannot_leave_its_element(hostile):
    data = dict(hostile.texts)["application/json"]
    assert not re.search("[<>&\u2028\u2029]", data)
    document = json.loads(data)
    assert document["ops"][0]["module"] == "<script>alert(1)</script>"
    assert document["ops"][0]["source"]["text"] == DOCUMENTS["HOSTILE"]


def test_numbers_that_are_not_finite_are_named(hostile):
    document = json.loads(dict(hostile.texts)["application/json"])
    assert document["values"][0]["data"] == ["NaN", "Infinity"]
    assert document["values"][1]["data"] == [1.0, "-Infinity"]
    assert document["verdicts"]["0"]["verdict"] == "wrong"


def test_policy_allows_only_the_own_style_and_scripts(hostile):
    policy = next(a["content"] for tag, a in hostile.elements if a.get("http-equiv") == "Content-Security-Policy")
    digests = [
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in hostile.texts
        if kind in ("script", "style")
    ]
    assert len(digests) == 3
    assert policy == (
        f"default-src 'none'; style-src '{digests[0]}'; script-src '{digests[1]}' '{digests[2]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_no_address_is_loaded(hostile):
    assert not [a for tag, a in hostile.elements if tag in ("link", "iframe") or a.keys() & {"src", "href", "srcset"}]
    style = next(text for kind, text in hostile.texts if kind == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_every_control_has_a_name():
    page = Page(render(DOCUMENTS["sigmoid"](), "x"))
    ids = {a["id"] for _, a in page.elements if "id" in a}
    for _, attributes in page.elements:
        for name in ("aria-controls", "aria-labelledby", "for"):
            assert set(attributes.get(name, "").split()) <= ids


@pytest.mark.parametrize("name", [*SCRIPTS, "graph.css", "graph.html"])
def test_an_asset_has_under_400_lines_and_writes_no_markup(name):
    text = ASSETS.joinpath(name).read_text("utf-8")
    assert len(text.splitlines()) < 400
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    assert not re.search(r"fetch\(|XMLHttp|https?://(?!www\.w3\.org/2000/svg)", text)


def test_bundle_is_small_and_carries_its_licences():
    bundle = ASSETS.joinpath("vendor", "graph-vendor.js").read_text("utf-8")
    assert len(bundle) < 400_000
    assert "</script" not in bundle.lower()
    for line in ASSETS.joinpath("vendor", "LICENCES.txt").read_text("utf-8").splitlines():
        assert line in bundle
    assert bundle in render(DOCUMENTS["sigmoid"](), "x")
