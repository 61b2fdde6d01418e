"""Chapter 13's experiment on ten seeds that its text has not seen: where the best learning rate lies.

``python benchmarks/modular_transfer.py`` (some minutes) runs the chapter's own cells on seeds 100 to 109, writes
``modular_transfer.json`` beside this file and prints the claims of the chapter, seed by seed.
"""

import json
import re
from pathlib import Path

import torch
from torch import nn

import guided_descent.modular as modular

HERE = Path(__file__).parent
CHAPTER = HERE.parent / "chapters" / "13_modular_norm.md"
SEEDS = range(100, 110)


def cells() -> dict:
    """The names of the chapter's set-up and of its experiment."""
    names = {**vars(modular)}
    found = re.findall(r"```\{code-cell\} python\n(?:---\n.*?\n---\n)?(.*?)```", CHAPTER.read_text(), re.DOTALL)
    for cell in found:
        if "import matplotlib.pyplot" in cell or "def experiment(" in cell:
            exec(cell, names)
            names |= {"identity": modular.Bond(nn.Identity()), "relu": modular.Bond(torch.relu)}
    return names


def main() -> None:
    names, results = cells(), {}
    torch.set_flush_denormal(True)

    def where(method, width, depth, branches):
        octaves, losses = names["sweep"](method, width, depth, branches, seeds=SEEDS)
        try:
            of_mean = names["best"](losses.mean(1), octaves)
            each = [names["best"](losses[:, k], octaves) for k in range(len(SEEDS))]
        except AssertionError as error:
            raise SystemExit(f"{method} {width} {depth} {branches}: {error}\n{losses}") from None
        return {"mean": of_mean, "seeds": each, "losses": losses.amin(0).tolist()}

    for branches in (False, True):
        for method in ("modular", "muon", "adam"):
            for depth in (1, 4, 12):
                key = f"{'residual' if branches else 'plain'} {method} depth {depth}"
                results[key] = where(method, 32, depth, branches)
                print(f"{key:>28} {results[key]['mean']:6.2f}", flush=True)
    for method in ("modular", "frobenius", "sign", "adam"):
        for width in (12, 48, 192):
            key = f"residual {method} width {width}"
            results[key] = where(method, width, 2, True)
            print(f"{key:>28} {results[key]['mean']:6.2f}", flush=True)
    rounded = {
        k: {n: torch.tensor(x).mul(1000).round().div(1000).tolist() for n, x in v.items()} for k, v in results.items()
    }
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rounded.items()]
    (HERE / "modular_transfer.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def drift(name, last, first):
        return [
            b - a for a, b in zip(results[f"{name} {first}"]["seeds"], results[f"{name} {last}"]["seeds"], strict=True)
        ]

    for kind in ("plain", "residual"):
        for method in ("modular", "muon", "adam"):
            d = drift(f"{kind} {method} depth", 12, 1)
            print(f"{kind:>9} {method:>9}, depth 1 to 12: {min(d):5.2f} to {max(d):5.2f} octaves")
    for method in ("modular", "frobenius", "sign", "adam"):
        d = drift(f"residual {method} width", 192, 12)
        loss = results[f"residual {method} width 192"]["losses"]
        print(f"{method:>19}, width 12 to 192: {min(d):5.2f} to {max(d):5.2f} octaves", end="; ")
        print(f"loss {min(loss):.3f} to {max(loss):.3f}")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main()
