// What a page of the book does in the browser. No library but the theme's; Plotly is fetched only where a figure needs it.
"use strict";

const root = document.documentElement;
const local = (path) => `${root.dataset.content_root || "./"}_static/${path}`;
const dark = () => root.dataset.theme === "dark";

function script(path) {
  return new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = local(path);
    element.onload = resolve;
    element.onerror = () => reject(new Error(`cannot load ${path}`));
    document.head.append(element);
  });
}

/* ---------------------------------------------------------------- interactive figures */

window.guidedDescentFigures = {};  // filled by _static/figures/*.js

// Figures sit on the page's own background, so their ink follows the theme. Numbers on an axis make their own room.
function ink(layout) {
  const [text, grid] = dark() ? ["#ced6dd", "#3b444c"] : ["#323232", "#dfe3e6"];
  const changes = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": text, "legend.bgcolor": "rgba(0,0,0,0)" };
  if (layout.colorway) changes.colorway = layout.colorway.map(themed);
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).concat("xaxis", "yaxis")) {
    Object.assign(changes, { [`${axis}.gridcolor`]: grid, [`${axis}.zerolinecolor`]: grid, [`${axis}.linecolor`]: text, [`${axis}.color`]: text, [`${axis}.automargin`]: true, [`${axis}.title.standoff`]: 8 });
  }
  return changes;
}

// A colour as the theme shows it: the palette has lighter twins in the dark, and greys swap places with their mirror
// image, so that the strongest curve stays the strongest.
function themed(colour) {
  const hex = /^#[0-9a-f]{6}$/i.test(colour) && colour.slice(1).toLowerCase();
  if (!hex || !dark()) return colour;
  const twin = getComputedStyle(root).getPropertyValue(`--gd-${hex}`).trim();
  const [r, g, b] = [0, 2, 4].map((n) => parseInt(hex.slice(n, n + 2), 16));
  const mirrored = Math.round(230 - (r * (230 - 18)) / 255);
  return twin || (r === g && g === b ? `rgb(${mirrored},${mirrored},${mirrored})` : colour);
}

// What recolours the traces of a figure, from the colours that its data has.
function inks(data) {
  const at = (trace, path) => path.split(".").reduce((value, key) => value?.[key], trace);
  const paths = ["line.color", "marker.color", "marker.line.color", "fillcolor", "textfont.color"];
  const found = paths.filter((path) => data.some((trace) => typeof at(trace, path) === "string"));
  return Object.fromEntries(found.map((path) => [path, data.map((trace) => {
    const colour = at(trace, path);
    return typeof colour === "string" ? themed(colour) : undefined;
  })]));
}

// Plotly draws its slider as SVG: no keyboard, and its labels collide on a phone. An <input> has neither fault.
function rangeFor(slider, plot, name) {
  const steps = slider.steps;
  const box = document.createElement("div");
  box.className = "gd-slider";
  const label = document.createElement("label");
  label.htmlFor = `${name}-range`;
  const prefix = (slider.currentvalue?.prefix || "").replace(/[:=\s]+$/, "");
  label.append(prefix ? `${prefix} = ` : "");
  const value = document.createElement("output");
  label.append(value);
  const range = document.createElement("input");
  Object.assign(range, { type: "range", id: `${name}-range`, min: 0, max: steps.length - 1, step: 1, value: slider.active || 0 });
  const show = () => {
    const step = steps[range.value];
    value.textContent = step.label;
    range.setAttribute("aria-valuetext", step.label);
    if (step.method !== "skip") return window.Plotly[step.method || "restyle"](plot, ...step.args);
  };
  range.addEventListener("input", show);
  box.append(label, range);
  return { box, show };
}

// A narrow screen may arrange the panels differently: layout.meta.narrow holds what it changes, by path ("xaxis.domain").
function arranged(layout, narrow) {
  const result = structuredClone(layout);
  for (const [path, value] of Object.entries((narrow && layout.meta?.narrow) || {})) {
    const keys = path.split("."), last = keys.pop();
    keys.reduce((part, key) => (part[key] ??= {}), result)[last] = value;
  }
  return result;
}

// A point whose customdata is [i, j, …] stands for a position of each slider: a click on it moves them there.
function pick(plot, ranges) {
  plot.on("plotly_click", ({ points: [point] }) => {
    if (!Array.isArray(point?.customdata)) return;
    point.customdata.forEach((position, n) => {
      ranges[n].value = position;
      ranges[n].dispatchEvent(new Event("input"));
    });
  });
}

async function draw(plot) {
  const name = plot.dataset.figure;
  await script(`figures/${name}.js`);
  const { data, layout = {}, frames = [] } = window.guidedDescentFigures[name];
  const original = structuredClone(data);  // Plotly writes into what it is given
  const narrow = plot.clientWidth < 560;
  const { sliders = [], updatemenus, width, ...rest } = arranged(layout, narrow);
  const touch = matchMedia("(hover: none)").matches;  // there a drag scrolls the page, not the axes
  await window.Plotly.newPlot(plot, data, {
    ...rest,
    autosize: true,
    dragmode: touch ? false : rest.dragmode || "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 14 },
    margin: { l: narrow ? 52 : 64, r: 12, t: rest.title ? 44 : 12, b: 56 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...(narrow ? {} : rest.legend) },
  }, { responsive: true, displayModeBar: false, displaylogo: false, showTips: false });
  if (frames.length) await window.Plotly.addFrames(plot, frames);
  const recolour = () => window.Plotly.update(plot, inks(original), ink(layout));
  await recolour();
  const ranges = [];
  for (const [n, slider] of sliders.entries()) {
    const { box, show } = rangeFor(slider, plot, `${name}-${n}`);
    ranges.push(box.querySelector("input"));
    plot.after(box);
    await show();
  }
  pick(plot, ranges);
  new MutationObserver(recolour)
    .observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  plot.dataset.drawn = "true";
}

// Plotly is fetched when the first figure nears the screen; a figure is drawn when it does. Printing draws them all.
function figures() {
  const plots = [...document.querySelectorAll(".bd-article .gd-plotly")];
  let library = null;
  let queue = Promise.resolve();
  const near = new IntersectionObserver((entries) => entries.forEach((e) => e.isIntersecting && start(e.target)),
    { rootMargin: "900px 0px" });
  function start(plot) {
    near.unobserve(plot);
    if (plot.dataset.begun) return;
    plot.dataset.begun = "true";
    library ??= script("plotly.min.js");
    queue = queue.then(() => library).then(() => draw(plot));
  }
  plots.forEach((plot) => near.observe(plot));
  addEventListener("beforeprint", () => plots.forEach(start));
}

/* ---------------------------------------------------------------- folded code */

document.addEventListener("click", ({ target }) => {
  const toggle = target.closest?.(".gd-toggle");
  if (!toggle) return;
  toggle.setAttribute("aria-expanded", String(toggle.getAttribute("aria-expanded") !== "true"));
  focusable();
});

/* ---------------------------------------------------------------- reachable without a mouse */

// What scrolls inside its own box must be reachable with the keyboard.
function focusable() {
  for (const box of document.querySelectorAll(".bd-article :is(pre, div.math, .pst-scrollable-table-container, .gd-scroll)")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
}

// The theme's arrow in the list of pages has no words.
function labelled() {
  for (const arrow of document.querySelectorAll("summary:has(> .toctree-toggle)")) {
    arrow.ariaLabel = `Pages of “${arrow.closest("li").querySelector("a").textContent.trim()}”`;
  }
}

document.addEventListener("DOMContentLoaded", () => {
  figures();
  labelled();
  focusable();
  addEventListener("resize", focusable);
  window.MathJax?.startup?.promise?.then(focusable);
});
