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

// Figures sit on the page's own background, so their ink follows the theme.
function ink(layout) {
  const [text, grid] = dark() ? ["#ced6dd", "#3b444c"] : ["#323232", "#dfe3e6"];
  const changes = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": text, "legend.bgcolor": "rgba(0,0,0,0)" };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).concat("xaxis", "yaxis")) {
    Object.assign(changes, { [`${axis}.gridcolor`]: grid, [`${axis}.zerolinecolor`]: grid, [`${axis}.linecolor`]: text, [`${axis}.color`]: text });
  }
  return changes;
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

async function draw(plot) {
  const name = plot.dataset.figure;
  await script(`figures/${name}.js`);
  const { data, layout = {}, frames = [] } = window.guidedDescentFigures[name];
  const { sliders = [], updatemenus, width, ...rest } = layout;
  const narrow = plot.clientWidth < 560;
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
  await window.Plotly.relayout(plot, ink(layout));
  for (const [n, slider] of sliders.entries()) {
    const { box, show } = rangeFor(slider, plot, `${name}-${n}`);
    plot.after(box);
    await show();
  }
  new MutationObserver(() => window.Plotly.relayout(plot, ink(layout)))
    .observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  plot.dataset.drawn = "true";
}

async function figures() {
  const plots = [...document.querySelectorAll(".bd-article .gd-plotly")];
  if (!plots.length) return;
  await script("plotly.min.js");
  for (const plot of plots) await draw(plot);
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

document.addEventListener("DOMContentLoaded", () => {
  figures();
  focusable();
  addEventListener("resize", focusable);
  window.MathJax?.startup?.promise?.then(focusable);
});
