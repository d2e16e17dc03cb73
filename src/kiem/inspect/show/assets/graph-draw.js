// The drawing of the laid out boxes: elements, keys, pan and zoom.

class Drawing {
  constructor(app, element) {
    this.app = app;
    this.model = app.model;
    this.svg = element;
    this.layout = new Layout(app.model);
    this.scene = svg("g", {});
    this.layers = ["frames", "lines", "boxes"].map((name) => svg("g", { class: name }));
    this.layers[1].setAttribute("aria-hidden", "true");
    this.scene.append(...this.layers);
    this.svg.append(this.markers(), this.scene);
    this.shown = new Map();
    this.lines = new Map();
    this.gone = [];
    this.fitted = null; // how it was fitted, as long as nobody has moved it since
    this.resize();
    new ResizeObserver(() => this.resized()).observe(this.svg);
    this.zoom = KiemVendor.zoom().scaleExtent([0.05, 3]).extent(() => [[0, 0], this.size]).on("zoom", (event) => { this.fitted = null; this.scene.setAttribute("transform", event.transform); });
    this.view = KiemVendor.select(this.svg).call(this.zoom).on("dblclick.zoom", null);
    this.svg.addEventListener("click", (event) => this.clicked(event));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("focusin", (event) => { const at = this.under(event); if (at) this.setStop(at.key); });
  }

  markers() {
    const defs = svg("defs");
    for (const name of ["forward", "backward", "path"]) {
      const marker = svg("marker", { id: "arrow-" + name, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" });
      marker.append(svg("path", { d: "M0 0.8 L8 4 L0 7.2 z", class: "tip " + name }));
      defs.append(marker);
    }
    return defs;
  }

  // Lays out what a click may unfold while nothing else is to do.
  prepare() {
    const waiting = [...this.shown.values()].filter(({ box }) => box && box.container && !this.layout.done.has(box.key)).map(({ box }) => box);
    const work = (deadline) => {
      while (waiting.length && deadline.timeRemaining() > 8) this.layout.of(waiting.shift());
      if (waiting.length) requestIdleCallback(work);
    };
    if (window.requestIdleCallback) requestIdleCallback(work);
  }

  // Until somebody moves it, the drawing follows the room it has: a frame in a notebook gets its size late.
  resized() {
    this.resize();
    if (this.fitted !== null) this.fit(this.fitted);
  }

  resize() { this.size = [this.svg.clientWidth, this.svg.clientHeight]; }

  // What stays keeps its element, so that text is not laid out again and the focus stays.
  render() {
    this.refocus ||= this.svg.contains(document.activeElement);
    const before = { shown: this.shown, lines: this.lines };
    this.shown = new Map();
    this.lines = new Map();
    this.place(this.model.root, this.layout.of(this.model.root), 0, 0, before);
    for (const [key, shown] of before.shown) if (this.shown.get(key)?.element !== shown.element) this.gone.push(shown.element);
    for (const [key, line] of before.lines) if (!this.lines.has(key)) this.gone.push(line.path, line.label);
    this.paint();
    if (!this.shown.has(this.stop)) this.stop = this.shown.keys().next().value;
    this.setStop(this.stop);
  }

  // After all changes of the page; the focused element goes last, as its removal makes the browser lay out the page again.
  clear() {
    for (const element of this.gone) if (element !== document.activeElement) element.remove();
  }

  settle() {
    if (this.refocus) this.shown.get(this.stop)?.element.focus({ preventScroll: true });
    this.refocus = false;
    for (const element of this.gone) element.remove();
    this.gone = [];
    this.prepare();
  }

  place(parent, layout, dx, dy, before) {
    for (const edge of layout.edges) this.line(parent, edge, dx, dy, before);
    for (const node of layout.nodes) this.node(parent, node, dx, dy, before);
    for (const node of layout.nodes) {
      if (node.inside) this.place(node.box, node.inside, dx + node.x + (node.width - node.inside.width) / 2, dy + node.y + HEADER, before);
    }
  }

  line(parent, edge, dx, dy, before) {
    const key = edge.from + " \u2192 " + edge.to + "@" + parent.key;
    const points = edge.points.map((p) => [p.x + dx, p.y + dy]);
    let d = "M" + points[0];
    for (let i = 1; i < points.length - 1; i++) {
      const [x, y] = points[i], [nx, ny] = points[i + 1];
      d += i === points.length - 2 ? `Q${x},${y} ${nx},${ny}` : `Q${x},${y} ${(x + nx) / 2},${(y + ny) / 2}`;
    }
    if (points.length === 2) d += "L" + points[1];
    let line = before.lines.get(key);
    if (!line) {
      line = { path: svg("path", { class: "edge" }), label: svg("text", { class: "label", "text-anchor": "middle" }) };
      this.layers[1].append(line.path, line.label);
    }
    line.edge = edge;
    line.path.setAttribute("d", d);
    line.label.setAttribute("transform", `translate(${edge.at.x + dx},${edge.at.y + dy + 4})`);
    this.lines.set(key, line);
  }

  node(parent, node, dx, dy, before) {
    const { box } = node, x = dx + node.x, y = dy + node.y, key = node.key + (box ? "" : "@" + parent.key);
    const look = box ? (node.inside ? "frame" : box.value !== undefined ? (box.kind === "input" ? "leaf" : "leaf trained") : box.container ? "folded" : "op") : "pill " + node.pill;
    const same = [look, node.width, node.height, node.title, node.text].join("\n"), old = before.shown.get(key);
    const element = old && old.same === same ? old.element : this.element(node, look, key);
    element.setAttribute("transform", `translate(${x},${y})`);
    this.shown.set(key, { key, box, node, parent, element, same, x, y, width: node.width, height: node.height });
  }

  element(node, look, key) {
    const { box } = node;
    const group = svg("g", { class: "box " + look, tabindex: -1, role: "button", "data-key": key });
    if (box && box.opIds.some((id) => this.model.ops.get(id).error)) group.classList.add("failed");
    const radius = box && box.value === undefined ? 5 : PILL / 2;
    if (look === "folded") group.append(svg("rect", { class: "stack", x: 4, y: 4, width: node.width, height: node.height, rx: radius }));
    group.append(svg("rect", { class: "body", width: node.width, height: node.height, rx: radius }));
    if (look === "folded" || look === "op") group.append(svg("rect", { class: "strip", x: 1, y: 1, width: 7, height: node.height - 2, rx: 3 }));
    if (node.inside) {
      const title = "− " + cut(boxTitle(this.model, box));
      group.append(svg("text", { x: 12, y: 20, class: "title" }, title));
      if (box.className) group.append(svg("text", { x: 24 + textWidth(title, 13, 600), y: 20, class: "sub" }, cut(clean(box.className))));
    } else if (look === "folded" || look === "op") {
      group.append(svg("text", { x: 18, y: 18, class: "title" }, (box.container ? "+ " : "") + node.title));
      group.append(svg("text", { x: 18, y: 33, class: "sub" }, node.text));
      group.append(svg("text", { x: node.width - 8, y: 18, class: "mark", "text-anchor": "end" }));
    } else {
      group.append(svg("text", { x: node.width / 2, y: 16, class: "title", "text-anchor": "middle" }, node.text));
    }
    this.layers[node.inside ? 0 : 2].append(group);
    return group;
  }

  // Classes, colors and labels of what is drawn; the layout stays.
  paint() {
    const { app } = this, backward = app.view === "backward" ? app.backward : null;
    this.svg.classList.toggle("backward", app.view === "backward");
    for (const shown of this.shown.values()) {
      const { element, box } = shown;
      const state = app.stateOf(shown);
      element.classList.toggle("selected", state.selected);
      element.classList.toggle("current", state.current);
      element.classList.toggle("away", state.away);
      if (state.selected || state.current) element.setAttribute("aria-current", "true"); else element.removeAttribute("aria-current");
      element.setAttribute("aria-label", this.spoken(shown));
      if (box && box.container) element.setAttribute("aria-expanded", String(box.open)); else element.removeAttribute("aria-expanded");
      const color = box ? app.colorOf(box) : null;
      const body = element.querySelector(".body"), strip = element.querySelector(".strip"), mark = element.querySelector(".mark");
      const filled = color && color.fill && !shown.node.inside;
      body.style.fill = filled ? color.fill : "";
      element.style.setProperty("--on", filled ? color.on : "");
      element.classList.toggle("filled", Boolean(filled));
      if (strip) strip.style.fill = color && color.strip ? color.strip : "";
      if (mark) write(mark, color && color.mark ? color.mark : "");
    }
    for (const { edge, path, label } of this.lines.values()) {
      const gradient = backward ? gradientText(backward, edge) : null;
      write(label, backward ? gradient || "" : edge.shape);
      const on = app.edgeOnPath(edge);
      path.setAttribute("class", "edge" + (backward && !gradient ? " none" : "") + (on === true ? " path" : on === false ? " away" : "") + (app.value !== null && edge.links.some((link) => link.value === app.value) ? " picked" : ""));
      label.setAttribute("class", "label" + (on === false ? " away" : ""));
      const arrow = `url(#arrow-${on === true ? "path" : backward ? "backward" : "forward"})`;
      if (backward) { path.removeAttribute("marker-end"); if (gradient) path.setAttribute("marker-start", arrow); }
      else { path.removeAttribute("marker-start"); path.setAttribute("marker-end", arrow); }
    }
  }

  spoken(shown) {
    const { box, node } = shown;
    if (!box) return { in: "arrives: ", out: "leaves: ", far: "from further above: " }[node.pill] + node.text.slice(2);
    if (box.value !== undefined) return box.kind + " " + node.text;
    return box.kind + " " + boxTitle(this.model, box) + ", " + boxSubtitle(this.model, box);
  }

  under(event) {
    const element = event.target.closest?.(".box");
    return element ? this.shown.get(element.dataset.key) : null;
  }

  clicked(event) {
    const at = this.under(event);
    if (!at) return;
    this.setStop(at.key);
    const body = at.node.inside && (event.clientY - this.svg.getBoundingClientRect().top - this.transform().y) / this.transform().k > at.y + HEADER;
    if (body) this.app.select(at.box.key); else this.activate(at);
  }

  activate(at) {
    if (!at.box) this.app.showValues(at.node.values);
    else if (at.box.container) this.app.toggle(at.box, true);
    else this.app.select(at.box.key);
  }

  setStop(key) {
    this.shown.get(this.stop)?.element.setAttribute("tabindex", -1);
    this.stop = key;
    this.shown.get(key)?.element.setAttribute("tabindex", 0);
  }

  key(event) {
    const at = this.under(event);
    if (!at || event.ctrlKey || event.metaKey || event.altKey) return;
    const way = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (way) this.focus(this.nearest(at, way));
    else if (event.key === "Enter" || event.key === " ") this.activate(at);
    else if (event.key === "Escape" || event.key === "Backspace") this.app.foldParent(at);
    else if (event.key === "+" || event.key === "=") this.by(1.3);
    else if (event.key === "-") this.by(1 / 1.3);
    else if (event.key === "0") this.fit();
    else if (event.key === "Home") this.focus([...this.shown.values()][0]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus(at) {
    if (!at) return;
    at.element.focus({ preventScroll: true });
    this.bringIntoView(at);
  }

  // The next box that way: a small gap counts, lying beside counts less; of an open box its head.
  nearest(from, [wx, wy]) {
    const middle = (s) => [s.x + s.width / 2, s.node.inside ? s.y + HEADER / 2 : s.y + s.height / 2];
    const [fx, fy] = middle(from);
    let best = null, least = Infinity;
    for (const to of this.shown.values()) {
      const [tx, ty] = middle(to), along = (tx - fx) * wx + (ty - fy) * wy;
      if (to === from || along <= 4) continue;
      const off = wy ? Math.abs(tx - fx) : Math.abs(ty - fy);
      const gap = Math.max(0, off - (wy ? (from.width + to.width) / 2 : (OP + OP) / 2));
      const far = along + 2 * gap + 0.1 * off;
      if (far < least) { least = far; best = to; }
    }
    return best;
  }

  transform() { return this.svg.__zoom; }

  moveTo(x, y, k) { this.view.call(this.zoom.transform, KiemVendor.zoomIdentity.translate(x, y).scale(k)); }

  bringIntoView(at) {
    const t = this.transform(), [across, down] = this.size;
    const height = at.node.inside ? Math.min(at.height, HEADER) : at.height;
    const left = at.x * t.k + t.x, top = at.y * t.k + t.y, right = left + at.width * t.k, bottom = top + height * t.k;
    if (left < 0 || top < 0 || right > across || bottom > down) this.center(at);
  }

  center(at) {
    const k = Math.max(this.transform().k, 0.6), [across, down] = this.size;
    const height = at.node.inside ? Math.min(at.height, down / k) : at.height;
    this.moveTo(across / 2 - (at.x + at.width / 2) * k, down / 2 - (at.y + height / 2) * k, k);
  }

  // Whole, where it can then be read; else, and as the page opens, as wide as fits and still readable, from the top.
  fit(whole = true) {
    this.resize();
    const { width, height } = this.layout.of(this.model.root), [across, all] = this.size, down = all - 44; // the legend's room
    const byWidth = (across - 16) / width, byHeight = (down - 16) / height;
    const all_ = Math.min(1.2, byWidth, byHeight);
    const k = whole && all_ >= 0.4 ? all_ : Math.min(1, Math.max(0.55, Math.min(byWidth, Math.max(byHeight, 0.75))));
    this.moveTo((across - width * k) / 2, Math.max(8, (down - height * k) / 2), k);
    this.fitted = whole;
  }

  by(factor) { this.view.call(this.zoom.scaleBy, factor); }

  // The folded or unfolded box keeps its place on the screen.
  relayout(box) {
    const before = this.shown.get(box.key), t = this.transform();
    this.layout.forget(box.parent);
    this.render();
    const after = this.shown.get(box.key);
    if (before && after) {
      const x = before.x + before.width / 2 - after.x - after.width / 2, y = before.y - after.y;
      this.moveTo(t.x + x * t.k, t.y + y * t.k, t.k);
    }
  }
}

function gradientText(backward, edge) {
  const norms = [];
  for (const { use } of edge.links) {
    const gradient = backward.gradientOfUse.get(use.op + " " + use.position);
    if (gradient) norms.push(gradient.nonfinite ? Infinity : gradient.norm);
  }
  if (!norms.length) return null;
  if (norms.some((n) => typeof n !== "number" || n === Infinity)) return "not finite";
  return norms.length === 1 ? "‖g‖ " + number(norms[0], 3) : `‖g‖ ≤ ${number(Math.max(...norms), 3)} (${norms.length})`;
}
