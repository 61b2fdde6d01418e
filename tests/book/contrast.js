// For each interactive figure, the contrast of its curves with the page.
() => {
  const levels = (colour) => colour.match(/[\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const light = (colour) => levels(colour).reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0.05);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const contrast = (colour) => Math.max(light(colour), page) / Math.min(light(colour), page);
  return [...document.querySelectorAll(".bd-article .gd-plotly")].map((plot) =>
    [...plot.querySelectorAll(".scatterlayer .trace")]
      .map((trace) => trace.querySelector("path.js-line, path.point"))
      .filter(Boolean)
      .map((path) => contrast(getComputedStyle(path)[path.matches(".js-line") ? "stroke" : "fill"])));
}
