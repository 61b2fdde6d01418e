// Cards over references: sphinx-tippy prepares their content and calls tippy(link, {content, onShow}); this shows them.
// (tippy.js itself is not on PyPI, and a page of ours asks no other host for anything.)
"use strict";

window.tippy = function (link, { content, onShow }) {
  let card = null;
  let timer = 0;

  function place() {
    const at = link.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = card;
    const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
    const below = at.bottom + 8 + height < innerHeight || at.top < height + 8;
    card.style.left = `${left}px`;
    card.style.top = `${below ? at.bottom + 8 : at.top - height - 8}px`;
  }

  async function show() {
    hide();
    card = document.createElement("div");
    card.className = "gd-tip";
    card.setAttribute("role", "tooltip");
    card.innerHTML = content;
    // A copy on the page: ids must stay unique, and a figure that needs scripts shows its caption alone.
    card.querySelectorAll("[id]").forEach((element) => element.removeAttribute("id"));
    card.querySelectorAll(".gd-plotly, .gd-slider, .headerlink, .toggle-button, script").forEach((element) => element.remove());
    if (!card.textContent.trim() && !card.querySelector("img")) return (card = null);
    document.body.append(card);
    place();
    if (onShow && window.MathJax?.typesetPromise) {
      await window.MathJax.typesetPromise([card]);
      if (card) place();
    }
  }

  function hide() {
    clearTimeout(timer);
    card?.remove();
    card = null;
  }

  // Not for touch, where a tap follows the link.
  link.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") timer = setTimeout(show, 200);
  });
  link.addEventListener("pointerleave", hide);
  link.addEventListener("focus", () => link.matches(":focus-visible") && show());
  link.addEventListener("blur", hide);
  addEventListener("scroll", () => card && place(), { passive: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
};
