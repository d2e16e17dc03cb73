// The page: state, tree, search, steps, colors. The parts stand in graph-model, graph-draw, graph-panel and graph-table.

const $ = (id) => document.getElementById(id);
const CIVIDIS = [[0, 34, 78], [35, 62, 108], [77, 86, 108], [107, 110, 113], [138, 134, 121], [174, 158, 117], [210, 185, 104], [254, 232, 56]];
// Okabe and Ito's colors, told apart with every common color vision.
const KINDS = [
  ["matrix product", "#0072b2", /^(mm|bmm|addmm|baddbmm|matmul|linear|convolution|conv\w*|dot|mv|einsum)$/],
  ["attention", "#56b4e9", /attention/], ["normalization, softmax", "#009e73", /norm|softmax/],
  ["reduction, loss", "#d55e00", /sum|mean|loss|max|min|amax|var|cross_entropy|prod|logsumexp/],
  ["view", "#999999", /view|reshape|permute|transpose|^t$|unsqueeze|squeeze|expand|slice|select|detach|alias|split|unbind|chunk|cat|stack|clone|contiguous|_to_copy/],
  ["index", "#cc79a7", /embedding|gather|scatter|index|where|arange/],
];
const ELEMENTWISE = ["elementwise and other", "#e69f00"], CUSTOM = ["custom, compiled", "#f0e442"];
// The kinds of verdicts, the worst first, as in verdicts.py.
const VERDICTS = {
  wrong: ["#d55e00", "✗", "wrong"], nonfinite: ["#d55e00", "∞", "not finite"], coarse: ["#56b4e9", "≈", "check too coarse"],
  unchecked: ["#999999", "?", "not checked"], hook: ["#cc79a7", "⚓", "changed by a hook"], kink: ["#e69f00", "∧", "not differentiable here"],
  ok: ["#009e73", "✓", "right"], zero: ["#bbbbbb", "0", "no gradient arrived"],
};
const SUMMARY = { operations: "operations", tensors: "tensors", leaves: "leaf tensors with requires_grad=True", leaf_elements: "elements of these",
  backward_calls: "backward passes", backward_steps: "backward nodes", saved_bytes: "saved for backward" };

function kindOf(op) {
  if (op.kind !== "op") return CUSTOM;
  const label = op.label.toLowerCase().replace(/_$/, "");
  return KINDS.find(([, , test]) => test.test(label)) || ELEMENTWISE;
}

function cividis(share) {
  const at = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1), low = Math.min(CIVIDIS.length - 2, Math.floor(at));
  return CIVIDIS[low].map((c, i) => Math.round(c + (CIVIDIS[low + 1][i] - c) * (at - low)));
}

const light = (rgb) => rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const onTop = (rgb) => (light(rgb) > 0.18 ? "#000000" : "#ffffff");

class App {
  constructor(document_) {
    this.model = new Model(document_);
    this.view = "forward";
    this.backward = this.model.backwards[this.model.backwards.length - 1] || null;
    this.selected = null;
    this.value = null;
    this.chain = null;
    this.now = null;
    this.coloring = document_.verdicts ? "verdict" : "kind";
    this.drawing = new Drawing(this, $("drawing"));
    this.panel = new Panel(this, $("panel"));
    this.table = new Table(this, $("tensors"));
    this.tree = new Tree(this, $("tree"));
    this.search = new Search(this);
    this.head();
    this.controls();
    this.scale();
    this.drawing.render();
    this.drawing.fit(false);
    this.tree.render();
    this.panel.start();
    this.settle();
  }

  // What needs the layout of the page comes after all changes, so that it is made once.
  settle() {
    this.drawing.clear();
    this.tree.settle();
    this.panel.settle();
    this.drawing.settle();
  }

  head() {
    const { doc } = this.model;
    $("name").textContent = document.title = clean(doc.title);
    if (doc.failure) {
      const { kind, message, explanation } = doc.failure, source = doc.failure.source;
      $("failure").append(make("b", {}, clean(kind) + ": "), clean(message), source ? make("code", {}, " " + (typeof source === "string" ? clean(source) : sourceText(source))) : "", explanation ? make("span", {}, " " + clean(explanation)) : "");
      $("failure").hidden = false;
    }
    $("about").append(make("h2", {}, "Summary"), facts(Object.entries(doc.summary).map(([name, value]) => [SUMMARY[name] ?? clean(name), name.endsWith("_bytes") ? bytes(value) : number(value, 6)])),
      make("h2", {}, "Notes"), doc.notes.length ? make("ul", {}, doc.notes.map((note) => make("li", {}, clean(note)))) : make("p", {}, "None."),
      doc.repeats.length ? make("section", {}, make("h2", {}, "Loops"), make("ul", {}, doc.repeats.map((r) =>
        make("li", {}, `${clean(this.model.ops.get(r.first)?.label)} to ${clean(this.model.ops.get(r.last)?.label)} ran ${number(r.times)} times; the first is shown.`)))) : "");
  }

  controls() {
    const { model } = this, calls = model.backwards;
    for (const [value, name] of [["gradient", "gradient norm"], ["kind", "kind"], ["verdict", "verdict"]]) {
      if (value === "gradient" && !calls.length || value === "verdict" && !model.doc.verdicts) continue;
      $("color").append(make("option", { value, selected: value === this.coloring }, name));
    }
    calls.forEach((call, i) => $("call").append(make("option", { value: i, selected: call === this.backward }, `${call.call.numbers ?? `pass ${i + 1}`} ${sourceText(call.call.source)}`)));
    $("calls").hidden = calls.length < 2;
    $("way").querySelector("[value=backward]").disabled = !calls.length;
    $("way").addEventListener("change", (event) => { this.view = event.target.value; this.drawing.paint(); this.say(this.view + " view"); });
    $("call").addEventListener("change", (event) => { this.backward = calls[event.target.value]; this.chain = null; this.scale(); this.drawing.paint(); this.panelAgain(); });
    $("color").addEventListener("change", (event) => { this.coloring = event.target.value; this.scale(); this.drawing.paint(); });
    const many = model.doc.ops.length > 400;
    $("unfold").disabled = many;
    if (many) $("unfold").title = "More than 400 operations: unfold the modules you look at.";
    $("unfold").addEventListener("click", () => this.foldAll(true));
    $("fold").addEventListener("click", () => this.foldAll(false));
    $("fit").addEventListener("click", () => this.drawing.fit());
    $("in").addEventListener("click", () => this.drawing.by(1.3));
    $("out").addEventListener("click", () => this.drawing.by(1 / 1.3));
    $("outline-toggle").addEventListener("click", () => $("outline-toggle").setAttribute("aria-expanded", String($("graph").classList.toggle("outlined"))));
    this.stepControls();
    this.themeControl();
    tabs(this);
    document.addEventListener("keydown", (event) => this.key(event));
  }

  stepControls() {
    const { timeline } = this.model, range = $("step");
    range.max = timeline.length;
    range.addEventListener("input", () => this.goTo(Number(range.value)));
    $("previous").addEventListener("click", () => this.goTo(Number(range.value) - 1));
    $("next").addEventListener("click", () => this.goTo(Number(range.value) + 1));
    $("step-text").textContent = `0 of ${number(timeline.length)}`;
    range.setAttribute("aria-valuetext", "start");
  }

  themeControl() {
    const themes = ["auto", "light", "dark"];
    let at = 0;
    $("theme").addEventListener("click", () => {
      at = (at + 1) % themes.length;
      if (at) document.documentElement.dataset.theme = themes[at]; else delete document.documentElement.dataset.theme;
      $("theme").textContent = "Theme: " + themes[at];
    });
  }

  key(event) {
    const typing = event.target.matches?.("input, select, textarea, [role=tab], [role=treeitem]");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/" && !event.target.matches?.("input")) { event.preventDefault(); $("search").focus(); return; }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !typing && !$("graph").hidden && !event.target.closest?.("pre, .wide")) { event.preventDefault(); this.goTo(Number($("step").value) + by); }
  }

  // A step of the timeline: operations forward, then those of the backward calls. 0 is before the first.
  goTo(index) {
    const { timeline } = this.model;
    index = Math.max(0, Math.min(timeline.length, index));
    $("step").value = index;
    const step = this.now = timeline[index - 1] || null;
    const text = step ? this.stepName(step) : "start";
    $("step-text").textContent = `${number(index)} of ${number(timeline.length)}` + (step ? ": " + text : "");
    $("step").setAttribute("aria-valuetext", text);
    this.selected = this.value = this.chain = null;
    if (step && step.backward !== undefined && this.backward.index !== step.backward) { this.backward = this.model.backwards[step.backward]; $("call").value = step.backward; this.scale(); }
    this.setView(step && step.backward !== undefined ? "backward" : "forward");
    this.drawing.paint();
    const box = this.boxNow();
    if (box) { const shown = this.drawing.shown.get(this.model.visible(box).key); if (shown) this.drawing.bringIntoView(shown); }
    if (!step) this.panel.start();
    else if (step.backward !== undefined) this.panel.step(this.backward, step.step);
    else this.panel.op(step.op);
    this.tree.mark();
    this.settle();
  }

  setView(view) {
    this.view = view;
    $("way").querySelector(`[value=${view}]`).checked = true;
  }

  stepName(step) {
    const op = this.model.ops.get(step.op);
    if (step.backward === undefined) return clean(op.label) + (op.source.file ? " " + sourceText(op.source).split(/[\\/]/).pop() : "");
    return "backward " + (op ? clean(op.label) : step.leaf !== null && step.leaf !== undefined ? this.model.title(step.leaf) : clean(this.model.backwards[step.backward].steps[step.step].node));
  }

  boxNow() {
    if (!this.now) return null;
    if (this.now.op !== null && this.now.op !== undefined) return this.model.boxOfOp.get(this.now.op) || null;
    return this.now.leaf !== null && this.now.leaf !== undefined ? this.model.boxOfLeaf.get(this.now.leaf) || null : null;
  }

  stateOf({ box, node }) {
    const { model, chain } = this, now = this.boxNow();
    const stands = (wanted) => Boolean(wanted && box && model.visible(wanted) === box);
    const selected = box ? stands(this.selected) : this.value !== null && node.values.length === 1 && node.values[0] === this.value;
    const away = Boolean(chain && !node.inside && !(box ? chain.boxes.has(box.key) : node.values.some((id) => chain.values.has(id))));
    return { selected, current: stands(now), away };
  }

  // True: the edge lies on the chain to the chosen leaf; null: no chain is shown.
  edgeOnPath(edge) {
    if (!this.chain) return null;
    return edge.links.some(({ value, use }) => this.chain.links.has(value + " " + use.op));
  }

  markChain() {
    const { chain, model, backward } = this;
    if (!chain) return;
    chain.boxes = new Set();
    chain.links = new Set();
    chain.values = new Set();
    for (const at of chain.order) {
      const step = backward.steps[at];
      const box = step.op !== null && step.op !== undefined ? model.boxOfOp.get(step.op) : model.boxOfLeaf.get(step.leaf);
      for (let b = box; b; b = b.parent) chain.boxes.add(b.key);
      (step.targets || []).forEach((target, i) => {
        const position = target && chain.inside.has(target.step) ? backward.argument(at, i) : null;
        if (position === null) return;
        const value = model.ops.get(step.op).inputs[position][1];
        chain.links.add(value + " " + step.op);
        chain.values.add(value);
      });
    }
  }

  select(key) {
    this.selected = this.model.boxes.get(key);
    this.value = this.selected.value ?? null;
    this.now = null;
    this.setChain(this.value);
    this.panel.box(this.selected);
    this.drawing.paint();
    this.tree.mark();
    this.settle();
    this.say(boxTitle(this.model, this.selected) + " chosen");
  }

  setChain(value) {
    this.chain = value !== null && this.backward ? this.backward.chain(value) : null;
    this.markChain();
  }

  panelAgain() { if (this.selected) this.select(this.selected.key); else if (this.value !== null) this.showValues([this.value]); }

  showValues(ids) {
    const leaf = ids.length === 1 ? this.model.boxOfLeaf.get(ids[0]) : null;
    this.value = ids.length === 1 ? ids[0] : null;
    this.selected = leaf || null;
    this.now = null;
    this.setChain(this.value);
    this.panel.values(ids);
    this.drawing.paint();
    this.tree.mark();
    this.settle();
    this.say(ids.length === 1 ? this.model.title(ids[0]) + " chosen" : plural(ids.length, "tensor"));
  }

  fromTable(id) {
    selectTab(this, "graph");
    const value = this.model.values.get(id), box = this.model.boxOfLeaf.get(id) || this.model.producerBox(value);
    if (box) this.reveal(box);
    this.showValues([id]);
    $("panel").focus();
  }

  // `choose`: and makes it the chosen one.
  toggle(box, choose = false) {
    if (!box.container || box === this.model.root) return;
    box.open = !box.open;
    if (choose) { this.selected = box; this.value = this.now = this.chain = null; }
    this.drawing.relayout(box);
    this.tree.render();
    if (this.selected === box) this.panel.box(box);
    this.settle();
    this.say(boxTitle(this.model, box) + (box.open ? " unfolded" : " folded"));
  }

  foldParent(at) {
    const box = at.node.inside ? at.box : at.parent;
    if (box === this.model.root || !box.open) return;
    this.drawing.setStop(box.key);
    this.toggle(box);
  }

  // Unfolds what holds the box, chooses it and brings it into view.
  reveal(box) {
    const closed = this.model.path(box.parent || box).filter((b) => b !== box && !b.open);
    for (const b of closed) { b.open = true; this.drawing.layout.forget(b.parent); }
    if (closed.length) { this.drawing.render(); this.tree.render(); }
    this.select(box.key);
    const shown = this.drawing.shown.get(box.key);
    if (shown) { this.drawing.setStop(box.key); this.drawing.center(shown); }
  }

  foldAll(open) {
    for (const box of this.model.boxes.values()) if (box.container && box.parent) box.open = open || (box.firstOpen && this.model.doc.ops.length > SMALL_GRAPH);
    this.drawing.layout.done.clear();
    this.drawing.render();
    this.drawing.fit(open);
    this.tree.render();
    this.settle();
    this.say(open ? "All unfolded" : "Folded");
  }

  // Range of the gradient norms, and the legend.
  scale() {
    this.range = null;
    const legend = $("legend");
    legend.replaceChildren();
    if (this.coloring === "gradient") {
      let low = Infinity, high = 0;
      for (const id of this.backward.stepsOfOp.keys()) {
        const norm = this.backward.normOfOp(id);
        if (typeof norm === "number" && norm > 0) { low = Math.min(low, norm); high = Math.max(high, norm); }
      }
      if (high === 0) { legend.append("no gradient"); return; }
      this.range = [low, high];
      const bar = make("span", { class: "ramp", "aria-hidden": "true" });
      bar.style.background = `linear-gradient(90deg, ${CIVIDIS.map((c) => `rgb(${c})`).join(", ")})`;
      legend.append("‖g‖ " + number(low, 2), bar, number(high, 2) + " log");
      return;
    }
    const entries = this.coloring === "verdict" ? Object.entries(VERDICTS).filter(([name]) => Object.values(this.model.doc.verdicts).some((v) => v.verdict === name)).map(([, [color, mark, words]]) => [mark + " " + words, color])
      : [...new Set(this.model.doc.ops.map(kindOf))].map(([name, color]) => [name, color]);
    for (const [name, color] of entries) {
      const dot = make("span", { class: "dot", "aria-hidden": "true" });
      dot.style.background = color;
      legend.append(make("span", { class: "entry" }, dot, name));
    }
  }

  colorOf(box) {
    if (this.coloring === "gradient") {
      const norm = this.backward.normOfBox(box);
      if (norm === null) return null;
      if (typeof norm === "string") return { fill: "#d55e00", on: "#000000", mark: "not finite" };
      if (!this.range || norm <= 0) return { mark: "‖g‖ 0" };
      const [low, high] = this.range;
      const rgb = cividis(high > low ? Math.log(norm / low) / Math.log(high / low) : 0.5);
      return { fill: `rgb(${rgb})`, on: onTop(rgb) };
    }
    if (box.value !== undefined) return null;
    if (this.coloring === "kind") {
      const kinds = new Set(box.opIds.map((id) => kindOf(this.model.ops.get(id))));
      return kinds.size === 1 ? { strip: [...kinds][0][1] } : null;
    }
    const worst = Object.keys(VERDICTS).find((name) => box.opIds.some((id) => this.model.doc.verdicts[id]?.verdict === name));
    return worst ? { strip: VERDICTS[worst][0], mark: VERDICTS[worst][1] } : null;
  }

  say(text) { $("status").textContent = text; }
}

const TABS = ["graph", "tensors", "about"];
function selectTab(app, chosen) {
  for (const name of TABS) {
    $(name).hidden = name !== chosen;
    $("tab-" + name).setAttribute("aria-selected", String(name === chosen));
    $("tab-" + name).tabIndex = name === chosen ? 0 : -1;
  }
  if (chosen === "tensors") app.table.render();
}

function tabs(app) {
  for (const name of TABS) {
    $("tab-" + name).addEventListener("click", () => selectTab(app, name));
    $("tab-" + name).addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      const next = TABS[(TABS.indexOf(name) + by + TABS.length) % TABS.length];
      selectTab(app, next);
      $("tab-" + next).focus();
    });
  }
}

new App(JSON.parse($("document").textContent));
performance.mark("kiem-ready");
