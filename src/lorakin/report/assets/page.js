"use strict";

/* Charts: every .plot is drawn from the JSON that follows it, once it has a width, and again when the theme changes. */

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Map();

/* Plain colours are left to CSS, so that they follow the theme even in print; a ramp must be known to be interpolated. */
function theme() {
  const colours = (name) => getComputedStyle(root).getPropertyValue(name).split(",").map((colour) => colour.trim());
  const font = getComputedStyle(document.body).fontFamily;
  const ramp = colours("--ramp");
  const text = { labelColor: "var(--muted)", titleColor: "var(--muted)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
  const categories = [1, 2, 3, 4, 5, 6, 7].map((number) => `var(--series-${number})`);
  return {
    background: "transparent",
    font,
    padding: 2,
    view: { stroke: null },
    axis: { ...text, gridColor: "var(--line)", domainColor: "var(--line-strong)", tickColor: "var(--line-strong)", titlePadding: 8, labelPadding: 4, tickSize: 4 },
    legend: { ...text, symbolStrokeWidth: 2, gradientStrokeColor: "transparent", orient: "bottom", titleLimit: 400, labelLimit: 240, columns: { expr: "max(1, floor(width / 130))" }, layout: { bottom: { direction: "vertical", anchor: "start" } } },
    range: { category: categories, ramp, heatmap: ramp, ordinal: ramp.slice(2), diverging: colours("--ramp-diverging") },
    mark: { color: categories[0] },
    rect: { stroke: "var(--paper)", strokeWidth: 1 },
    rule: { color: "var(--muted)" },
    text: { color: "var(--ink)", fontSize: 12 },
    line: { strokeWidth: 2 },
    point: { size: 36, strokeWidth: 1.5 },
  };
}

async function draw(plot) {
  charts.set(plot, null);
  const spec = JSON.parse(plot.nextElementSibling.textContent);
  const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, config: theme(), tooltip: { disableDefaultStyle: true } };
  try {
    charts.set(plot, await vegaEmbed(plot, spec, options));
  } catch (error) {
    plot.textContent = "This chart could not be drawn; its data stands below.";
    throw error;
  }
}

function drawWhatHasRoom() {
  for (const plot of document.querySelectorAll(".plot")) {
    if (!charts.has(plot) && plot.clientWidth > 0) draw(plot);
  }
}

dark.addEventListener("change", () => {
  for (const [plot, chart] of charts) {
    chart?.finalize();
    draw(plot);
  }
});
document.addEventListener("toggle", drawWhatHasRoom, true);
addEventListener("beforeprint", () => document.querySelectorAll("section > details").forEach((part) => (part.open = true)));
drawWhatHasRoom();

/* A link to a section that is folded away unfolds it. */

function unfold() {
  const part = document.getElementById(location.hash.slice(1))?.querySelector(":scope > details");
  if (part) part.open = true;
}
addEventListener("hashchange", unfold);
unfold();

/* Tables: a heading is a button that sorts by its column; what has no value comes last either way. */

function compare(one, other, numeric) {
  return numeric ? Number(one) - Number(other) : one.localeCompare(other, undefined, { numeric: true });
}

function sort(table, head) {
  const column = head.cellIndex;
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const numeric = head.classList.contains("number");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
  rows.sort(([a], [b]) => (a === undefined) - (b === undefined) || (a === undefined ? 0 : sign * compare(a, b, numeric)));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
}

/* Lines to copy. */

for (const lines of document.querySelectorAll("figure.code pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(lines);
    await navigator.clipboard.writeText(lines.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  lines.before(button);
}
