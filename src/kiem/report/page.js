"use strict";
// Values under the pointer, and with the arrow keys on a focused chart. The charts themselves need no script.
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const tip = document.getElementById("tip");
  const spoken = document.getElementById("values");
  if (!tip) return;

  const checked = (id) => document.getElementById(id).checked;
  const quantity = () => (checked("x-time") ? "time" : "tokens");
  const isLog = () => checked("scale-log");

  function fraction(chart, x) {
    const [low, high] = chart.axes[quantity() + (isLog() ? "-log" : "-linear")];
    return isLog() ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
  }

  function nearest(chart, line, at) {
    const xs = line[quantity()];
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (fraction(chart, xs[middle]) < at) low = middle; else high = middle;
    }
    return at - fraction(chart, xs[low]) <= fraction(chart, xs[high]) - at ? low : high;
  }

  const number = (y) => (Math.abs(y) >= 1000 ? Math.round(y).toLocaleString("en") : String(Number(y.toPrecision(4))));

  function seconds(s) {
    if (s < 60) return Number(s.toPrecision(3)) + " s";
    const whole = Math.round(s), minutes = Math.floor(whole / 60);
    if (minutes < 60) return minutes + " min " + whole % 60 + " s";
    return Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
  }

  function show(plot, at, left, top) {
    const chart = data[plot.dataset.chart];
    const lead = chart.lines.reduce((a, b) => (b.step.length > a.step.length ? b : a));
    const index = nearest(chart, lead, at);
    const head = "step " + lead.step[index].toLocaleString("en") + "\n" +
      lead.tokens[index].toLocaleString("en") + " tokens\n" + seconds(lead.time[index]);
    const place = fraction(chart, lead[quantity()][index]);
    const values = chart.lines.map((line) => {
      const i = nearest(chart, line, place);
      const where = line.step[i] === lead.step[index] || line === lead ? "" : " (step " + line.step[i].toLocaleString("en") + ")";
      return line.name + ": " + number(line.y[i]) + where;
    });
    tip.textContent = head + "\n" + values.join("\n");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const beside = left + 16 + box.width > innerWidth - 8 ? left - box.width - 16 : left + 16;
    tip.style.left = Math.max(8, beside) + "px";
    tip.style.top = Math.max(8, Math.min(top + 12, innerHeight - box.height - 8)) + "px";
    const cursor = plot.querySelector(".cursor");
    cursor.setAttribute("x1", 100 * place + "%");
    cursor.setAttribute("x2", 100 * place + "%");
    cursor.classList.add("on");
    return { index, last: lead.step.length - 1, place: (i) => fraction(chart, lead[quantity()][i]) };
  }

  function hide(plot) {
    tip.hidden = true;
    plot.querySelector(".cursor").classList.remove("on");
  }

  for (const plot of document.querySelectorAll(".plot")) {
    let at = 1;
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(plot, at, event.clientX, event.clientY);
    });
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide(plot);
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
      if (!by && event.key !== "Home" && event.key !== "End") return;
      event.preventDefault();
      const box = plot.getBoundingClientRect();
      const now = show(plot, at, 0, 0);
      const next = event.key === "Home" ? 0 : event.key === "End" ? now.last : Math.min(now.last, Math.max(0, now.index + by));
      at = now.place(next);
      show(plot, at, box.left + Math.max(0, at) * box.width, box.top);
      spoken.textContent = tip.textContent;
    });
  }
})();
