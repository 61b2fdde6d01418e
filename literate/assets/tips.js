// Cards over references: what a link points at, shown beside it. An equation, a figure, an exercise, a theorem, a
// section's first lines, a paper, or what a name of the package is for. The target is read off this page, or off its own
// page, which is fetched once; from file:// a browser allows the first alone.
"use strict";

(() => {
  const pages = new Map(); // address -> promise of a document

  function page(address) {
    if (address === location.href.split("#")[0]) return Promise.resolve(document);
    if (!pages.has(address)) {
      const read = fetch(address).then((r) => (r.ok ? r.text() : Promise.reject(r.status)));
      pages.set(address, read.then((text) => new DOMParser().parseFromString(text, "text/html")));
    }
    return pages.get(address);
  }

  // What stands for a target: a copy of the part of its page that explains it.
  function excerpt(target) {
    const copy = (...elements) => {
      const box = document.createElement("div");
      box.append(...elements.filter(Boolean).map((element) => document.importNode(element, true)));
      return box;
    };
    if (target.matches("dt.sig")) {
      const said = [...target.parentElement.querySelectorAll(":scope > dd > p")];
      return copy(target, said.find((line) => !line.textContent.startsWith("Bases:")));
    }
    if (target.matches("dt")) return copy(target, target.nextElementSibling);
    if (target.matches("div.citation, [role=listitem]")) return copy(target);
    const block = target.closest("div.math, figure, table, div.admonition, div.proof, div.citation, div.cell");
    if (block) return copy(block.matches("div.cell") ? block.querySelector("figure") : block);
    const section = target.matches("section, h1, h2, h3, h4") ? target.closest("section") : target.nextElementSibling?.closest("section") ?? target.closest("section");
    return section && copy(section.querySelector("h1, h2, h3, h4"), section.querySelector(":scope > p"));
  }

  // A citation says all in its title: authors, title, journal, year, address.
  function paper(words) {
    const [reference, address] = words.split(/\s*URL:\s*/);
    const box = document.createElement("div");
    const line = document.createElement("p");
    line.textContent = reference.replace(/,?\s*(doi:\S+|arXiv:\S+)?\s*$/, "").replace(/\.?$/, ".");
    box.append(line);
    const found = address?.split(/,\s/)[0].replace(/\.$/, "");
    if (found?.startsWith("http")) {
      const to = document.createElement("a");
      to.href = found;
      to.textContent = found.replace(/^https?:\/\/(www\.)?/, "");
      box.append(to);
    }
    return box;
  }

  async function content(link) {
    if (link.dataset.paper) return paper(link.dataset.paper);
    const [address, anchor] = link.href.split("#");
    const from = await page(address);
    const target = anchor && from.getElementById(decodeURIComponent(anchor));
    const box = target && excerpt(target);
    if (!box) return null;
    // A copy: ids must stay unique, addresses are those of its own page, and what needs scripts is left out.
    for (const element of box.querySelectorAll(".gd-plotly, .gd-slider, .headerlink, .toggle-button, .copybtn, script, .gd-derived, mjx-assistive-mml")) element.remove();
    for (const element of box.querySelectorAll("[id]")) element.removeAttribute("id");
    for (const image of box.querySelectorAll("img[src]")) image.src = new URL(image.getAttribute("src"), address).href;
    return box.textContent.trim() || box.querySelector("img") ? box : null;
  }

  async function typeset(box) {
    if (!box.querySelector(".math:not(:has(mjx-container))")) return;
    if (!window.MathJax) { // a page without formulas
      await script("mathjax/config.js"); // script: from site.js
      await script("mathjax/startup.js");
    }
    await window.MathJax?.startup?.promise;
    await window.MathJax?.typesetPromise?.([box]);
  }

  let card = null;
  let wanted = null;
  let timer = 0;

  function place(link) {
    const at = link.getClientRects()[0] ?? link.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = card;
    const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
    const below = at.bottom + 8 + height < innerHeight || at.top < height + 8;
    card.style.left = `${left}px`;
    card.style.top = `${below ? at.bottom + 8 : at.top - height - 8}px`;
  }

  function later() {
    clearTimeout(timer);
    timer = setTimeout(hide, 180);
  }

  function hide() {
    clearTimeout(timer);
    card?.remove();
    card = wanted = null;
  }

  async function show(link) {
    hide();
    wanted = link;
    const box = await content(link).catch(() => null);
    if (!box || wanted !== link) return;
    card = document.createElement("div");
    card.className = "gd-tip";
    card.setAttribute("role", "tooltip");
    card.append(box);
    card.addEventListener("pointerenter", () => clearTimeout(timer)); // its link can be reached
    card.addEventListener("pointerleave", later);
    document.body.append(card);
    place(link);
    await typeset(card);
    if (wanted === link) place(link);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const here = location.href.split("#")[0];
    for (const link of document.querySelectorAll('.bd-article a[href*="#"]:not(.headerlink, .sd-stretched-link, .gd-quiet)')) {
      if (new URL(link.href).origin !== location.origin && !link.href.startsWith(here)) continue;
      if (link.title && /bibliography\.html#/.test(link.href)) {
        link.dataset.paper = link.title;
        link.removeAttribute("title"); // else the browser shows it a second time
      }
      // Not for touch, where a tap follows the link.
      link.addEventListener("pointerenter", (event) => {
        if (event.pointerType !== "mouse") return;
        clearTimeout(timer);
        timer = setTimeout(show, 200, link);
      });
      link.addEventListener("pointerleave", later);
      link.addEventListener("focus", () => link.matches(":focus-visible") && show(link));
      link.addEventListener("blur", hide);
    }
  });
  addEventListener("scroll", () => card && place(wanted), { passive: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
})();
