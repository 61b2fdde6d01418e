// What a reader sees of a page, measured: tests/book/test_browser.py compares it with the rules of the book.
() => {
  const seen = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && e.getBoundingClientRect().height > 0;
  const all = (selector) => [...document.querySelectorAll(`.bd-article ${selector}`)].filter(seen);
  const height = (list) => Math.round(list.reduce((sum, e) => sum + e.getBoundingClientRect().height, 0));
  const lines = (e) => e.innerText.trim().split("\n");
  const named = (e, what) => `${lines(e)[0].slice(0, 60)} … ${what}`;
  const beyond = (e) => e.scrollWidth - e.clientWidth;
  const size = (e) => parseFloat(getComputedStyle(e).fontSize);
  const code = all("div.cell_input pre");
  const prose = all("section > :is(p, ul, ol, dl, blockquote, div.math, table, div.admonition, div.proof, div.exercise, div.pst-scrollable-table-container, h1, h2, h3)")
    .filter((e) => !e.closest(".cell, .gd-check, .gd-export") && !e.parentElement.closest("div.admonition"));
  const figures = all(":is(figure, div.cell_output img, .gd-plotly, .gd-figure)");
  const equations = all("div.math").map((e) => {
    const over = Math.max(...[e, ...e.querySelectorAll("mjx-container")].map(beyond));
    return over > 2 ? `${e.id || e.querySelector("[id]")?.id || e.closest("section").id}: ${over} px too wide` : "";
  });
  // Letters of an SVG are paths: their size is in the transform of the group that holds them.
  const letters = all(".gd-figure").flatMap((figure) => {
    const groups = [...figure.querySelectorAll('.gd-whole g[transform*="scale"]')];
    const sizes = groups.map((g) => g.getAttribute("transform").match(/scale\(([\d.]+) -\1\)/)).filter(Boolean).map((m) => 100 * m[1]);
    return [...figure.children].filter(seen).map((svg) => {
      const unit = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return { figure: figure.closest("figure")?.id || figure.ariaLabel.slice(0, 60), least: unit * Math.min(...sizes), most: unit * Math.max(...sizes) };
    });
  });
  const buttons = all(".admonition.toggle > .admonition-title").filter((title) => {
    const button = title.querySelector("button").getBoundingClientRect();
    const box = title.getBoundingClientRect();
    const words = [...title.childNodes].filter((node) => node.nodeName !== "BUTTON").flatMap((node) => {
      const range = document.createRange();
      range.selectNode(node);
      return [...range.getClientRects()];
    });
    const inside = button.top >= box.top - 1 && button.bottom <= box.bottom + 1 && button.right <= box.right + 1;
    const over = words.some((word) => word.right > button.left && word.bottom > button.top && word.top < button.bottom);
    return !inside || over;
  });
  return {
    code: height(code),
    prose: height(prose),
    first_figure: figures.length ? Math.round(figures[0].getBoundingClientRect().top + scrollY) : null,
    long_cells: code.filter((e) => lines(e).length > 30).map((e) => named(e, `${lines(e).length} lines`)),
    wide_cells: code.filter((e) => beyond(e) > 1).map((e) => named(e, `${beyond(e)} px too wide`)),
    wide_equations: equations.filter(Boolean),
    letters,
    pictures: all(':is(figure, div.cell_output) img').map((e) => e.closest("figure")?.id || e.alt.slice(0, 60)),
    maths: { display: all('mjx-container[display="true"]').map(size)[0], inline: all('p mjx-container:not([display="true"])').map(size)[0] },
    buttons: buttons.map((title) => title.innerText),
  };
}
