// The drawing: each open box is laid out by itself and is then one box of its parent's layout, so that unfolding one
// touches only it and what holds it.

const SVG = "http://www.w3.org/2000/svg";
const MANY_USES = 8;    // an input with more users on a level is drawn without its lines
const MANY_BORDER = 12; // tensors over a border, beyond which they are drawn as one box per user
const HEADER = 30, PADDING = 14, PILL = 24, OP = 42;

const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();
function textWidth(text, size, weight = 400) {
  const key = size + "/" + weight + text;
  if (!widths.has(key)) {
    pen.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
    widths.set(key, pen.measureText(text).width);
  }
  return widths.get(key);
}

const cut = (text, most = 30) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

function svg(tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  if (text !== undefined) element.textContent = text;
  return element;
}

// What is drawn inside an open box: its children, and small boxes for tensors that cross its border.
function level(model, box) {
  const nodes = new Map(), edges = [];
  for (const child of box.children) nodes.set(child.key, { key: child.key, box: child });
  const fan = new Map();
  for (const edge of box.edges.values()) {
    if (!fan.has(edge.from)) fan.set(edge.from, []);
    fan.get(edge.from).push(edge);
  }
  for (const [from, list] of fan) {
    const source = model.boxes.get(from), isLeaf = source.value !== undefined;
    if (isLeaf && list.length > MANY_USES) { nodes.get(from).uses = list.length; continue; }
    list.forEach((edge, i) => {
      if (list.length <= FEW_USES || isLeaf || i < 2) { edges.push(edge); return; }
      const key = "ref:" + edge.to;
      if (!nodes.has(key)) nodes.set(key, { key, pill: "far", values: [] });
      nodes.get(key).values.push(...edge.links.map((link) => link.value));
      edges.push({ from: key, to: edge.to, links: edge.links });
    });
  }
  border(box.enters, nodes, edges, "in");
  border(box.leaves, nodes, edges, "out");
  for (const node of nodes.values()) if (node.values) node.values = [...new Set(node.values)];
  return { nodes, edges };
}

function border(crossings, nodes, edges, way) {
  const value = (edge) => (way === "in" ? edge.from : edge.to), child = (edge) => (way === "in" ? edge.to : edge.from);
  const uses = new Map();
  for (const edge of crossings.values()) uses.set(value(edge), (uses.get(value(edge)) || 0) + 1);
  for (const edge of crossings.values()) {
    const key = uses.size > MANY_BORDER ? way + ":at " + child(edge) : way + ":" + value(edge);
    if (!nodes.has(key)) nodes.set(key, { key, pill: way, values: [] });
    nodes.get(key).values.push(value(edge));
    if (uses.get(value(edge)) > MANY_USES && uses.size <= MANY_BORDER) { nodes.get(key).uses = uses.get(value(edge)); continue; }
    edges.push(way === "in" ? { ...edge, from: key } : { ...edge, to: key });
  }
}

class Layout {
  constructor(model) { this.model = model; this.done = new Map(); }

  forget(box) { for (let at = box; at; at = at.parent) this.done.delete(at.key); }

  of(box) {
    if (!this.done.has(box.key)) this.done.set(box.key, this.compute(box));
    return this.done.get(box.key);
  }

  compute(box) {
    const { nodes, edges } = level(this.model, box);
    const graph = new KiemVendor.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 22, edgesep: 14, ranksep: 30, marginx: PADDING, marginy: PADDING });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const node of nodes.values()) { this.measure(box, node); graph.setNode(node.key, { width: node.width, height: node.height }); }
    for (const edge of edges) {
      edge.shape = this.edgeText(edge);
      graph.setEdge(edge.from, edge.to, { width: Math.max(40, textWidth(edge.shape, 11) + 6), height: 14, labelpos: "c" });
    }
    KiemVendor.layout(graph);
    for (const node of nodes.values()) {
      const at = graph.node(node.key);
      node.x = at.x - node.width / 2;
      node.y = at.y - node.height / 2;
    }
    const heights = new Map();
    for (const name of graph.nodes()) { const { y, height } = graph.node(name); heights.set(Math.round(y), Math.max(height, heights.get(Math.round(y)) || 0)); }
    for (const edge of edges) {
      const at = graph.edge(edge.from, edge.to);
      edge.points = beside(at.points, heights);
      edge.at = { x: at.x, y: at.y };
    }
    const size = graph.graph();
    return { nodes: [...nodes.values()], edges, width: size.width || 0, height: size.height || 0 };
  }

  measure(parent, node) {
    const box = node.box;
    if (!box) {
      node.text = this.pillText(parent, node);
      node.width = textWidth(node.text, 12) + 26;
      node.height = PILL;
    } else if (box.container && box.open) {
      const inside = this.of(box);
      node.inside = inside;
      node.width = Math.max(inside.width, textWidth(cut(boxTitle(this.model, box)), 13, 600) + textWidth(cut(clean(box.className || "")), 11) + 60);
      node.height = inside.height + HEADER;
    } else if (box.value !== undefined) {
      node.text = cut(this.model.shortTitle(box.value, parent)) + " " + this.sizeText(box.value) + (node.uses ? ` · used ${node.uses} times` : "");
      node.width = textWidth(node.text, 12) + 24;
      node.height = PILL;
    } else {
      node.title = cut(boxTitle(this.model, box));
      node.text = cut(boxSubtitle(this.model, box), 44);
      node.width = Math.max(96, textWidth(node.title, 13, 600) + 40, textWidth(node.text, 11) + 32);
      node.height = OP;
    }
  }

  pillText(parent, node) {
    const arrow = node.pill === "out" ? "→ " : node.pill === "far" ? "↷ " : "↓ ";
    const values = [...new Set(node.values)];
    if (values.length > 2) return arrow + values.length + " tensors";
    return arrow + values.map((id) => cut(this.model.shortTitle(id, parent), 22)).join(", ") + (node.uses ? ` · used ${node.uses} times` : "");
  }

  edgeText(edge) {
    const ids = [...new Set(edge.links.map((link) => link.value))];
    if (ids.length > 1) return ids.length + " tensors";
    const value = this.model.values.get(ids[0]), named = value.name && this.model.producerBox(value);
    return (named ? cut(this.model.title(ids[0]), 18) + " " : "") + this.sizeText(ids[0]);
  }

  // The number itself for a scalar whose value was kept.
  sizeText(id) {
    const { shape, data } = this.model.values.get(id);
    return shape.length || data === null || data === undefined ? cut(shapeText(shape), 26) : "= " + number(data, 3);
  }
}

// A line past a tall box runs straight along it instead of cutting its corner.
function beside(points, heights) {
  return points.flatMap((p, i) => {
    const half = i > 0 && i < points.length - 1 ? (heights.get(Math.round(p.y)) || 0) / 2 : 0;
    const down = i > 0 && points[i - 1].y > p.y ? -1 : 1;
    return half > OP ? [{ x: p.x, y: p.y - down * half }, { x: p.x, y: p.y + down * half }] : [p];
  });
}

function boxTitle(model, box) {
  if (box.kind === "op" || box.kind === "function") return clean(model.ops.get(box.op).label);
  return clean(box.name);
}

function boxSubtitle(model, box) {
  if (box.kind === "op") {
    const source = model.ops.get(box.op).source;
    return source.file ? clean(source.file.split(/[\\/]/).pop()) + ":" + source.line : "";
  }
  const parts = [];
  if (box.className) parts.push(clean(box.className));
  parts.push(plural(box.nOps, "op"));
  if (box.parameters.length) parts.push(plural(box.parameters.length, "param"));
  return parts.join(" · ");
}

class Drawing {
  constructor(app, element) {
    this.app = app;
    this.model = app.model;
    this.svg = element;
    this.layout = new Layout(app.model);
    this.scene = svg("g", {});
    this.svg.append(this.markers(), this.scene);
    this.zoom = KiemVendor.zoom().scaleExtent([0.05, 3]).on("zoom", (event) => this.scene.setAttribute("transform", event.transform));
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

  render() {
    this.refocus ||= this.svg.contains(document.activeElement);
    const boxes = svg("g", {});
    this.shown = new Map();
    this.edges = [];
    this.place(this.model.root, this.layout.of(this.model.root), 0, 0, boxes);
    this.scene.replaceChildren(boxes);
    this.paint();
    if (!this.shown.has(this.stop)) this.stop = this.shown.keys().next().value;
    this.setStop(this.stop);
  }

  // After all changes of the page, as it needs its layout.
  settle() {
    if (this.refocus) this.shown.get(this.stop)?.element.focus({ preventScroll: true });
    this.refocus = false;
  }

  place(parent, layout, dx, dy, into) {
    const lines = svg("g", { "aria-hidden": "true" });
    for (const edge of layout.edges) this.line(edge, dx, dy, lines);
    const frames = layout.nodes.filter((node) => node.inside), rest = layout.nodes.filter((node) => !node.inside);
    for (const node of frames) this.node(parent, node, dx, dy, into);
    into.append(lines);
    for (const node of rest) this.node(parent, node, dx, dy, into);
    for (const node of frames) this.place(node.box, node.inside, dx + node.x + (node.width - node.inside.width) / 2, dy + node.y + HEADER, into);
  }

  line(edge, dx, dy, into) {
    const points = edge.points.map((p) => [p.x + dx, p.y + dy]);
    let d = "M" + points[0];
    for (let i = 1; i < points.length - 1; i++) {
      const [x, y] = points[i], [nx, ny] = points[i + 1];
      d += i === points.length - 2 ? `Q${x},${y} ${nx},${ny}` : `Q${x},${y} ${(x + nx) / 2},${(y + ny) / 2}`;
    }
    if (points.length === 2) d += "L" + points[1];
    const path = svg("path", { d, class: "edge" });
    const label = svg("text", { x: edge.at.x + dx, y: edge.at.y + dy + 4, class: "label", "text-anchor": "middle" });
    into.append(path, label);
    this.edges.push({ edge, path, label });
  }

  node(parent, node, dx, dy, into) {
    const { box } = node, x = dx + node.x, y = dy + node.y;
    const look = box ? (node.inside ? "frame" : box.value !== undefined ? (box.kind === "input" ? "leaf" : "leaf trained") : box.container ? "folded" : "op") : "pill " + node.pill;
    const group = svg("g", { class: "box " + look, transform: `translate(${x},${y})`, tabindex: -1, role: "button", "data-key": node.key + (box ? "" : "@" + parent.key) });
    const radius = box && box.value === undefined ? 5 : PILL / 2;
    if (look === "folded") group.append(svg("rect", { class: "stack", x: 4, y: 4, width: node.width, height: node.height, rx: radius }));
    group.append(svg("rect", { class: "body", width: node.width, height: node.height, rx: radius }));
    if (box && box.value === undefined && !node.inside) group.append(svg("rect", { class: "strip", x: 1, y: 1, width: 7, height: node.height - 2, rx: 3 }));
    if (node.inside) {
      group.append(svg("text", { x: 12, y: 20, class: "title" }, "− " + cut(boxTitle(this.model, box))));
      if (box.className) group.append(svg("text", { x: 24 + textWidth("− " + cut(boxTitle(this.model, box)), 13, 600), y: 20, class: "sub" }, cut(clean(box.className))));
    } else if (look === "folded" || look === "op") {
      group.append(svg("text", { x: 18, y: 18, class: "title" }, (box.container ? "+ " : "") + node.title));
      group.append(svg("text", { x: 18, y: 33, class: "sub" }, node.text));
      group.append(svg("text", { x: node.width - 8, y: 18, class: "mark", "text-anchor": "end" }));
    } else {
      group.append(svg("text", { x: node.width / 2, y: 16, class: "title", "text-anchor": "middle" }, node.text));
    }
    into.append(group);
    const key = node.key + (box ? "" : "@" + parent.key);
    this.shown.set(key, { key, box, node, parent, element: group, x, y, width: node.width, height: node.height });
  }

  // Classes, colours and labels of what is drawn; the layout stays.
  paint() {
    const { app } = this, backward = app.view === "backward" ? app.backward : null;
    this.svg.classList.toggle("backward", app.view === "backward");
    for (const shown of this.shown.values()) {
      const { element, box } = shown;
      const state = app.stateOf(shown);
      element.classList.toggle("selected", state.selected);
      element.classList.toggle("current", state.current);
      element.classList.toggle("away", state.away);
      element.setAttribute("aria-label", this.spoken(shown));
      if (box && box.container) element.setAttribute("aria-expanded", String(box.open)); else element.removeAttribute("aria-expanded");
      const colour = box ? app.colourOf(box) : null;
      const body = element.querySelector(".body"), strip = element.querySelector(".strip"), mark = element.querySelector(".mark");
      const filled = colour && colour.fill && !shown.node.inside;
      body.style.fill = filled ? colour.fill : "";
      element.style.setProperty("--on", filled ? colour.on : "");
      element.classList.toggle("filled", Boolean(filled));
      if (strip) strip.style.fill = colour && colour.strip ? colour.strip : "";
      if (mark) mark.textContent = colour && colour.mark ? colour.mark : "";
    }
    for (const { edge, path, label } of this.edges) {
      const gradient = backward ? gradientText(backward, edge) : null;
      label.textContent = backward ? gradient || "" : edge.shape;
      const on = app.edgeOnPath(edge);
      path.setAttribute("class", "edge" + (backward && !gradient ? " none" : "") + (on === true ? " path" : on === false ? " away" : ""));
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

  nearest(from, [wx, wy]) {
    let best = null, least = Infinity;
    const middle = (s) => [s.x + s.width / 2, s.node.inside ? s.y + HEADER / 2 : s.y + s.height / 2];
    const [fx, fy] = middle(from);
    for (const to of this.shown.values()) {
      if (to === from) continue;
      const [tx, ty] = middle(to), along = (tx - fx) * wx + (ty - fy) * wy, aside = Math.abs((tx - fx) * wy) + Math.abs((ty - fy) * wx);
      if (along > 4 && along + 2 * aside < least) { least = along + 2 * aside; best = to; }
    }
    return best;
  }

  transform() { return this.svg.__zoom; }

  moveTo(x, y, k) { this.view.call(this.zoom.transform, KiemVendor.zoomIdentity.translate(x, y).scale(k)); }

  bringIntoView(at) {
    const t = this.transform(), box = this.svg.getBoundingClientRect();
    const height = Math.min(at.height, at.node.inside ? HEADER : at.height);
    const left = at.x * t.k + t.x, top = at.y * t.k + t.y, right = left + at.width * t.k, bottom = top + height * t.k;
    if (left >= 0 && top >= 0 && right <= box.width && bottom <= box.height) return;
    this.centre(at);
  }

  centre(at) {
    const t = this.transform(), box = this.svg.getBoundingClientRect();
    const k = Math.max(t.k, 0.6), height = at.node.inside ? Math.min(at.height, box.height / k) : at.height;
    this.moveTo(box.width / 2 - (at.x + at.width / 2) * k, box.height / 2 - (at.y + height / 2) * k, k);
  }

  fit(whole = true) {
    const size = this.layout.of(this.model.root), box = this.svg.getBoundingClientRect();
    const across = (box.width - 16) / size.width, down = (box.height - 16) / size.height;
    const k = whole ? Math.min(1.2, Math.max(0.05, Math.min(across, down))) : Math.min(1, Math.max(0.55, Math.min(across, Math.max(down, 0.75))));
    this.moveTo((box.width - size.width * k) / 2, Math.max(8, (box.height - size.height * k) / 2), k);
  }

  by(factor) { this.view.call(this.zoom.scaleBy, factor); }

  // The folded or unfolded box keeps its place on the screen.
  relayout(box) {
    const before = this.shown.get(box.key), t = this.transform();
    this.layout.forget(box);
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
