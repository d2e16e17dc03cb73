// What is said about a box, a tensor, a step of the backward pass, and the chain rule of a leaf.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const name in attributes) {
    if (name === "onclick") element.addEventListener("click", attributes[name]);
    else if (attributes[name] !== false && attributes[name] !== null) element.setAttribute(name, attributes[name] === true ? "" : attributes[name]);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}

const facts = (rows) => make("dl", {}, rows.filter((row) => row && row[1] !== null && row[1] !== undefined && row[1] !== "")
  .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

const sourceText = (source) => (source && source.file ? clean(source.file) + ":" + source.line : "");

function sourceBlock(source, title = "Source") {
  if (!source || !source.file) return null;
  return make("section", {}, make("h3", {}, title), make("p", { class: "line" }, make("code", {}, sourceText(source)),
    source.function ? make("span", { class: "quiet" }, " in " + clean(source.function)) : null), source.text ? make("pre", { tabindex: 0 }, clean(source.text)) : null);
}

// A number, a row or a table of rows; deeper lists as text.
function dataBlock(data) {
  if (!Array.isArray(data)) return make("code", { class: "data" }, number(data, 6));
  if (data.every((x) => !Array.isArray(x))) data = [data];
  if (data.some((row) => !Array.isArray(row) || row.some(Array.isArray))) return make("pre", { tabindex: 0 }, listText(data));
  return make("div", { class: "wide" }, make("table", { class: "data" }, make("tbody", {}, data.map((row) => make("tr", {}, row.map((x) => make("td", {}, number(x, 5))))))));
}

const listText = (data) => (Array.isArray(data) ? "[" + data.map(listText).join(", ") + "]" : number(data, 5));

function statsText(stats) {
  if (!stats) return "not kept";
  const bad = stats.nonfinite ? `, ${plural(stats.nonfinite, "element")} not finite` : "";
  return `norm ${number(stats.norm)}, mean ${number(stats.mean)}, ${number(stats.min)} to ${number(stats.max)}${bad}`;
}

function gradientBlock(gradient) {
  if (!gradient) return make("span", { class: "quiet" }, "none");
  const type = clean(gradient.dtype) + shapeText(gradient.shape);
  if (gradient.data !== null && gradient.data !== undefined) return make("div", {}, make("span", { class: "quiet" }, type), " ", dataBlock(gradient.data));
  return make("div", {}, make("span", { class: "quiet" }, type), " " + statsText(gradient));
}

const MANY_PATHS = 10n ** 9n;
const pathsText = (n) => (n > MANY_PATHS ? `about ${Number(n).toExponential(2)} paths` : plural(n, "path"));

const bare = (argument) => argument.split("[")[0];

class Panel {
  constructor(app, element) { this.app = app; this.model = app.model; this.element = element; }

  show(...children) { this.element.replaceChildren(...children.flat().filter(Boolean)); this.moved = true; }

  settle() { if (this.moved) this.element.scrollTop = 0; this.moved = false; }

  valueLink(id) {
    return make("button", { class: "link", type: "button", onclick: () => this.app.showValues([id]) }, this.model.title(id));
  }

  opLink(id, text) {
    const op = this.model.ops.get(id);
    return make("button", { class: "link", type: "button", onclick: () => this.app.reveal(this.model.boxOfOp.get(id)) }, text || (op ? clean(op.label) : "op " + id));
  }

  links(ids, one) { return ids.length ? ids.slice(0, 40).flatMap((id, i) => [i ? ", " : "", one.call(this, id)]).concat(ids.length > 40 ? ` and ${ids.length - 40} more` : []) : null; }

  // Start: what to do, and what was recorded.
  start() {
    const { doc } = this.model;
    this.show(make("h2", {}, "Explanation"),
      make("p", {}, "Choose a box: an operation shows its formula and derivatives, a parameter its chain rule, a module unfolds."),
      facts([["operations", number(doc.ops.length)], ["tensors", number(doc.values.length)],
        ["backward passes", number(doc.backwards.length)], ["backward nodes", number(doc.backwards.reduce((n, b) => n + b.steps.length, 0))]]));
  }

  box(box) {
    if (box.value !== undefined) return this.value(box.value);
    if (box.kind === "op") return this.op(box.op);
    const parts = box.kind === "function" ? this.opParts(box.op) : [make("h2", {}, box.path ? clean(box.path) : clean(box.name)),
      make("p", { class: "quiet" }, box.kind + (box.className ? " · " + clean(box.className) : ""))];
    const ops = box.opIds.map((id) => this.model.ops.get(id));
    const elements = box.parameters.reduce((n, id) => n + this.model.values.get(id).shape.reduce((a, b) => a * b, 1), 0);
    this.show(parts, make("p", {}, make("button", { type: "button", onclick: () => this.app.toggle(box) }, box.open ? "Fold" : "Unfold")),
      facts([["operations", number(box.nOps)], ["parameters", box.parameters.length ? `${box.parameters.length} tensors, ${number(elements)} elements` : null],
        ["saved for backward", bytes(ops.reduce((n, op) => n + op.saved_bytes, 0))], ["largest gradient", this.app.backward ? number(this.app.backward.normOfBox(box)) + " (norm)" : null]]),
      this.verdicts(ops), box.parameters.length ? make("h3", {}, "Parameters") : null,
      make("ul", {}, box.parameters.slice(0, 60).map((id) => make("li", {}, this.valueLink(id), " ", make("span", { class: "quiet" }, shapeText(this.model.values.get(id).shape))))),
      make("h3", {}, "Inside"), make("ol", {}, box.children.filter((c) => c.value === undefined).slice(0, 60).map((child) => make("li", {},
        make("button", { class: "link", type: "button", onclick: () => this.app.reveal(child) }, boxTitle(this.model, child)), " ", make("span", { class: "quiet" }, boxSubtitle(this.model, child))))));
  }

  verdicts(ops) {
    const { verdicts } = this.model.doc;
    if (!verdicts) return null;
    const count = {};
    for (const op of ops) { const said = verdicts[op.id]?.verdict; if (said) count[said] = (count[said] || 0) + 1; }
    return facts([["verdicts", Object.entries(count).map(([name, n]) => n + " " + clean(name)).join(", ")]]);
  }

  op(id) { this.show(this.opParts(id)); }

  opParts(id) {
    const { model } = this, op = model.ops.get(id), verdict = model.doc.verdicts?.[id];
    const said = [op.kind === "op" ? null : op.kind, op.region || null, op.random ? "random" : null, op.grad_enabled ? null : "no_grad",
      op.mutates.length ? "in place" : null, op.node ? null : "not differentiated"].filter(Boolean);
    const repeat = model.doc.repeats.find((r) => id >= r.first && id <= r.last);
    return [
      make("h2", {}, clean(op.label)), make("p", { class: "quiet" }, clean(op.name) + (said.length ? " · " + said.map(clean).join(" · ") : "")),
      op.error ? make("p", { class: "bad" }, clean(op.error)) : null,
      verdict ? make("p", { class: "verdict " + clean(verdict.verdict) }, make("b", {}, clean(verdict.verdict)), " " + clean(verdict.text)) : null,
      repeat ? make("p", {}, `It is in a loop that ran ${number(repeat.times)} times; one pass is shown.`) : null,
      this.formula(op), sourceBlock(op.source),
      facts([["module", op.module ? clean(op.module) + (op.module_class ? " (" + clean(op.module_class) + ")" : "") : "none"],
        ["inside", op.parent !== null && op.parent !== undefined ? this.opLink(op.parent) : null],
        ["autograd node", clean(op.node)], ["saved for backward", bytes(op.saved_bytes)], ["changes in place", this.links(op.mutates, this.valueLink)],
        ...Object.entries(op.attributes).map(([name, value]) => [clean(name), make("code", {}, clean(typeof value === "string" ? value : JSON.stringify(value)))])]),
      this.tensors("Inputs", op.inputs.map(([argument, value]) => [argument, value, op.symbols[argument] ?? op.symbols[bare(argument)]])),
      this.tensors("Outputs", op.outputs.map((value, i) => [op.outputs.length > 1 ? "output " + i : "output", value, op.symbols[String(i)]])),
      ...model.backwards.flatMap((backward) => (backward.stepsOfOp.get(id) || []).map((at) => this.stepBlock(backward, at))),
    ];
  }

  formula(op) {
    const names = op.inputs.map(([argument]) => argument);
    const where = Object.entries(op.symbols).map(([argument, letter]) => {
      const position = names.findIndex((n) => n === argument || bare(n) === argument);
      const value = position >= 0 ? op.inputs[position][1] : /^\d+$/.test(argument) ? op.outputs[Number(argument)] : undefined;
      return make("li", {}, make("b", {}, clean(letter)), " ", value === undefined ? clean(argument) : this.valueLink(value), " ", make("span", { class: "quiet" }, position >= 0 ? clean(argument) : ""));
    });
    return make("section", { class: "formulas" },
      op.forward_formula ? make("p", { class: "formula" }, clean(op.forward_formula)) : null,
      Object.entries(op.derivatives).map(([argument, text]) => make("p", { class: "formula derivative" }, make("span", {}, "∂L/∂" + clean(op.symbols[argument] ?? argument) + " = "), clean(text))),
      op.forward_formula || Object.keys(op.derivatives).length ? make("p", { class: "quiet" }, "g is the gradient of the loss with respect to the output.") : null,
      !op.closed_form && op.node ? make("p", { class: "quiet" }, "No closed form in the table; verified numerically.") : null,
      where.length ? make("ul", { class: "symbols" }, where) : null);
  }

  tensors(title, rows) {
    if (!rows.length) return null;
    return make("section", {}, make("h3", {}, title), rows.map(([argument, id, letter]) => {
      const value = this.model.values.get(id);
      return make("div", { class: "tensor" }, make("div", {}, letter ? make("b", {}, clean(letter) + " ") : null, this.valueLink(id), " ",
        make("span", { class: "quiet" }, `${clean(argument)} · ${clean(value.dtype)}${shapeText(value.shape)}`)), this.content(value));
    }));
  }

  content(value) {
    return value.data !== null && value.data !== undefined ? dataBlock(value.data) : make("p", { class: "stats" }, statsText(value.stats));
  }

  stepBlock(backward, at) {
    const step = backward.steps[at], op = this.model.ops.get(step.op);
    const kernels = step.kernels.length ? make("p", {}, make("span", { class: "quiet" }, "kernels "), make("code", {}, step.kernels.map(clean).join(", "))) : null;
    const many = this.model.backwards.length > 1 ? ` of backward ${backward.index + 1}` : "";
    return make("section", { class: "step" }, make("h3", {}, `Backward step ${at + 1}${many}: ${clean(step.node)}`),
      step.changed_by_hook ? make("p", { class: "bad" }, "A hook changed the gradient here.") : null,
      make("h4", {}, "arrives"), step.into.map((g) => make("div", { class: "tensor" }, gradientBlock(g))),
      step.out.length ? make("h4", {}, "leaves") : null,
      step.out.map((g, i) => {
        const position = backward.argument(at, i), input = op && position !== null ? op.inputs[position] : null;
        return make("div", { class: "tensor" }, input ? make("div", {}, "to ", this.valueLink(input[1]), " ", make("span", { class: "quiet" }, clean(input[0]))) : null, gradientBlock(g));
      }), kernels);
  }

  // A step of the timeline that no operation stands for.
  step(backward, at) {
    const step = backward.steps[at];
    this.show(make("h2", {}, clean(step.node)), step.leaf !== null && step.leaf !== undefined ? make("p", {}, "accumulates into ", this.valueLink(step.leaf)) : null, this.stepBlock(backward, at), sourceBlock(backward.call.source, "Backward call"));
  }

  values(ids) {
    if (ids.length === 1) return this.value(ids[0]);
    this.show(make("h2", {}, plural(ids.length, "tensor")), this.tensors("Here", ids.slice(0, 60).map((id) => ["", id, ""])));
  }

  value(id) {
    const { model } = this, value = model.values.get(id), users = [...new Set((model.uses.get(id) || []).map((use) => use.op))];
    const leaf = model.backwards.some((b) => b.stepOfLeaf.has(id)) || (value.leaf && value.requires_grad);
    this.show(make("h2", {}, model.title(id)),
      make("p", { class: "quiet" }, [value.parameter ? "parameter" : value.leaf && value.requires_grad ? "leaf" : null, clean(value.rank), clean(value.dtype) + shapeText(value.shape)].filter(Boolean).join(" · ")),
      this.content(value),
      leaf ? this.chain(id) : this.gradientOf(value),
      facts([["made by", value.producer !== null && value.producer !== undefined ? this.opLink(value.producer) : "outside"], ["used by", this.links(users, this.opLink)],
        ["saved by", this.links(value.saved_by, this.opLink)], ["view of", value.view_of !== null && value.view_of !== undefined ? this.valueLink(value.view_of) : null],
        ["device", clean(value.device)], ["strides", shapeText(value.strides)], ["bytes", bytes(value.bytes)], ["storage", `${value.storage}, version ${value.version}`],
        ["requires grad", value.requires_grad ? "yes" : "no"], ["hooks", value.hooks.map(clean).join(", ")]]),
      value.producer !== null && value.producer !== undefined ? sourceBlock(model.ops.get(value.producer)?.source) : null);
  }

  // What arrived at the output of the operation that made it.
  gradientOf(value) {
    const op = this.model.ops.get(value.producer), { backward } = this.app;
    const at = op && backward ? backward.stepsOfOp.get(op.id)?.[0] : undefined;
    if (at === undefined || backward.steps[at].into.length !== op.outputs.length) return null;
    return make("section", {}, make("h3", {}, "Gradient"), gradientBlock(backward.steps[at].into[op.outputs.indexOf(value.id)]));
  }

  chain(id) {
    const { app, model } = this, { backward } = app;
    if (!backward) return make("p", { class: "quiet" }, "No backward call was recorded.");
    const { chain } = app;
    const title = make("h3", {}, "Chain rule", model.backwards.length > 1 ? ` in backward ${backward.index + 1}` : "");
    if (!chain) return make("section", {}, title, make("p", { class: "quiet" }, "No gradient reached it in this backward call."));
    const roots = backward.call.roots.map((r) => model.title(r)).join(", ");
    const joins = chain.order.filter((at) => backward.arrivals[at].length > 1).length;
    const groups = [];
    for (const at of chain.order) {
      const op = backward.steps[at].op, unit = op !== null && op !== undefined ? model.unit(model.boxOfOp.get(op)) : null;
      const last = groups[groups.length - 1];
      if (chain.order.length > 24 && last && last.unit === unit && unit && unit.container) last.steps.push(at);
      else groups.push({ unit, steps: [at] });
    }
    return make("section", { class: "chain" }, title,
      make("p", { class: "told", title: chain.paths > MANY_PATHS ? WHOLE.format(chain.paths) + " paths" : null },
        `From ${roots} to ${model.title(id)}: ${plural(chain.order.length, "step")}, ${pathsText(chain.paths)}, ${joins ? `branches merge at ${plural(joins, "place")}` : "no branches merge"}.`),
      make("ol", {}, groups.map((group) => (group.steps.length === 1 ? this.chainStep(backward, chain, group.steps[0]) : this.chainGroup(backward, chain, group)))));
  }

  chainGroup(backward, chain, group) {
    const { model } = this, first = backward.steps[group.steps[0]], unit = group.unit;
    const name = unit.path ? clean(unit.path) : boxTitle(model, unit);
    const details = make("details", {}, make("summary", {}, make("b", {}, name), ` ${plural(group.steps.length, "step")} `, make("span", { class: "quiet" }, "arrives ‖g‖ " + number(joinedNorm(first.into), 3))));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(make("ol", {}, group.steps.map((at) => this.chainStep(backward, chain, at))));
    });
    return make("li", { class: "group" }, details);
  }

  chainStep(backward, chain, at) {
    const step = backward.steps[at], op = this.model.ops.get(step.op), parts = [];
    const arrivals = backward.arrivals[at];
    parts.push(make("div", {}, make("span", { class: "quiet" }, `${chain.order.indexOf(at) + 1} `), op ? this.opLink(op.id) : make("b", {}, at === chain.last ? this.model.title(step.leaf) : clean(step.node)), " ",
      make("span", { class: "quiet" }, op ? clean(step.node) + (op.source.file ? " · " + clean(op.source.file.split(/[\\/]/).pop()) + ":" + op.source.line : "") : "")));
    if (arrivals.length > 1) parts.push(this.join(backward, chain, at));
    else parts.push(make("div", { class: "flow" }, make("span", {}, at === chain.last ? ".grad gets" : "g ="), ...step.into.map(gradientBlock)));
    step.out.forEach((gradient, i) => {
      const target = step.targets?.[i]?.step;
      if (target === null || target === undefined || !chain.inside.has(target)) return;
      const position = backward.argument(at, i), argument = op && position !== null ? op.inputs[position][0] : null;
      const formula = argument !== null ? op.derivatives[argument] ?? op.derivatives[bare(argument)] : null;
      const letter = argument !== null ? op.symbols[argument] ?? op.symbols[bare(argument)] ?? argument : null;
      if (formula) parts.push(make("p", { class: "formula derivative" }, make("span", {}, `∂L/∂${clean(letter)} = `), clean(formula)));
      parts.push(make("div", { class: "flow" }, make("span", {}, argument !== null ? "→ " + this.model.title(op.inputs[position][1]) : "→"), gradientBlock(gradient)));
    });
    if (step.changed_by_hook) parts.push(make("p", { class: "bad" }, "A hook changed the gradient here."));
    return make("li", {}, parts);
  }

  join(backward, chain, at) {
    const step = backward.steps[at];
    const given = backward.arrivals[at].map(({ step: from, position }) => ({ from, gradient: backward.steps[from].out[position] }));
    const rows = given.map(({ from, gradient }) => {
      const source = backward.steps[from];
      return make("li", {}, "from ", source.op !== null && source.op !== undefined ? this.opLink(source.op) : clean(source.node), make("span", { class: "quiet" }, ` step ${chain.order.indexOf(from) + 1} `), gradientBlock(gradient));
    });
    const arrived = step.into.filter(Boolean);
    const sum = arrived.length === 1 ? addData(given.map(({ gradient }) => gradient?.data)) : null;
    return make("div", { class: "join" }, make("div", {}, `${given.length} contributions add up`), make("ul", {}, rows),
      sum === null ? null : make("div", { class: "flow sum" }, make("span", {}, "sum"), dataBlock(sum)),
      make("div", { class: "flow" }, make("span", {}, step.leaf !== null && step.leaf !== undefined ? ".grad gets" : sum === null ? "arrived, their sum" : "arrived"), ...arrived.map(gradientBlock)),
      sum === null ? null : make("div", { class: "quiet" }, sumCheck(sum, arrived[0], step.changed_by_hook)));
  }
}

// The contributions against what arrived, relative to the size of the contributions in the precision of the data type.
function sumCheck(sum, arrived, hooked) {
  const flat = (x) => [x].flat(Infinity).map(Number), want = flat(sum), got = flat(arrived.data);
  if (want.length !== got.length || [...want, ...got].some((x) => !Number.isFinite(x))) return "The sum cannot be compared.";
  const size = Math.max(...want.map(Math.abs), Number.MIN_VALUE);
  const error = Math.max(...want.map((x, i) => Math.abs(x - got[i]))) / size;
  return `relative difference of the sum ${error === 0 ? "0" : error.toExponential(1)}${hooked ? "; a hook changed it" : ""}`;
}
