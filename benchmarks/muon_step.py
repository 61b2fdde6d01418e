"""Steps of Muon against torch's and pytorch_optimizer's on the matrices of step_time.py, as ratios of one run.

    python benchmarks/muon_step.py [--rounds N]

The 10.92 million parameters' matrices get fixed gradients. Every round times each candidate once, in turn.
"""

import argparse
import statistics

import pytorch_optimizer
import torch
from step_time import Candidate

import guided_descent as gd


def matrices(params):
    return [p for p in params if p.dim() == 2]


CANDIDATES = {
    "torch Muon": lambda p: torch.optim.Muon(matrices(p)),
    "pytorch_optimizer Muon": lambda p: pytorch_optimizer.Muon([{"params": matrices(p), "use_muon": True}]),
    "Muon": lambda p: gd.Muon(matrices(p)),
    "Muon, foreach": lambda p: gd.Muon(matrices(p), engine="foreach"),
    "Muon, keller": lambda p: gd.Muon(matrices(p), preset="keller"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    made = {name: Candidate(build) for name, build in CANDIDATES.items()}
    for _ in range(options.rounds):
        for candidate in made.values():
            candidate.once()
    medians = {name: statistics.median(candidate.times) for name, candidate in made.items()}
    best = min(x for name, x in medians.items() if not name.startswith("Muon"))
    print("| method | median ms | over the best peer's |")
    print("|---|---|---|")
    for name, x in medians.items():
        print(f"| {name} | {x * 1e3:.0f} | {x / best:.2f} |")


if __name__ == "__main__":
    main()
