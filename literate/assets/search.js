// The search page: sections whose title or prose holds every word of the query; prose before the package's own pages.
"use strict";

(() => {
  const field = document.querySelector(".bd-search-container input[name=q]");
  const results = document.getElementById("search-results");
  const entries = window.guidedDescentSearch ?? [];
  const SHOWN = 30;

  // Letters without accents, one for one, so that a place in the folded text is the place in the text.
  const fold = (text) => Array.from(text, (c) => ({ ł: "l", Ł: "l", ø: "o", "’": "'" })[c] ?? c.normalize("NFD")[0]).join("").toLowerCase();
  // `kfac` finds K-FAC, and `quasi newton` finds quasi-Newton.
  const pattern = (word) => [...word.replace(/-/g, "")].map((c) => c.replace(/[\\^$.*+?()[\]{}|/]/, "\\$&")).join("[-_]?");
  // `damping` finds damped, too.
  const stem = (word) => word.replace(/(?<=.{4})(?:ing|ed|e?s)$/, "");
  for (const entry of entries) {
    entry.foldedTitle = fold(entry.title);
    entry.foldedText = fold(entry.text);
  }

  function find(query) {
    const words = fold(query).split(/[\s,;"]+/).filter((word) => word.replace(/-/g, ""));
    if (!words.length) return [];
    const starts = words.map((word) => new RegExp(`(?<![\\p{L}\\p{N}])${pattern(stem(word))}`, "gu"));
    const whole = new RegExp(`^${words.map(pattern).join("[\\s-]*")}$`, "u");
    const phrase = new RegExp(`(?<![\\p{L}\\p{N}])${words.map(pattern).join("[\\s-]+")}`, "u");
    const found = [];
    for (const entry of entries) {
      let score = 0;
      const all = starts.every((start) => {
        const inTitle = (entry.foldedTitle.match(start) ?? []).length;
        const inText = (entry.foldedText.match(start) ?? []).length;
        score += (inTitle ? 25 : 0) + 6 * Math.log2(1 + inText);
        return inTitle || inText;
      });
      if (!all) continue;
      if (whole.test(entry.foldedTitle)) score += 60;
      if (words.length > 1 && (phrase.test(entry.foldedTitle) || phrase.test(entry.foldedText))) score += 15;
      if (!entry.anchor && phrase.test(entry.foldedTitle)) score += 30; // a whole chapter on it
      if (entry.kind) score *= 0.3;
      found.push({ entry, score, starts });
    }
    found.sort((a, b) => b.score - a.score);
    const first = found.filter(({ entry }) => !entry.kind).slice(0, 3); // prose before the package
    return [...first, ...found.filter((hit) => !first.includes(hit))];
  }

  // Some twenty words around the first hit, with the hits marked.
  function snippet({ entry, starts }) {
    const at = Math.min(...starts.map((start) => { const n = entry.foldedText.search(start); return n < 0 ? Infinity : n; }));
    const from = at === Infinity || at < 90 ? 0 : entry.text.indexOf(" ", at - 80) + 1;
    let to = Math.min(entry.text.length, from + 220);
    if (to < entry.text.length) to = entry.text.lastIndexOf(" ", to);
    const part = entry.text.slice(from, to);
    const folded = entry.foldedText.slice(from, to);
    const marks = starts.flatMap((start) => [...folded.matchAll(start)].map((m) => [m.index, m.index + m[0].length])).sort((a, b) => a[0] - b[0]);
    const line = document.createElement("p");
    let done = 0;
    if (from) line.append("… ");
    for (const [a, b] of marks) {
      if (a < done) continue;
      const mark = document.createElement("mark");
      mark.textContent = part.slice(a, b);
      line.append(part.slice(done, a), mark);
      done = b;
    }
    line.append(part.slice(done), to < entry.text.length ? " …" : "");
    return line;
  }

  function show() {
    const query = field.value.trim();
    const found = find(query);
    const list = document.createElement("ul");
    list.className = "search";
    for (const hit of found.slice(0, SHOWN)) {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `${hit.entry.page}.html${hit.entry.anchor ? `#${hit.entry.anchor}` : ""}`;
      link.textContent = hit.entry.title;
      const where = document.createElement("span");
      where.className = "gd-where";
      where.textContent = hit.entry.anchor ? (hit.entry.kind ? `package · ${hit.entry.in}` : hit.entry.in) : hit.entry.kind || hit.entry.in.match(/^\d\d|/)[0];
      item.append(link, " ", where, snippet(hit));
      list.append(item);
    }
    const count = document.createElement("p");
    count.className = "gd-where";
    if (query) count.textContent = found.length ? `${found.length} section${found.length > 1 ? "s" : ""}${found.length > SHOWN ? `, the first ${SHOWN} of them` : ""}` : `Nothing holds “${query}”. Fewer words, or the beginning of one, find more.`;
    results.replaceChildren(count, list);
  }

  field.form.addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", () => {
    show();
    history.replaceState(null, "", `?q=${encodeURIComponent(field.value)}`);
  });
  field.value = new URLSearchParams(location.search).get("q") ?? "";
  field.focus();
  show();
})();
