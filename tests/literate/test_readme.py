"""The README is true: its chapter works as printed, and its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_chapter_in_the_readme_works_as_printed(tmp_path):
    for name in ("_config.yml", "_toc.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "guided_descent", tmp_path / "guided_descent")
    (tmp_path / "chapters").mkdir()
    for path in ROOT.glob("chapters/*.*"):
        if re.match(r"(01|23)_.*\.md|references\.bib", path.name):
            shutil.copy(path, tmp_path / "chapters")
    (printed,) = re.findall(r"^````markdown\n(.*?)^````$", README, re.DOTALL | re.MULTILINE)
    (name,) = re.findall(r"`chapters/(\w+)\.md`:", README)
    (tmp_path / f"chapters/{name}.md").write_text(printed, "utf-8")

    def literate(*arguments):
        command = [sys.executable, "-m", "literate", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    woven = literate("weave", name, "--force")
    assert woven.returncode == 0, woven.stderr
    assert "✓ (eq-sign)" in (tmp_path / f"chapters/{name}.ipynb").read_text("utf-8")
    assert [line for line in literate("check").stdout.splitlines() if name in line and "_toc.yml" not in line] == []


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", README.split("````markdown")[0], re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    exec("\n".join(blocks), {})


def test_links_into_the_repository_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for name in re.findall(r"blob/colab/(chapters/\w+\.ipynb)", README):
        assert (ROOT / name).exists(), name
    for path in ROOT.glob("chapters/[0-9][0-9]_*.md"):
        assert path.name in README, f"{path.name} is not in the README's table"
