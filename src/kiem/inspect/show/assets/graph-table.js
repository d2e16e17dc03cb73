// The table of all tensors: sorted, filtered, in pages.

const PAGE = 200;
const COLUMNS = [
  ["name", (v, m) => m.title(v.id)], ["rank", (v) => clean(v.rank), (v) => v.shape.length], ["shape", (v) => shapeText(v.shape), (v) => v.shape.reduce((a, b) => a * b, 1)],
  ["dtype", (v) => clean(v.dtype)], ["device", (v) => clean(v.device)], ["bytes", (v) => bytes(v.bytes), (v) => v.bytes],
  ["grad", (v) => (v.parameter ? "parameter" : v.requires_grad ? (v.leaf ? "leaf" : "yes") : "no")],
  ["view of", (v, m) => (v.view_of === null || v.view_of === undefined ? "" : m.title(v.view_of))],
  ["version", (v) => String(v.version), (v) => v.version], ["saved by", (v) => String(v.saved_by.length), (v) => v.saved_by.length],
  ["norm", (v) => number(v.stats?.norm), (v) => v.stats?.norm ?? -1], ["mean", (v) => number(v.stats?.mean), (v) => v.stats?.mean ?? 0],
  ["not finite", (v) => String(v.stats?.nonfinite ?? ""), (v) => v.stats?.nonfinite ?? -1],
  ["made by", (v, m) => clean(m.ops.get(v.producer)?.label)], ["line", (v, m) => sourceText(m.ops.get(v.producer)?.source)],
];
const NUMBERS = new Set(["bytes", "version", "saved by", "norm", "mean", "not finite"]);

class Table {
  constructor(app, element) {
    this.app = app;
    this.head = element.querySelector("thead");
    this.body = element.querySelector("tbody");
    this.at = 0;
    this.sorted = null;
    this.up = true;
    const $ = (id) => document.getElementById(id);
    this.controls = { filter: $("filter"), rows: $("rows"), page: $("page"), back: $("page-back"), on: $("page-on") };
    this.head.append(make("tr", {}, COLUMNS.map(([name], i) => make("th", { scope: "col", class: NUMBERS.has(name) ? "right" : null },
      make("button", { type: "button", class: "link", onclick: () => this.sort(i) }, name)))));
    this.controls.filter.addEventListener("input", () => { this.at = 0; this.render(); });
    this.controls.back.addEventListener("click", () => { this.at -= PAGE; this.render(); });
    this.controls.on.addEventListener("click", () => { this.at += PAGE; this.render(); });
  }

  sort(column) {
    this.up = this.sorted === column ? !this.up : true;
    this.sorted = column;
    this.at = 0;
    this.render();
  }

  rows() {
    const { model } = this.app, wanted = this.controls.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.texts ??= new Map();
    const textOf = (v) => {
      if (!this.texts.has(v.id)) this.texts.set(v.id, COLUMNS.map(([, text]) => text(v, model)).join("\n").toLowerCase());
      return this.texts.get(v.id);
    };
    const rows = model.doc.values.filter((v) => wanted.every((word) => textOf(v).includes(word)));
    if (this.sorted === null) return rows;
    const [, text, key] = COLUMNS[this.sorted], of = key || ((v) => text(v, model)), sign = this.up ? 1 : -1;
    return rows.map((v) => [of(v), v]).sort(([a], [b]) => sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }))).map(([, v]) => v);
  }

  render() {
    const { model } = this.app, rows = this.rows(), { controls } = this;
    this.at = Math.max(0, Math.min(this.at, Math.floor(Math.max(0, rows.length - 1) / PAGE) * PAGE));
    [...this.head.querySelectorAll("th")].forEach((th, i) => {
      if (i === this.sorted) th.setAttribute("aria-sort", this.up ? "ascending" : "descending"); else th.removeAttribute("aria-sort");
    });
    this.body.replaceChildren(...rows.slice(this.at, this.at + PAGE).map((v) => make("tr", {}, COLUMNS.map(([name, text], i) => (i === 0
      ? make("th", { scope: "row" }, make("button", { class: "link", type: "button", onclick: () => this.app.fromTable(v.id) }, cut(text(v, model), 48)))
      : make("td", { class: NUMBERS.has(name) ? "right" : null }, text(v, model)))))));
    controls.rows.textContent = `${number(rows.length)} of ${plural(model.doc.values.length, "tensor")}`;
    controls.page.textContent = rows.length > PAGE ? `${this.at + 1} to ${Math.min(rows.length, this.at + PAGE)}` : "";
    controls.back.hidden = controls.on.hidden = rows.length <= PAGE;
    controls.back.disabled = this.at === 0;
    controls.on.disabled = this.at + PAGE >= rows.length;
  }
}
