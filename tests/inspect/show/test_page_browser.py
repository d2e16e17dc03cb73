"""The page of `kiem explain --html` in a real Chromium, opened from disk: what it shows, its keys, its speed."""

import re
import runpy
import shutil
import statistics
from pathlib import Path

import pytest

from kiem.inspect.show.page import render

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium found: apt-get install chromium", allow_module_level=True)

DOCUMENTS = runpy.run_path(str(Path(__file__).with_name("graph_documents.py")))
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
BOX = "#drawing .box"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(document, width=..., dark=...): fails at the end on a request, an error or a message in the console."""
    trouble, contexts = [], []

    def start(document, width=1280, height=800, **options):
        file = tmp_path / "page.html"
        file.write_text(render(document, document["title"]), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append("a dialog: " + dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or trouble.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_function("performance.getEntriesByName('kiem-ready').length")
        return page

    yield start
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="module")
def gpt():
    return DOCUMENTS["gpt"]()


def box(page, title):
    """The drawn box of exactly this title; `+ ` and `− ` tell folded and open."""
    return page.locator(BOX).filter(has=page.get_by_text(title, exact=True))


def panel(page) -> str:
    return " ".join(page.locator("#panel").inner_text().split())


def test_an_operation_shows_formula_values_line_and_kernels(open_page):
    page = open_page(DOCUMENTS["sigmoid"]())
    box(page, "sigmoid").click()
    text = panel(page)
    for part in (
        "y = 1 / (1 + exp(−x))",
        "∂L/∂x = g · y · (1 − y)",
        "program.py:3",
        "y = f(x)",
        "saved for backward 4 B",
        "x z self · float32[] 0",
        "aten.sigmoid_backward.default",
        "Backward step 3",
    ):
        assert part in text, part


def test_chain_rule_of_a_leaf_with_joins(open_page):
    page = open_page(DOCUMENTS["sigmoid"]())
    page.locator(BOX + ".leaf").filter(has_text="w = 0.5").click()
    text = panel(page)
    assert "From loss to w: 6 steps, 3 paths, branches merge at 2 places." in text
    assert [int(s.split()[0]) for s in page.locator(".chain > ol > li > div:first-child").all_inner_texts()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    joins = [" ".join(t.split()) for t in page.locator(".join").all_inner_texts()]
    assert joins == [
        "2 contributions add up from add step 1 float32[] 1 from mul step 2 float32[] 0.5 sum 1.5 "
        "arrived float32[] 1.5 "
        "relative difference of the sum 0",
        "2 contributions add up from mul step 2 float32[] 0.5 from mul step 5 float32[] 0.75 sum 1.25 "
        ".grad gets float32[] 1.25 "
        "relative difference of the sum 0",
    ]
    assert page.locator(BOX + ".away").filter(has_text="b =").count() == 1
    assert page.locator("path.edge.path").count() == 7


def test_a_sum_that_does_not_hold_is_shown(open_page):
    document = DOCUMENTS["sigmoid"]()
    document["backwards"][0]["steps"][6]["into"][0]["data"] = 1.0
    page = open_page(document)
    page.locator(BOX + ".leaf").filter(has_text="w = 0.5").click()
    assert "relative difference of the sum 2.0e-1" in panel(page)


def test_gradients_stand_on_the_edges_backward(open_page):
    page = open_page(DOCUMENTS["sigmoid"]())
    assert "z = 0" in page.locator("#drawing .label").all_text_contents()
    page.get_by_text("Backward", exact=True).click()
    labels = [t for t in page.locator("#drawing .label").all_text_contents() if t]
    assert sorted(labels) == sorted(
        ["‖g‖ 1", "‖g‖ 1", "‖g‖ 0.5", "‖g‖ 0.5", "‖g‖ 0.375", "‖g‖ 0.375", "‖g‖ 0.375", "‖g‖ 0.75"]
    )
    assert page.locator("path.edge[marker-start]").count() == 8
    assert page.locator("path.edge.none").count() == 1  # to x, which asks for no gradient


def test_the_deep_model_starts_folded_and_unfolds(open_page, gpt):
    page = open_page(gpt)
    assert page.locator(BOX).count() < 120
    assert box(page, "+ 47").count() == 1
    assert page.locator("#unfold").is_disabled()
    box(page, "+ 0").click()
    assert box(page, "+ attn").count() == 1
    assert box(page, "− 0").get_attribute("aria-expanded") == "true"
    assert "model.blocks.0 module · Block" in panel(page)
    box(page, "− 0").get_by_text("− 0").click()
    assert box(page, "+ attn").count() == 0


def test_a_small_graph_starts_unfolded_and_folds(open_page):
    page = open_page(DOCUMENTS["gpt"](layers=1))
    page.locator("#unfold").click()
    unfolded = page.locator(BOX).count()
    assert page.locator(BOX + ".folded").count() == 0
    page.locator("#fold").click()
    assert page.locator(BOX).count() < unfolded


def test_long_chains_are_folded_by_module(open_page, gpt):
    page = open_page(gpt)
    page.locator("#search").fill("blocks.1.norm1.weight")
    page.keyboard.press("Enter")
    # A block: 1 + 3 paths around and through the attention, 1 + 1 around and through the feed-forward.
    assert "about 2.09e+42 paths" in panel(page)
    assert page.locator(".told").get_attribute("title") == f"{3 * 2 * 8**46:,} paths"
    groups = page.locator(".chain .group")
    assert 40 < groups.count() < 60
    group = groups.filter(has_text="model.blocks.40 ")
    group.locator("summary").click()
    group.locator("ol > li").last.wait_for()
    assert group.locator(".formula").count() >= 34
    assert group.locator("ol > li").count() == int(group.locator("summary").inner_text().split()[1])


def test_arrow_keys_move_between_boxes_and_enter_unfolds(open_page, gpt):
    page = open_page(gpt)
    box(page, "+ 0").focus()

    def at():
        return page.evaluate("document.activeElement.getAttribute('aria-label')")

    page.keyboard.press("ArrowDown")
    assert at().startswith("module 1, Block")
    page.keyboard.press("Enter")
    assert at().startswith("module 1, Block")  # the focus stays on what was unfolded
    assert box(page, "− 1").count() == 1
    page.keyboard.press("ArrowDown")
    assert at().startswith("arrives: ")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert at().startswith("module attn, Attention")
    page.keyboard.press("Escape")
    assert at().startswith("module 1, Block")
    assert box(page, "+ 1").count() == 1
    outline = page.evaluate("getComputedStyle(document.activeElement.querySelector('.body')).strokeWidth")
    assert outline == "3px"


def test_the_outline_is_a_tree_for_the_keyboard(open_page, gpt):
    page = open_page(gpt)
    page.locator("[role=treeitem]").first.focus()
    page.keyboard.press("ArrowDown")
    row = page.locator("[role=treeitem]:focus")
    assert row.get_attribute("aria-expanded") == "false"
    assert row.get_attribute("aria-level") == "2"
    page.keyboard.press("ArrowRight")
    row = page.locator("[role=treeitem]:focus")
    assert row.get_attribute("aria-expanded") == "true"
    assert box(page, "− embed").count() == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("[role=treeitem][aria-selected=true]").inner_text().split()[0] == "embedding"
    assert "y = embedding(a, b)" in panel(page)
    assert page.locator("#status").inner_text() == "embedding chosen"
    page.keyboard.press("End")
    assert page.locator("[role=treeitem]:focus").get_attribute("aria-level") == "1"


def test_steps_go_through_forward_and_backward(open_page):
    page = open_page(DOCUMENTS["sigmoid"]())
    seen = []
    for _ in range(12):
        page.keyboard.press("ArrowRight")
        seen.append(page.locator("#step-text").inner_text())
        assert page.locator(BOX + ".current").count() == 1
    assert seen[0] == "1 of 12: mul program.py:1"
    assert seen[5] == "6 of 12: backward add"
    assert seen[11] == "12 of 12: backward w"
    assert page.locator("#drawing.backward").count() == 1
    assert "accumulates into w" in panel(page)
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert page.locator("#step-text").inner_text() == "0 of 12"
    assert page.locator("#drawing.backward").count() == 0


def test_a_step_inside_a_folded_box_lights_the_box(open_page, gpt):
    page = open_page(gpt)
    before = page.locator(BOX).count()
    page.locator("#step").fill("100")
    assert page.locator(BOX).count() == before
    assert page.locator(BOX + ".current").locator(".title").text_content() == "+ 2"
    assert gpt["ops"][99]["label"] in panel(page)


@pytest.mark.parametrize(
    "wanted, first",
    [
        ("blocks.3.attn", "model.blocks.3.attn"),
        ("masked_fill", "masked_fill"),
        ("program.py:3", "sigmoid"),
        ("loss", "loss"),
    ],
)
def test_search_finds_names_modules_operations_and_lines(open_page, gpt, wanted, first):
    page = open_page(DOCUMENTS["sigmoid"]() if "program" in wanted else gpt)
    page.keyboard.press("/")
    page.keyboard.type(wanted)
    assert page.locator("#found [role=option] b").first.inner_text() == first
    assert page.locator("#search").get_attribute("aria-activedescendant") == "found-0"
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text() == first
    assert page.locator("#found").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page, gpt, scheme):
    """WCAG's ratio of at least 4.5 of every text on the boxes, whatever the coloring, and of the quiet text."""
    page = open_page(gpt, color_scheme=scheme)
    lowest = {}
    for coloring in ("kind", "gradient"):
        page.locator("#color").select_option(coloring)
        lowest[coloring] = page.evaluate(CONTRAST)
    print(scheme, lowest)
    assert min(lowest.values()) >= 4.5


CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (color) => rgb(color).map(linear).reduce((s, x, i) => s + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const style = (element) => getComputedStyle(element);
  let lowest = ratio(style(document.querySelector("#panel .quiet, dt")).color, style(document.body).backgroundColor);
  for (const text of document.querySelectorAll("#drawing :is(.op, .folded, .leaf) text"))
    lowest = Math.min(lowest, ratio(style(text).fill, style(text.parentNode.querySelector(".body")).fill));
  return lowest;
}"""


def test_colors_follow_the_gradient_on_a_log_scale(open_page):
    page = open_page(DOCUMENTS["sigmoid"]())
    page.locator("#color").select_option("gradient")
    colors = {
        box: page.locator(BOX + ".op").nth(i).locator(".body").evaluate("e => e.style.fill")
        for i, box in enumerate(("mul", "add", "sigmoid", "mul 2", "add 2"))
    }
    assert colors["mul"] == colors["add"] == "rgb(0, 34, 78)"  # 0.375, the smallest
    assert colors["sigmoid"] == "rgb(254, 232, 56)"  # 1.5, the largest
    assert "‖g‖ 0.38" in page.locator("#legend").inner_text()


def test_verdicts_are_told_by_sign_too(open_page):
    document = DOCUMENTS["sigmoid"]()
    said = ["ok", "ok", "wrong", "kink", "unchecked"]
    document["verdicts"] = {i: {"verdict": name, "text": "bound 3 ulp"} for i, name in enumerate(said)}
    page = open_page(document)
    assert page.locator(BOX + " .mark").all_text_contents() == ["✓", "✓", "✗", "∧", "?"]
    box(page, "sigmoid").click()
    assert "wrong bound 3 ulp" in panel(page).lower()


def test_the_page_opens_on_the_forward_pass_of_one_step(open_page):
    """Setup, other steps and the optimizer are folded; the slider begins with the forward pass; what is found is told
    apart."""
    make = DOCUMENTS["Builder"]()
    weight = make.value("model.weight", (4,), parameter=True)
    for _ in range(5):
        make.op("uniform_", [], (4,), node="")
    for _ in range(2):
        x = weight
        for i in range(20):
            x = make.op("sin", [("self", x)], (4,), module=f"model.{i}", source=DOCUMENTS["source"](7))
        steps = [DOCUMENTS["step"](make.producer(x), "SinBackward0", [DOCUMENTS["gradient"](1.0)])]
        make.document["backwards"].append({"source": DOCUMENTS["source"](9), "roots": [x], "steps": steps,
                                           "nested": False, "after_op": len(make.document["ops"])})  # fmt: skip
        for _ in range(30):
            make.op("add_", [("self", weight)], (4,), region="optimizer", node="")
    page = open_page(make.document)
    titles = page.locator(BOX + " .title").all_text_contents()
    assert {"+ setup", "+ step 1", "− step 2", "− model", "+ optimizer"} <= set(titles)
    page.keyboard.press("ArrowRight")
    assert page.locator("#step-text").inner_text().startswith("1 of 102: sin program.py:7")
    page.locator("#search").fill("sin")
    found = page.locator("#found [role=option]").all_inner_texts()
    assert len(found) == len(set(found)) == 40 and "model.0" in found[0] and "[4]" in found[0]
    page.locator("#fit").click()
    assert page.evaluate("document.querySelector('#drawing').__zoom.k") >= 0.4


def test_the_page_and_the_verifier_have_the_same_kinds_of_verdicts():
    from kiem.inspect.show.verdicts import ORDER

    text = (Path(render.__code__.co_filename).parent / "assets" / "graph.js").read_text("utf-8")
    kinds = text[text.index("const VERDICTS") :].split("};")[0]
    assert tuple(re.findall(r"(\w+): \[\"#", kinds)) == ORDER


def test_the_table_of_tensors(open_page, gpt):
    page = open_page(gpt)
    page.locator("#tab-graph").focus()
    page.keyboard.press("ArrowRight")
    rows = page.locator("#tensors tbody tr")
    assert rows.count() == 200
    page.locator("#tensors thead").get_by_text("bytes", exact=True).click()
    page.locator("#tensors thead").get_by_text("bytes", exact=True).click()
    assert page.locator("#tensors [aria-sort=descending]").inner_text().startswith("bytes")
    assert "307 MiB" in rows.first.inner_text()
    page.locator("#filter").fill("blocks.7.attn vector")
    assert rows.count() == 4
    rows.first.get_by_role("button").click()
    assert page.locator("#panel h2").inner_text().startswith("model.blocks.7.attn.")
    assert page.locator(BOX + ".selected").count() == 1


def test_foreign_text_is_only_text(open_page):
    page = open_page(DOCUMENTS["hostile"]())
    page.locator(BOX + ".op").click()
    assert "<script>alert(1)</script>" in panel(page)
    assert "\\u2028" in panel(page)
    page.locator(BOX + ".leaf").click()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.locator("#search").fill("script")
    page.locator("#tab-tensors").click()
    assert "\\u202egnp.exe" in page.locator("#tensors").inner_text()
    page.locator("#tab-about").click()
    assert page.evaluate("document.images.length + document.scripts.length") == 3


def test_a_program_without_modules_is_grouped(open_page):
    make = DOCUMENTS["Builder"]()
    x = make.value("x")
    for i in range(1000):
        x = make.op("sin", [("self", x)], source=DOCUMENTS["source"](i, "x = x.sin()", f"part{i // 250}"))
    page = open_page(make.document)
    assert page.locator(BOX).count() < 120
    assert box(page, "+ part3()").count() == 1
    box(page, "+ part3()").click()
    assert box(page, "+ op 750 to op 779").count() == 1


def test_functions_regions_and_what_is_peculiar_are_told(open_page):
    page = open_page(DOCUMENTS["peculiar"]())
    assert "program.py:12" in page.locator("#failure").inner_text()
    assert page.locator(BOX + ".failed .title").all_text_contents() == ["linear"]
    told = page.locator(BOX + " .sub").all_text_contents()
    for text in ("program.py:4 · random", "program.py:5 · checkpoint · in place", "program.py:8 · in place · no_grad"):
        assert text in told
    assert box(page, "− Clamp").count() == 1  # the custom Function, unfolded
    assert box(page, "− optimizer").count() == 1
    box(page, "mul_").click()
    assert "0.1 -0.2 0.3" in panel(page)
    page.locator("#call").select_option(label="pass 1 program.py:20")
    page.locator(BOX + ".trained").first.click()
    assert "Chain rule in backward 1 From loss to w: 5 steps, 1 path, no branches merge." in panel(page)


def test_what_is_hidden_is_marked_on_the_box_that_holds_it(open_page, gpt):
    page = open_page(gpt)
    box(page, "+ 5").click()
    page.locator("#panel").get_by_text("model.blocks.5.attn.query.bias", exact=True).click()
    assert page.locator(BOX + ".selected .title").text_content() == "+ attn"
    assert page.locator(BOX + ".folded.away .title").filter(has_text="+ 4").count() == 1
    assert page.locator(BOX + ".folded.away .title").filter(has_text="+ 6").count() == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_graph_unfolds_and_steps(open_page, seed):
    document = DOCUMENTS["chance"](seed)
    page = open_page(document)
    page.locator("#unfold").click()
    assert page.locator(BOX + ".folded").count() == 0
    assert page.locator(BOX + ".op, " + BOX + ".frame").count() >= len(document["ops"])
    page.locator("#color").select_option("gradient")
    for leaf in page.locator(BOX + ".trained").all():
        leaf.dispatch_event("click")
    page.locator("#step").focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    page.locator("#fold").click()


def test_an_empty_document(open_page):
    page = open_page(DOCUMENTS["Builder"]().document)
    page.locator("#fit").click()
    page.locator("#tab-tensors").click()
    assert page.locator("#rows").inner_text() == "0 of 0 tensors"


def test_narrow_screen(open_page, gpt):
    page = open_page(gpt, width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator("#tree").is_hidden()
    page.locator("#outline-toggle").click()
    assert page.locator("#tree").is_visible()


OFF_CENTER = """() => {
  const room = document.querySelector("#drawing").getBoundingClientRect();
  const shapes = [...document.querySelectorAll("#drawing .box")].map((b) => b.getBoundingClientRect());
  const left = Math.min(...shapes.map((s) => s.left)), right = Math.max(...shapes.map((s) => s.right));
  return Math.abs((left + right) / 2 - (room.left + room.right) / 2);
}"""


def test_the_drawing_follows_its_room_until_somebody_moves_it(open_page):
    """A frame in a notebook gets its size after the page has run."""
    page = open_page(DOCUMENTS["sigmoid"](), width=640, height=400)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.wait_for_function(f"({OFF_CENTER})() < 20")
    page.locator("#in").click()
    moved = page.locator("#drawing > g").get_attribute("transform")
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_timeout(200)
    assert page.locator("#drawing > g").get_attribute("transform") == moved


def test_theme_and_motion(open_page):
    page = open_page(DOCUMENTS["sigmoid"](), color_scheme="light", reduced_motion="reduce")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(252, 252, 250)"
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.evaluate(paper) == "rgb(21, 23, 26)"
    assert page.locator(BOX + " .body").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


UNFOLD = """(title) => {
  const boxes = [...document.querySelectorAll("#drawing .box.folded")];
  const box = boxes.find((b) => b.querySelector(".title").textContent === title);
  const start = performance.now();
  box.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  document.querySelector("#drawing .box").getBBox();
  return performance.now() - start;
}"""


@pytest.mark.slow
def test_a_48_layer_gpt_opens_within_2_s_and_unfolds_within_100_ms(open_page, gpt):
    page = open_page(gpt)
    ready = page.evaluate("performance.getEntriesByName('kiem-ready')[0].startTime")
    page.wait_for_timeout(500)
    unfolded = [page.evaluate(UNFOLD, f"+ {i}") for i in range(5)]
    steps = sum(len(b["steps"]) for b in gpt["backwards"])
    print(
        f"\n{len(gpt['ops'])} operations, {len(gpt['values'])} tensors, {steps} backward steps: "
        f"ready after {ready:.0f} ms, unfolding {min(unfolded):.0f} to {max(unfolded):.0f} ms, "
        f"median {statistics.median(unfolded):.0f} ms"
    )
    assert ready < 2000
    assert min(unfolded) < 100  # the fastest of five: what the page needs, not what else the machine does
