"""The race of chapter 15 at all horizons: final loss of the digits autoencoder under seven schedules.

    python benchmarks/schedules.py [--horizons 100 300 900] [--betas 0.7 0.8 0.9] [--seeds 10]

Runs the code of the chapter itself (its cells that define ``compete`` and ``best``). Prints, for each horizon, schedule
and beta_1, the mean loss at the best rate, that rate, and the losses over the grid. All of it: some 40 minutes on one
thread.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jupytext
import torch
from torch.optim.lr_scheduler import LambdaLR

import guided_descent as gd
from guided_descent.problems import digits
from guided_descent.schedules import constant, cosine, inverse_sqrt, linear, power_cool, warmup, wsd

CHAPTER = Path(__file__).parents[1] / "chapters" / "15_schedules.md"


def harness() -> dict:
    names = {"torch": torch, "gd": gd, "digits": digits, "LambdaLR": LambdaLR}
    for cell in jupytext.read(CHAPTER).cells:
        if cell.cell_type == "code" and "def compete(" in cell.source:
            exec(cell.source, names)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="*", default=[100, 300, 900])
    parser.add_argument("--betas", type=float, nargs="*", default=[0.7, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    run = harness()
    exponents = [k / 2 for k in range(7, 16)]
    rates = [2.0**-k for k in exponents]
    print("horizon  schedule      beta_1  loss   log2 lr   over the grid, from 2^-3.5")
    for T in options.horizons:
        for name, piece in {
            "constant": constant(),
            "1/sqrt t": inverse_sqrt(max(1, T // 10)),
            "WSD": wsd(),
            "WSD, 1-sqrt": wsd(shape="1-sqrt"),
            "cosine": cosine(),
            "linear": linear(),
            "power 1.2": power_cool(),
        }.items():
            schedule = (warmup(0.1) >> piece).over(T)
            for beta in options.betas:
                seeds = range(100, 100 + options.seeds)
                final = run["compete"](lambda g, b=beta: run["adam"](g, b), schedule, T, rates, seeds).mean(1)
                k = int(final.argmin())
                grid = " ".join(f"{value:.3f}" for value in final.tolist())
                print(f"{T:7}  {name:12}  {beta:6}  {final[k]:.3f}  {-exponents[k]:7}   {grid}", flush=True)


if __name__ == "__main__":
    main()
