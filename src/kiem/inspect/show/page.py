"""The page of `kiem explain --html`: a recorded graph to look at, one file that needs no network.

A Content-Security-Policy forbids every request, and every script and style but the page's own, which it names by their
hash. The document is JSON that cannot leave its element; the script shows its text only as text.
"""

from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from kiem.files import digest, embedded_json
from kiem.format import printable

SCRIPTS = (
    "graph-phases.js",
    "graph-model.js",
    "graph-layout.js",
    "graph-draw.js",
    "graph-panel.js",
    "graph-table.js",
    "graph-tree.js",
    "graph.js",
)


def render(document: dict[str, Any], title: str) -> str:
    """The whole page of a document (document.py); numbers that are not finite are shown as such."""
    style, body, vendor, script = _assets()
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; "
        f"script-src '{digest(vendor)}' '{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    data = embedded_json({**document, "title": title})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(printable(title))}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="document">{data}</script>\n'
        f"<script>{vendor}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


@cache
def _assets() -> tuple[str, str, str, str]:
    """Style, body, bundled libraries, and our scripts as one that defines no global."""
    folder = files("kiem.inspect.show").joinpath("assets")
    own = "\n".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    return (
        folder.joinpath("graph.css").read_text("utf-8"),
        folder.joinpath("graph.html").read_text("utf-8"),
        folder.joinpath("vendor", "graph-vendor.js").read_text("utf-8"),
        f'"use strict";\n(() => {{\n{own}}})();\n',
    )
