// The race on the front page. Every path was run by the package when the book was woven (see literate/race.py): this
// chooses among them, draws and plays them. Mouse, touch and keyboard; no library.
"use strict";

(() => {
  const loaded = {};
  window.guidedDescentRace = (name, race) => (loaded[name] = race);
  const INK = {
    light: { sgd: "#4d555e", momentum: "#005a9c", adam: "#b84a00", newton: "#00694d", kfac: "#a2397a", low: [253, 253, 251], high: [196, 213, 228], line: "rgba(40,70,100,.22)", goal: "#1c2126", plate: "#ffffff" },
    dark: { sgd: "#c3cbd3", momentum: "#6bb8ec", adam: "#f2a065", newton: "#4fd0a5", kfac: "#ee9acb", low: [50, 64, 78], high: [20, 26, 33], line: "rgba(190,215,240,.16)", goal: "#ffffff", plate: "#12171c" },
  };
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const ways = (scale) => ({ 0.25: "a quarter of", 0.5: "half of", 1: "", 2: "twice", 4: "four times" })[scale];

  async function setUp(box) {
    const names = box.dataset.landscapes.split(" ");
    const ink = () => INK[document.documentElement.dataset.theme === "dark" ? "dark" : "light"];
    let race = null; // what is on show
    let start = Number(box.dataset.start ?? 0);
    let scale = 2;
    let time = Infinity; // steps shown; all of them when nothing plays
    let playing = 0;
    let ground = null;

    const picks = names.map((name) => element("button", { type: "button", className: "gd-pick", onclick: () => choose(name) }, name));
    const canvas = element("canvas", { width: 10, height: 10 });
    canvas.setAttribute("role", "img");
    const handle = element("button", { type: "button", className: "gd-handle" });
    const field = element("div", { className: "gd-field" }, canvas, handle);
    const range = element("input", { type: "range", min: 0, max: 4, step: 1, value: scale, id: "gd-race-step" });
    const label = element("label", { htmlFor: range.id });
    const play = element("button", { type: "button", className: "gd-play", onclick: () => (playing ? stop() : run()) });
    const words = element("p", { className: "gd-words" });
    const body = element("tbody");
    const table = element("table", { className: "gd-standing" }, element("caption", { textContent: "Who arrives, and when" }), body);
    table.setAttribute("aria-live", "polite");
    const picker = element("div", { className: "gd-picks" }, ...picks);
    picker.setAttribute("role", "group");
    picker.setAttribute("aria-label", "Landscape");
    box.replaceChildren(picker, element("div", { className: "gd-stage" }, element("div", {}, field, element("div", { className: "gd-controls" }, play, label, range)), element("div", { className: "gd-side" }, table, words)));

    async function choose(name) {
      if (!loaded[name]) await script(`race/${name}.js`); // script: from site.js
      race = loaded[name];
      picks.forEach((pick, n) => {
        pick.setAttribute("aria-pressed", String(names[n] === name));
        if (loaded[names[n]]) pick.textContent = loaded[names[n]].title;
      });
      words.textContent = race.words;
      start = race.start;
      scale = race.scales.indexOf(1);
      range.value = scale;
      ground = null;
      stop();
    }

    // ---- geometry: the store's units have their origin below on the left
    const at = ([x, y]) => [(x / race.units) * canvas.width, (1 - y / race.units) * canvas.height];
    const place = (n) => [((n % race.columns) + 0.5) / race.columns, (Math.floor(n / race.columns) + 0.5) / race.rows].map((v) => v * race.units);
    const target = () => {
      const [left, right, bottom, top] = race.frame;
      return [((race.goal[0] - left) / (right - left)) * race.units, ((race.goal[1] - bottom) / (top - bottom)) * race.units];
    };

    function path(method) {
      const packed = method.runs[scale][start];
      const points = [];
      let [t, x, y] = [0, 0, 0];
      for (let n = 1; n < packed.length; n += 3) points.push([(t += packed[n]), (x += packed[n + 1]), (y += packed[n + 2])]);
      const [, lastX, lastY] = points[points.length - 1];
      const out = Math.max(Math.abs(lastX / race.units - 0.5), Math.abs(lastY / race.units - 0.5)) > 0.6;
      return { arrival: packed[0], points, out: out && packed[0] > race.steps };
    }

    // ---- drawing
    function terrain() {
      const { width, height } = canvas;
      const image = new ImageData(width, height);
      const { low, high } = ink();
      const [columns, rows] = [race.wide, race.high];
      const bands = 14;
      for (let j = 0; j < height; j++) {
        const v = (1 - j / (height - 1)) * (rows - 1);
        const y = Math.min(rows - 2, Math.floor(v));
        for (let i = 0; i < width; i++) {
          const u = (i / (width - 1)) * (columns - 1);
          const x = Math.min(columns - 2, Math.floor(u));
          const h = (a, b) => race.heights[b * columns + a];
          const level = (h(x, y) * (x + 1 - u) + h(x + 1, y) * (u - x)) * (y + 1 - v) + (h(x, y + 1) * (x + 1 - u) + h(x + 1, y + 1) * (u - x)) * (v - y);
          const band = Math.min(1, Math.floor((level / 100) * bands) / (bands - 1));
          for (let c = 0; c < 3; c++) image.data[4 * (j * width + i) + c] = low[c] + (high[c] - low[c]) * band;
          image.data[4 * (j * width + i) + 3] = 255;
        }
      }
      return image;
    }

    function draw() {
      if (!race) return;
      const ratio = Math.min(2, devicePixelRatio || 1);
      const width = Math.round(field.clientWidth * ratio);
      if (canvas.width !== width || !ground) {
        canvas.width = width;
        canvas.height = Math.round((width * 5) / 7);
        ground = terrain();
      }
      const pen = canvas.getContext("2d");
      const colors = ink();
      pen.putImageData(ground, 0, 0);
      pen.lineJoin = pen.lineCap = "round";
      const [gx, gy] = at(target());
      pen.strokeStyle = colors.goal;
      pen.lineWidth = 1.5 * ratio;
      pen.beginPath();
      const [left, right, bottom, top] = race.frame;
      const radius = race.near * Math.hypot(right - left, top - bottom);
      pen.ellipse(gx, gy, (radius / (right - left)) * canvas.width, (radius / (top - bottom)) * canvas.height, 0, 0, 7);
      pen.stroke();
      for (const method of race.methods) {
        const { points } = path(method);
        pen.strokeStyle = pen.fillStyle = colors[method.key];
        pen.lineWidth = 2.2 * ratio;
        pen.beginPath();
        let head = at(points[0].slice(1));
        pen.moveTo(...head);
        for (let n = 1; n < points.length; n++) {
          const [a, b] = [points[n - 1], points[n]];
          if (a[0] >= time) break;
          const part = Math.min(1, (time - a[0]) / (b[0] - a[0]));
          head = at([a[1] + (b[1] - a[1]) * part, a[2] + (b[2] - a[2]) * part]);
          pen.lineTo(...head);
        }
        pen.globalAlpha = 0.9;
        pen.stroke();
        pen.globalAlpha = 1;
        pen.beginPath();
        pen.arc(...head, 4.5 * ratio, 0, 7);
        pen.fill();
        pen.strokeStyle = colors.plate;
        pen.lineWidth = ratio;
        pen.stroke();
      }
      const [x, y] = place(start);
      handle.style.left = `${x / race.units * 100}%`;
      handle.style.top = `${(1 - y / race.units) * 100}%`;
    }

    function standing() {
      const found = race.methods.map((method) => ({ method, ...path(method) }));
      const shown = (f) => f.arrival <= race.steps && f.arrival <= time;
      const order = [...found].sort((a, b) => a.arrival - b.arrival || a.out - b.out);
      body.replaceChildren(...order.map((f) => {
        const dot = element("span", { className: "gd-dot" });
        dot.style.background = ink()[f.method.key];
        const result = shown(f) ? `${f.arrival} step${f.arrival === 1 ? "" : "s"}` : time < race.steps && !(f.out && f.points.at(-1)[0] <= time) ? "on its way" : f.out ? "leaves the map" : `not in ${race.steps}`;
        const name = element("a", { href: f.method.page, textContent: f.method.name, className: "gd-quiet" });
        const row = element("tr", {}, element("td", {}, dot, name), element("td", { textContent: result }));
        row.title = `step ${Number((f.method.step * race.scales[scale]).toPrecision(2))}${f.method.with ? `, ${f.method.with}` : ""}`;
        if (shown(f)) row.className = "gd-in";
        return row;
      }));
      const way = ways(race.scales[scale]);
      label.textContent = way ? `${way} the best step` : "the best step";
      range.setAttribute("aria-valuetext", label.textContent);
      handle.setAttribute("aria-label", `Start: column ${(start % race.columns) + 1} of ${race.columns}, row ${Math.floor(start / race.columns) + 1} of ${race.rows} from below. Drag it, or use the arrow keys.`);
      canvas.setAttribute("aria-label", `${race.title}: ${order.map((f) => `${f.method.name} ${f.arrival <= race.steps ? `arrives after ${f.arrival} steps` : f.out ? "leaves the map" : "does not arrive"}`).join(", ")}.`);
    }

    // ---- playing
    const show = () => { standing(); draw(); };
    function stop() {
      cancelAnimationFrame(playing);
      playing = 0;
      time = Infinity;
      play.textContent = "Play";
      if (race) show();
    }
    function run() {
      const last = Math.min(race.steps, Math.max(...race.methods.map((method) => path(method).arrival)) + 1);
      const seconds = 2.5 + last / 40;
      const begun = performance.now();
      play.textContent = "Stop";
      let told = -1;
      const frame = (now) => {
        const u = (now - begun) / 1000 / seconds;
        if (u >= 1) return stop();
        time = last * u ** 1.8; // the first steps slowly: some arrive in one
        if (Math.floor(time) !== told) { told = Math.floor(time); standing(); }
        draw();
        playing = requestAnimationFrame(frame);
      };
      playing = requestAnimationFrame(frame);
    }

    // ---- moving the start and the step
    function move(n) {
      if (n === start || !Number.isFinite(n)) return;
      start = n;
      stop();
    }
    function drag(event) {
      const area = field.getBoundingClientRect();
      const column = Math.max(0, Math.min(race.columns - 1, Math.floor(((event.clientX - area.left) / area.width) * race.columns)));
      const row = Math.max(0, Math.min(race.rows - 1, Math.floor((1 - (event.clientY - area.top) / area.height) * race.rows)));
      move(row * race.columns + column);
    }
    handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
    handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && drag(event));
    canvas.addEventListener("click", drag);
    handle.addEventListener("keydown", (event) => {
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
      if (!dx && !dy) return;
      event.preventDefault();
      const column = (start % race.columns) + dx;
      const row = Math.floor(start / race.columns) + dy;
      if (column >= 0 && column < race.columns && row >= 0 && row < race.rows) move(row * race.columns + column);
    });
    range.addEventListener("input", () => { scale = Number(range.value); stop(); });
    new ResizeObserver(draw).observe(field);
    new MutationObserver(() => { ground = null; if (race) show(); }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });

    for (const pick of picks) pick.textContent = box.dataset[`title${pick.textContent.replace(/^./, (c) => c.toUpperCase())}`] ?? pick.textContent;
    await choose(names[0]);
    box.dataset.ready = "true";
    if (!still.matches) run();
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".gd-race").forEach(setUp));
})();
