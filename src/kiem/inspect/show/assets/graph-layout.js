// The drawing: each open box is laid out by itself and is then one box of its parent's layout, so that unfolding one
// touches only it and what holds it.

const SVG = "http://www.w3.org/2000/svg";
const MANY_USES = 8;    // an input with more users on a level is drawn without its lines
const MANY_BORDER = 12; // tensors over a border, beyond which they are drawn as one box per user
const HEADER = 30, PADDING = 14, PILL = 24, OP = 42;

const pen = document.createElement("canvas").getContext("2d");
const FONT = getComputedStyle(document.body).fontFamily;
const widths = new Map();
function textWidth(text, size, weight = 400) {
  const key = size + "/" + weight + text;
  if (!widths.has(key)) {
    pen.font = `${weight} ${size}px ${FONT}`;
    widths.set(key, pen.measureText(text).width);
  }
  return widths.get(key);
}

const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };
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
    if (!nodes.size) return { nodes: [], edges: [], width: 1, height: 1 };
    const graph = new KiemVendor.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 22, edgesep: 14, ranksep: 30, marginx: PADDING, marginy: PADDING });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const node of nodes.values()) { this.measure(box, node); graph.setNode(node.key, { width: node.width, height: node.height }); }
    for (const edge of edges) {
      edge.shape = this.edgeText(edge);
      graph.setEdge(edge.from, edge.to, { width: Math.max(52, textWidth(edge.shape, 11) + 6), height: 14, labelpos: "c" });
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
    return { nodes: [...nodes.values()], edges, width: size.width, height: size.height };
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
      node.width = Math.max(96, textWidth(node.title, 13, 600) + 52, textWidth(node.text, 11) + 32);
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
    const value = this.model.values.get(ids[0]);
    if (!this.model.producerBox(value)) return ""; // its box says it
    return (value.name ? cut(this.model.title(ids[0]), 18) + " " : "") + this.sizeText(ids[0]);
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

// What a reader must know of an operation that is not in its name.
const peculiar = (op) => [op.region === "checkpoint" ? "checkpoint" : null, op.random ? "random" : null, op.mutates.length ? "in place" : null,
  op.grad_enabled ? null : "no_grad", op.error ? "raised" : null].filter(Boolean);

function boxSubtitle(model, box) {
  if (box.kind === "op") {
    const op = model.ops.get(box.op), { file, line } = op.source;
    return [file ? clean(file.split(/[\\/]/).pop()) + ":" + line : "", ...peculiar(op)].filter(Boolean).join(" · ");
  }
  const parts = [];
  if (box.className) parts.push(clean(box.className));
  parts.push(plural(box.nOps, "op"));
  if (box.parameters.length) parts.push(plural(box.parameters.length, "param"));
  return parts.join(" · ");
}
