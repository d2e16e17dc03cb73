// The document as a tree of boxes, with the edges of each level; gradients by operation; chains to a leaf.
// Everything here is arithmetic on the document: no element is touched.

const LEVEL = 60;        // a level with more children is grouped, so that its layout stays quick
const FIRST_BOXES = 110; // the drawing starts with at most so many boxes
const FEW_USES = 4;      // a tensor with more users on a level gets a box beside each instead of long edges

// Foreign text: control, format and line-separator characters are shown as their code and can reorder nothing.
const clean = (text) => String(text ?? "").replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\u2028\u2029]/gu,
  (c) => (c === "\n" || c === "\t" ? c : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0")));

const WHOLE = new Intl.NumberFormat("en-GB");

function number(x, digits = 4) {
  if (typeof x !== "number") return x === null || x === undefined ? "–" : clean(x);
  if (Number.isInteger(x) && Math.abs(x) < 1e7) return WHOLE.format(x);
  const size = Math.abs(x);
  return size >= 1e-4 && size < 1e6 ? String(Number(x.toPrecision(digits))) : x.toExponential(digits - 2);
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (n >= 1024 && index < units.length - 1) { n /= 1024; index++; }
  return (index ? n.toPrecision(n >= 999.5 ? 4 : 3) : n) + " " + units[index];
}

const plural = (n, one, many = one + "s") => WHOLE.format(n) + " " + (Number(n) === 1 ? one : many);
const shapeText = (shape) => "[" + (shape || []).join(", ") + "]";

class Model {
  constructor(document_) {
    this.doc = document_;
    this.values = new Map(document_.values.map((v) => [v.id, v]));
    this.ops = new Map(document_.ops.map((op) => [op.id, op]));
    this.uses = new Map(); // value id -> [{op, argument, position}]
    for (const op of document_.ops) {
      op.inputs.forEach(([argument, id], position) => {
        if (!this.uses.has(id)) this.uses.set(id, []);
        this.uses.get(id).push({ op: op.id, argument, position });
      });
    }
    this.boxes = new Map();
    this.boxOfOp = new Map();
    this.boxOfLeaf = new Map();
    this.root = this.box("root", "root", "", null);
    this.phases = phasesOf(document_);
    this.growTree();
    groupLong(this, this.root);
    this.placeLeaves();
    this.finish(this.root, 0);
    this.joinBoxes();
    this.defaultFolding();
    this.backwards = document_.backwards.map((call, index) => new Backward(this, call, index));
    this.timeline = timelineOf(document_, this.phases);
  }

  title(id) {
    const value = this.values.get(id);
    return value && value.name ? clean(value.name) : "%" + id;
  }

  // Its title as read inside a module whose path the name repeats.
  shortTitle(id, box) {
    const title = this.title(id);
    for (let at = box; at; at = at.parent) {
      const prefix = at.path ? clean(at.path) + "." : "";
      if (prefix && title.startsWith(prefix)) return title.slice(prefix.length);
    }
    return title;
  }

  box(key, kind, name, parent, more = {}) {
    const box = { key, kind, name, parent, children: [], open: false, ...more };
    this.boxes.set(key, box);
    if (parent) parent.children.push(box);
    return box;
  }

  container(parent, kind, name) {
    parent.byName ??= new Map();
    const key = kind + ":" + name;
    if (!parent.byName.has(key)) {
      const path = kind === "module" ? (parent.path ? parent.path + "." : "") + name : parent.path;
      parent.byName.set(key, this.box(parent.key + "/" + key, kind, name, parent, { path }));
    }
    return parent.byName.get(key);
  }

  growTree() {
    const holders = new Set(this.doc.ops.map((op) => op.parent).filter((id) => id !== null && id !== undefined));
    for (const op of this.doc.ops) {
      let at = this.root;
      const outer = op.parent !== null && op.parent !== undefined ? this.boxOfOp.get(op.parent) : null;
      if (outer) at = outer;
      else {
        for (const phase of this.phases.get(op.id)) at = this.container(at, "region", phase);
        for (const part of op.module ? op.module.split(".") : []) at = this.container(at, "module", part);
        if (op.module) at.className = op.module_class || at.className;
        if (op.region === "recomputed") at = this.container(at, "region", "recomputed");
      }
      const kind = holders.has(op.id) ? "function" : "op";
      this.boxOfOp.set(op.id, this.box("op:" + op.id, kind, op.label, at, { op: op.id }));
    }
  }

  regroup(box, pieces) {
    box.children = [];
    for (const [name, members] of pieces) {
      if (members.length === 1) { box.children.push(members[0]); continue; }
      const group = this.box(box.key + "/group:" + members[0].key, "group", name, box);
      group.children = members;
      for (const member of members) member.parent = group;
    }
  }

  path(box) {
    const path = [];
    for (let at = box; at; at = at.parent) path.push(at);
    return path.reverse();
  }

  // A value from outside lives where all its users meet.
  placeLeaves() {
    for (const value of this.doc.values) {
      if (this.producerBox(value)) continue;
      const users = (this.uses.get(value.id) || []).map((use) => this.boxOfOp.get(use.op).parent);
      if (!users.length) continue;
      let home = this.path(users[0]);
      for (const user of users.slice(1)) {
        const other = this.path(user);
        let same = 0;
        while (same < home.length && home[same] === other[same]) same++;
        home = home.slice(0, same);
      }
      const parent = home[home.length - 1];
      const kind = value.parameter ? "parameter" : value.requires_grad ? "leaf" : "input";
      this.boxOfLeaf.set(value.id, this.box("leaf:" + value.id, kind, this.title(value.id), parent, { value: value.id }));
    }
  }

  producerBox(value) {
    return value.producer === null || value.producer === undefined ? null : this.boxOfOp.get(value.producer);
  }

  finish(box, depth) {
    box.depth = depth;
    box.nOps = box.kind === "op" ? 1 : 0;
    box.parameters = box.kind === "parameter" ? [box.value] : [];
    box.opIds = box.op !== undefined ? [box.op] : [];
    for (const child of box.children) {
      this.finish(child, depth + 1);
      box.nOps += child.nOps;
      box.parameters.push(...child.parameters);
      box.opIds.push(...child.opIds);
    }
    box.container = box.children.length > 0;
  }

  // box.edges: "from to" -> {from, to, links: [{value, use}]} between children; box.enters, box.leaves: values over the border.
  joinBoxes() {
    for (const box of this.boxes.values()) { box.edges = new Map(); box.enters = new Map(); box.leaves = new Map(); }
    for (const value of this.doc.values) {
      const from = this.producerBox(value) || this.boxOfLeaf.get(value.id);
      if (!from) continue;
      const up = this.path(from);
      for (const use of this.uses.get(value.id) || []) {
        const down = this.path(this.boxOfOp.get(use.op));
        let same = 0;
        while (same < up.length && same < down.length && up[same] === down[same]) same++;
        const link = { value: value.id, use };
        if (same < up.length && same < down.length) addLink(up[same - 1].edges, up[same].key, down[same].key, link);
        for (let i = same; i < down.length - 1; i++) addLink(down[i].enters, value.id, down[i + 1].key, link);
        for (let i = same; i < up.length - 1; i++) addLink(up[i].leaves, up[i + 1].key, value.id, link);
      }
    }
  }

  defaultFolding() {
    const small = this.doc.ops.length <= SMALL_GRAPH;
    this.root.open = true;
    let shown = this.root.children.length;
    const queue = [this.root];
    // Of several training steps the last is open; setup and optimizer are folded.
    const main = this.root.children.findLast((child) => child.kind === "region" && child.name.startsWith("step ")) ?? this.root;
    const total = main.children.reduce((sum, child) => sum + (child.kind === "region" ? 0 : child.nOps), 0);
    while (queue.length) {
      const box = queue.shift();
      for (const child of box.children) {
        if (!child.container || child.kind === "function" && !small) continue;
        if (shown + child.children.length > FIRST_BOXES) continue;
        if (small || child === main || child.kind !== "region" && this.path(child).includes(main) && child.nOps > total / 2) {
          child.open = true;
          shown += child.children.length;
          queue.push(child);
        }
      }
    }
    for (const box of this.boxes.values()) box.firstOpen = box.open;
  }

  // The innermost box that is drawn for this one.
  visible(box) {
    for (const at of this.path(box)) if (!at.open || at === box) return at;
    return box;
  }

  // The box that stands for it when the page opens: the unit by which long chains are folded.
  unit(box) {
    for (const at of this.path(box)) if (!at.firstOpen || at === box) return at;
    return box;
  }
}

function addLink(edges, from, to, link) {
  const key = from + " \u2192 " + to;
  if (!edges.has(key)) edges.set(key, { from, to, links: [] });
  edges.get(key).links.push(link);
}

// Consecutive operations of one function of the program, then pieces: a program without modules stays readable.
function groupLong(model, box) {
  for (const child of [...box.children]) groupLong(model, child);
  const modules = box.children.filter((c) => c.kind !== "op").length;
  const most = modules > box.children.length / 2 ? 3 * LEVEL : LEVEL; // layers in a row read well
  if (box.children.length <= most) return;
  const where = (b) => (b.op === undefined ? b.key : model.ops.get(b.op).source.file + " " + model.ops.get(b.op).source.function);
  const runs = [];
  for (const child of box.children) {
    const last = runs[runs.length - 1];
    if (last && last.where === where(child)) last.members.push(child);
    else runs.push({ where: where(child), members: [child] });
  }
  if (runs.length > 1 && runs.length <= LEVEL) {
    model.regroup(box, runs.map((run) => [functionName(model, run.members[0]), run.members]));
  }
  for (const each of [...box.children.filter((b) => b.kind === "group"), box]) {
    while (each.children.length > most) {
      const pieces = [];
      for (let i = 0; i < each.children.length; i += LEVEL / 2) {
        const members = each.children.slice(i, i + LEVEL / 2);
        pieces.push([`${endOf(members[0], 0)} to ${endOf(members[members.length - 1], -1)}`, members]);
      }
      model.regroup(each, pieces);
    }
  }
}

// The first (0) or last (-1) operation's id in the box, or the name of a module.
function endOf(box, which) {
  return box.kind === "group" ? endOf(box.children.at(which), which) : box.op !== undefined ? "op " + box.op : clean(box.name);
}

function functionName(model, box) {
  return box.op === undefined ? box.name : (model.ops.get(box.op).source.function || "program") + "()";
}

// One run of the engine: which gradient goes where.
class Backward {
  constructor(model, call, index) {
    this.model = model;
    this.index = index;
    this.call = call;
    this.steps = call.steps;
    this.stepsOfOp = new Map();
    this.stepOfLeaf = new Map();
    this.arrivals = call.steps.map(() => []); // per step: [{step, position}]
    this.gradientOfUse = new Map();           // "op position" -> gradient
    call.steps.forEach((step, at) => {
      if (step.leaf !== null && step.leaf !== undefined) this.stepOfLeaf.set(step.leaf, at);
      if (step.op !== null && step.op !== undefined) {
        if (!this.stepsOfOp.has(step.op)) this.stepsOfOp.set(step.op, []);
        this.stepsOfOp.get(step.op).push(at);
      }
      (step.targets || []).forEach((target, position) => {
        if (target && target.step !== null && target.step !== undefined) this.arrivals[target.step].push({ step: at, position });
      });
    });
    call.steps.forEach((step, at) => {
      (step.out || []).forEach((gradient, position) => {
        const argument = this.argument(at, position);
        if (gradient && argument !== null) this.gradientOfUse.set(step.op + " " + argument, gradient);
      });
    });
  }

  // Position in op.inputs that the gradient out[position] belongs to; autograd may list differentiable inputs only.
  argument(at, position) {
    const step = this.steps[at], op = this.model.ops.get(step.op);
    if (!op) return null;
    if (step.out.length === op.inputs.length) return position;
    step.positions ??= matchInputs(this.model, this, step, op);
    return step.positions[position];
  }

  // Euclidean norm over all gradients that arrive at the operation, or null.
  normOfOp(id) {
    const steps = this.stepsOfOp.get(id);
    return steps ? joinedNorm(steps.flatMap((at) => this.steps[at].into)) : null;
  }

  normOfValue(id) {
    const at = this.stepOfLeaf.get(id);
    return at === undefined ? null : joinedNorm(this.steps[at].into);
  }

  normOfBox(box) {
    if (box.value !== undefined) return this.normOfValue(box.value);
    let most = null;
    for (const id of box.opIds) {
      const norm = this.normOfOp(id);
      if (typeof norm === "string") return norm;
      if (norm !== null && (most === null || norm > most)) most = norm;
    }
    return most;
  }

  // Steps between the roots and the leaf in the order in which they ran, with the number of paths.
  chain(leaf) {
    const last = this.stepOfLeaf.get(leaf);
    if (last === undefined) return null;
    const inside = new Set([last]), queue = [last];
    while (queue.length) {
      for (const arrival of this.arrivals[queue.pop()]) {
        if (!inside.has(arrival.step)) { inside.add(arrival.step); queue.push(arrival.step); }
      }
    }
    const order = [...inside].sort((a, b) => a - b);
    const paths = new Map();
    for (const at of order) {
      const from = this.arrivals[at];
      paths.set(at, from.length ? from.reduce((sum, arrival) => sum + (paths.get(arrival.step) ?? 0n), 0n) : 1n);
    }
    return { last, order, inside, paths: paths.get(last) };
  }
}

function matchInputs(model, backward, step, op) {
  let from = 0;
  return step.out.map((_, position) => {
    const target = step.targets?.[position];
    const goal = target && target.step !== null && target.step !== undefined ? backward.steps[target.step] : null;
    if (!goal) return null;
    for (let i = from; i < op.inputs.length; i++) {
      const value = model.values.get(op.inputs[i][1]);
      const hit = goal.leaf !== null && goal.leaf !== undefined ? value.id === goal.leaf : value.producer === goal.op;
      if (hit) { from = i + 1; return i; }
    }
    return null;
  });
}

function joinedNorm(gradients) {
  let square = 0, any = false;
  for (const gradient of gradients) {
    if (!gradient) continue;
    if (gradient.nonfinite || typeof gradient.norm !== "number") return "not finite";
    square += gradient.norm ** 2;
    any = true;
  }
  return any ? Math.sqrt(square) : null;
}

// Element by element over nested lists; null where a member is missing.
function addData(lists) {
  if (lists.some((x) => x === null || x === undefined)) return null;
  if (!Array.isArray(lists[0])) return lists.every((x) => typeof x === "number") ? lists.reduce((a, b) => a + b, 0) : null;
  const sums = lists[0].map((_, i) => addData(lists.map((x) => x?.[i])));
  return sums.some((x) => x === null) ? null : sums;
}
