// The outline beside the drawing, and the search: the same boxes as lists, for keyboards and screen readers.

class Tree {
  constructor(app, element) {
    this.app = app;
    this.element = element;
    this.rows = new Map();
    element.addEventListener("click", (event) => {
      const box = this.boxOf(event.target);
      if (!box) return;
      this.focus(box.key);
      if (event.target.closest(".twist")) app.toggle(box); else app.reveal(box);
    });
    element.addEventListener("keydown", (event) => this.key(event));
  }

  boxOf(target) {
    const item = target.closest?.("[role=treeitem]");
    return item ? this.app.model.boxes.get(item.dataset.key) : null;
  }

  render() {
    this.refocus ||= this.element.contains(document.activeElement);
    const before = this.rows, rows = [];
    this.rows = new Map();
    const add = (box, depth) => {
      const children = box.children.filter((c) => c.kind !== "input");
      children.forEach((child, i) => {
        const old = before.get(child.key), expanded = child.container ? String(child.open) : null;
        const row = old && old.getAttribute("aria-expanded") === expanded ? old : this.row(child, depth, i + 1, children.length);
        this.rows.set(child.key, row);
        rows.push(row);
        if (child.container && child.open) add(child, depth + 1);
      });
    };
    add(this.app.model.root, 1);
    const wanted = new Set(rows);
    for (const row of before.values()) if (!wanted.has(row)) row.remove();
    rows.forEach((row, i) => { if (this.element.children[i] !== row) this.element.insertBefore(row, this.element.children[i] || null); });
    if (!this.rows.has(this.stop)) this.stop = this.rows.keys().next().value;
    this.rows.get(this.stop)?.setAttribute("tabindex", 0);
    this.mark();
  }

  // After all changes of the page, as it needs its layout.
  settle() {
    if (this.refocus) this.rows.get(this.stop)?.focus();
    this.refocus = false;
    const row = this.rows.get(this.goal?.key), box = this.element;
    if (!row || !box.offsetParent) return;
    if (row.offsetTop < box.scrollTop || row.offsetTop + row.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }

  row(box, depth, position, size) {
    const { model } = this.app;
    const row = make("div", { role: "treeitem", "data-key": box.key, tabindex: -1, "aria-level": depth, "aria-posinset": position, "aria-setsize": size, class: box.kind,
      "aria-expanded": box.container ? String(box.open) : null },
    make("span", { class: "twist", "aria-hidden": "true" }, box.container ? (box.open ? "▾" : "▸") : box.value !== undefined ? "◦" : ""),
    make("span", { class: "text" }, box.value === undefined ? boxTitle(model, box) : model.shortTitle(box.value, box.parent)),
    make("span", { class: "quiet" }, box.value !== undefined ? shapeText(model.values.get(box.value).shape) : box.container ? box.className ? clean(box.className) : plural(box.nOps, "op") : boxSubtitle(model, box)));
    row.style.paddingLeft = 0.2 + 0.8 * (depth - 1) + "rem";
    return row;
  }

  mark() {
    const { model, selected } = this.app, now = this.app.boxNow();
    const goal = now ? model.visible(now) : selected;
    for (const [key, row] of this.rows) {
      row.setAttribute("aria-selected", String(Boolean(selected && key === selected.key)));
      row.classList.toggle("current", Boolean(now && goal && key === goal.key));
    }
    this.goal = goal;
  }

  focus(key) {
    const row = this.rows.get(key);
    if (!row) return;
    this.rows.get(this.stop)?.setAttribute("tabindex", -1);
    this.stop = key;
    row.setAttribute("tabindex", 0);
    row.focus();
  }

  key(event) {
    const box = this.boxOf(event.target);
    if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = [...this.rows.keys()], at = keys.indexOf(box.key);
    if (event.key === "ArrowDown") this.focus(keys[at + 1]);
    else if (event.key === "ArrowUp") this.focus(keys[at - 1]);
    else if (event.key === "Home") this.focus(keys[0]);
    else if (event.key === "End") this.focus(keys[keys.length - 1]);
    else if (event.key === "ArrowRight" && box.container) { if (box.open) this.focus(keys[at + 1]); else this.app.toggle(box); }
    else if (event.key === "ArrowLeft") { if (box.container && box.open) this.app.toggle(box); else this.focus(box.parent?.key); }
    else if (event.key === "Enter" || event.key === " ") this.app.reveal(box);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const MOST_FOUND = 50;

class Search {
  constructor(app) {
    this.app = app;
    this.input = document.getElementById("search");
    this.list = document.getElementById("found");
    this.active = -1;
    this.input.addEventListener("input", () => this.find());
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("blur", () => setTimeout(() => this.close(), 150));
    this.list.addEventListener("pointerdown", (event) => { const item = event.target.closest("[data-at]"); if (item) { event.preventDefault(); this.choose(Number(item.dataset.at)); } });
  }

  entries() {
    if (this.all) return this.all;
    const { model } = this.app;
    this.all = [];
    for (const box of model.boxes.values()) {
      if (box === model.root || box.value !== undefined) continue;
      const op = model.ops.get(box.op);
      const made = op && model.values.get(op.outputs[0]);
      const more = op ? [clean(op.module), boxSubtitle(model, box), made ? shapeText(made.shape) : "", "op " + op.id].filter(Boolean).join(" · ") : [box.className, plural(box.nOps, "op")].filter(Boolean).map(clean).join(" · ");
      this.all.push({ kind: box.kind, text: op ? clean(op.label) : clean(box.path || box.name), more, full: op ? [op.name, sourceText(op.source), op.source.text].map(clean).join(" ") : "", box });
    }
    for (const value of model.doc.values) {
      if (value.name) this.all.push({ kind: value.parameter ? "parameter" : "tensor", text: model.title(value.id), more: clean(value.dtype) + shapeText(value.shape), full: "", value: value.id });
    }
    const rank = { module: 0, parameter: 1, tensor: 2 };
    this.all.sort((a, b) => (rank[a.kind] ?? 3) - (rank[b.kind] ?? 3));
    for (const entry of this.all) entry.key = (entry.text + " " + entry.more + " " + entry.full).toLowerCase();
    return this.all;
  }

  find() {
    const wanted = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = wanted.length ? this.entries().filter((entry) => wanted.every((word) => entry.key.includes(word))) : [];
    const exact = (entry) => (entry.text.toLowerCase() === wanted.join(" ") ? 0 : entry.text.toLowerCase().startsWith(wanted[0]) ? 1 : 2);
    hits.sort((a, b) => exact(a) - exact(b));
    this.hits = hits.slice(0, MOST_FOUND);
    this.list.replaceChildren(...this.hits.map((entry, i) => make("li", { role: "option", id: "found-" + i, "data-at": i, "aria-selected": "false" },
      make("span", { class: "kind" }, entry.kind), make("b", {}, entry.text), make("span", { class: "quiet" }, entry.more))));
    if (hits.length > MOST_FOUND) this.list.append(make("li", { class: "quiet", role: "presentation" }, `and ${number(hits.length - MOST_FOUND)} more`));
    if (wanted.length && !hits.length) this.list.append(make("li", { class: "quiet", role: "presentation" }, "Nothing found"));
    this.list.hidden = !wanted.length;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.app.say(wanted.length ? plural(hits.length, "result") : "");
    this.activate(this.hits.length ? 0 : -1);
  }

  activate(index) {
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    this.active = index;
    const item = index >= 0 ? document.getElementById("found-" + index) : null;
    if (item) { item.setAttribute("aria-selected", "true"); item.scrollIntoView({ block: "nearest" }); this.input.setAttribute("aria-activedescendant", item.id); }
    else this.input.removeAttribute("aria-activedescendant");
  }

  key(event) {
    if (event.key === "Escape") { this.close(); return; }
    if (this.list.hidden || !this.hits.length) return;
    if (event.key === "ArrowDown") this.activate((this.active + 1) % this.hits.length);
    else if (event.key === "ArrowUp") this.activate((this.active - 1 + this.hits.length) % this.hits.length);
    else if (event.key === "Enter") this.choose(this.active);
    else return;
    event.preventDefault();
  }

  close() { this.list.hidden = true; this.input.setAttribute("aria-expanded", "false"); }

  choose(index) {
    const hit = this.hits[index];
    if (!hit) return;
    this.close();
    if (hit.value !== undefined) this.app.fromTable(hit.value);
    else { selectTab(this.app, "graph"); this.app.reveal(hit.box); this.app.drawing.shown.get(hit.box.key)?.element.focus({ preventScroll: true }); }
  }
}
