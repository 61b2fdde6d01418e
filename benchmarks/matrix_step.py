"""A rule for matrices: stacked against one after another, and how evenly turns spread the work; ratios of one run.

    python benchmarks/matrix_step.py [--rounds N]

Muon's and SOAP's examples of chapter 23 step equal matrices, as ``engine="loop"`` and as ``engine="foreach"``, which
stacks what has one shape. Every round times each candidate once, in turn. SOAP renews each basis once in ten steps:
the slowest of the ten places of a period, each by its median, stands over the median of all.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

from guided_descent.core import Optimizer
from guided_descent.examples import PlainMuon as Muon
from guided_descent.examples import PlainSOAP as SOAP

SETS = {"64 of 64×64": (64, 64), "16 of 256×256": (16, 256), "4 of 1024×1024": (4, 1024)}
EVERY = 10


class Candidate:
    """An optimizer on some equal matrices with fixed gradients, and the times of its steps."""

    def __init__(self, cls: type[Optimizer], count: int, size: int, engine: str) -> None:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(size, size, generator=generator).requires_grad_() for _ in range(count)]
        for p in params:
            p.grad = torch.randn(size, size, generator=generator)
        self.optimizer, self.times = cls(params, engine=engine), []
        self.optimizer.step()

    def once(self) -> None:
        start = time.perf_counter()
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="a multiple of ten")
    options = parser.parse_args()
    if options.rounds < EVERY or options.rounds % EVERY:
        parser.error(f"--rounds {options.rounds} does not see each turn equally often; pass a multiple of {EVERY}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| matrices | rule | loop, ms | stacked / loop | slowest place / median (loop, stacked) |")
    print("|---|---|---|---|---|", flush=True)
    for name, (count, size) in SETS.items():
        for cls in (Muon, SOAP):
            rounds = options.rounds if size < 1024 else EVERY
            both = {engine: Candidate(cls, count, size, engine) for engine in ("loop", "foreach")}
            for _ in range(rounds):
                for candidate in both.values():
                    candidate.once()
            median = {engine: statistics.median(c.times) for engine, c in both.items()}
            spikes = [
                max(statistics.median(c.times[k::EVERY]) for k in range(EVERY)) / median[engine]
                for engine, c in both.items()
            ]
            ratio = median["foreach"] / median["loop"]
            spread = ", ".join(f"{spike:.2f}" for spike in spikes)
            print(f"| {name} | {cls.__name__} | {median['loop'] * 1e3:.1f} | {ratio:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
