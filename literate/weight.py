"""What a page need not carry: icons nobody sees, and the parts of MathJax that no formula uses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

# One file of MathJax each; extensions (`\\cancel`, …) are fetched by the formula that needs them.
MATHJAX = ["startup.js", "core.js", "input/tex.js", "output/chtml.js", "output/chtml/fonts", "a11y/assistive-mml.js",
           "input/tex/extensions"]  # fmt: skip


def copy_mathjax(source: Path, static: Path, config: dict[str, Any]) -> None:
    """Put the parts that are used beside the pages, and the settings, for pages that load it late."""
    for part in MATHJAX:
        target = static / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        copy: Any = shutil.copytree if (source / part).is_dir() else shutil.copy2
        copy(source / part, target)
    (static / "mathjax/config.js").write_text(f"window.MathJax = {json.dumps(config)};\n", "utf-8")


def keep_used_icons(site: Path) -> None:
    """Reduce FontAwesome to the icons that the pages and their style sheets name: no script, and a font of a few kB."""
    home = next(iter((site / "_static/vendor/fontawesome").glob("*")), None)
    if home is None:
        return
    pages = [path for path in site.rglob("*.html") if "_static" not in path.relative_to(site).parts]
    texts = {path: path.read_text("utf-8") for path in pages}
    scripts = [path.read_text("utf-8") for path in (site / "_static").rglob("*.js") if home not in path.parents]
    used = set(re.findall(r"\bfa-[a-z0-9-]+", "".join([*texts.values(), *scripts])))
    sheet = (home / "css/all.min.css").read_text("utf-8")
    seen = "".join(path.read_text("utf-8") for path in (site / "_static").rglob("*.css") if home not in path.parents)
    points = {int(code, 16) for code in re.findall(r'\\(f[0-9a-f]{3})\b', seen)}

    def icon(match: re.Match[str]) -> str:
        names = [name for name in match[1].split(",") if re.sub(r"^\.|:.*$", "", name) in used]
        if names and (code := re.fullmatch(r"\\([0-9a-f]+)", match[2])):
            points.add(int(code[1], 16))
        return f'{",".join(names)}{{content:"{match[2]}"}}' if names else ""

    sheet = re.sub(r"@font-face\{[^}]*\}", "", sheet)
    sheet = re.sub(r'((?:\.fa-[a-z0-9-]+:{1,2}(?:before|after),?)+)\{content:"([^"]*)"\}', icon, sheet)
    faces = [("Font Awesome 6 Free", 900, "fa-solid-900"), ("Font Awesome 6 Free", 400, "fa-regular-400"),
             ("Font Awesome 6 Brands", 400, "fa-brands-400")]  # fmt: skip
    for family, heaviness, name in faces:
        if subset(home / f"webfonts/{name}.ttf", points, home / f"webfonts/{name}.woff"):
            sheet += (f'@font-face{{font-family:"{family}";font-weight:{heaviness};font-display:block;'
                      f'src:url(../webfonts/{name}.woff) format("woff")}}')
    (home / "css/all.min.css").write_text(sheet, "utf-8")
    shutil.rmtree(home / "js")
    for path in [*home.glob("webfonts/*.ttf"), *home.glob("webfonts/*.woff2")]:
        path.unlink()
    for path, text in texts.items():
        lean = re.sub(r'\n?<link rel="preload" as="font"[^>]*vendor/fontawesome[^>]*>', "", text)
        lean = re.sub(r'\s*<script src="[^"]*vendor/fontawesome[^"]*"></script>', "", lean)
        path.write_text(lean, "utf-8")


def subset(font: Path, points: set[int], target: Path) -> bool:
    """Write the glyphs of these code points, and nothing where the font has none of them."""
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    with TTFont(font) as full:
        wanted = points & full.getBestCmap().keys()
        if not wanted:
            return False
        cutter = Subsetter(Options(layout_features=[], hinting=False, notdef_outline=True, recalc_timestamp=False))
        cutter.populate(unicodes=wanted)
        cutter.subset(full)
        full.flavor = "woff"
        full.save(target)
    return True
