"""Steps of Muon against torch's and pytorch_optimizer's on the matrices of step_time.py, as ratios of one run.

    python benchmarks/muon_step.py [--rounds N]

The 10.92 million parameters' matrices get fixed gradients. Every round times each candidate once, in turn.

What can be reached? An iteration of five steps is fifteen products of a matrix m×(rm): 5 (4r + 2) m³ operations. The
last row times those products alone, in the type that the iteration takes on this machine (bfloat16 where the CPU has
units for it, torch's only choice), into memory that is there. With such units it is .6 to .7 of torch's step, and no
iteration of five steps can be faster: the Gram form, 4r + 34, is not accurate enough in bfloat16. Without them torch's
bfloat16 products take four to five times as long as ours in single precision, and the Gram form counts.
"""

import argparse
import statistics
import time

import pytorch_optimizer
import torch
from step_time import Candidate, parameters

import guided_descent as gd
from guided_descent.muon import _HALF


def matrices(params):
    return [p for p in params if p.dim() == 2]


CANDIDATES = {
    "torch Muon": lambda p: torch.optim.Muon(matrices(p)),
    "pytorch_optimizer Muon": lambda p: pytorch_optimizer.Muon([{"params": matrices(p), "use_muon": True}]),
    "Muon": lambda p: gd.Muon(matrices(p)),
    "Muon, foreach": lambda p: gd.Muon(matrices(p), engine="foreach"),
    "Muon, keller": lambda p: gd.Muon(matrices(p), preset="keller"),
}


class Products:
    """Fifteen products for each matrix, and nothing else."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        dtype = torch.bfloat16 if _HALF["cpu"] else torch.float32
        wide = [(p if len(p) <= p.shape[1] else p.T).detach().to(dtype).contiguous() for p in matrices(params)]
        self.work = [(X, X.new_empty(len(X), len(X)), torch.empty_like(X)) for X in wide]
        self.times: list[float] = []

    def once(self) -> None:
        start = time.perf_counter()
        for X, A, Y in self.work:
            for _ in range(5):
                torch.mm(X, X.mT, out=A)
                torch.mm(A, A, out=A.new_empty(A.shape))
                torch.mm(A, X, out=Y)
        self.times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    made = {name: Candidate(build) for name, build in CANDIDATES.items()}
    made["Muon's products alone"] = Products(parameters())
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
