"""A K-FAC training step against one of fused AdamW, as ratios measured in one run.

    python benchmarks/kfac_step.py [--rounds N] [--batch N]

The model is the autoencoder 784-1000-500-250-30-250-500-1000-784 with tanh; a step is forward, backward and update.
K-FAC draws one target for each example, updates its statistics in every step and each inverse once in ten steps. Every
round times each candidate once, in turn, so that a machine that speeds up or slows down does so for all of them; the
ratio of medians is printed, and of means, which sees every inverse. Beside it stands what the arithmetic says: the
multiplications and additions of a step, over those of a step of AdamW, all at the same speed. Inverses have a period
of ten steps. The slowest of its ten places, each by its median, is set over the median of all: that is the work; the
slowest single step also sees what else the machine does.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import nn

from guided_descent.kfac import EKFAC, FOOF, KFAC

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
EVERY = 10
ADAMW = "AdamW, fused"
CANDIDATES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    ADAMW: lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
    "KFAC, inverses": lambda model: KFAC(model, 1e-3, likelihood="gaussian", damping_split="pi"),
    "KFAC, eigenbasis": lambda model: KFAC(model, 1e-3, likelihood="gaussian", damping_split="exact"),
    "EKFAC": lambda model: EKFAC(model, 1e-3, likelihood="gaussian"),
    "FOOF": lambda model: FOOF(model, 1e-3),
}


def autoencoder() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [x for i, o in zip(WIDTHS, WIDTHS[1:], strict=False) for x in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def arithmetic(batch: int) -> dict[str, float]:
    """Multiplications and additions in a step, in units of 10⁹; for an eigendecomposition of size d, 9 d³."""
    shapes = [(i + 1, o) for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)]
    weights = [i * o for i, o in shapes]
    train = 6 * batch * sum(weights) - 2 * batch * weights[0]
    sample = 2 * batch * sum(weights[1:])
    inputs, outputs = sum(i**2 for i, _ in shapes), sum(o**2 for _, o in shapes)
    cubes = [sum(i**3 for i, _ in shapes), sum(o**3 for _, o in shapes)]
    right, left = sum(2 * o * i**2 for i, o in shapes), sum(2 * i * o**2 for i, o in shapes)
    factors = 9 / 8 * batch * (inputs + outputs)  # 9/16 of all products of a symmetric matrix
    project = 2 * batch * (inputs + outputs + sum(weights))
    counts = {
        ADAMW: train,
        "KFAC, inverses": train + sample + factors + left + right + 2 * sum(cubes) / EVERY,
        "KFAC, eigenbasis": train + sample + factors + 2 * (left + right) + 9 * sum(cubes) / EVERY,
        "FOOF": train + 9 / 8 * batch * inputs + right + 2 * cubes[0] / EVERY,
    }
    counts["EKFAC"] = counts["KFAC, eigenbasis"] + project
    return {name: count / 1e9 for name, count in counts.items()}


class Candidate:
    """A model with its optimizer, and the times of its training steps."""

    def __init__(self, build: Callable[[nn.Module], torch.optim.Optimizer], x: torch.Tensor, warm: int) -> None:
        self.model, self.x, self.times = autoencoder(), x, []
        self.optimizer = build(self.model)
        for _ in range(warm):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        ((self.model(self.x) - self.x).square().sum(1).mean() / 2).backward()
        self.optimizer.step()

    def once(self) -> None:
        start = time.perf_counter()
        self.step()
        self.times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="a multiple of ten, at least 10")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    options = parser.parse_args()
    if options.rounds < EVERY or options.rounds % EVERY:
        parser.error(f"--rounds {options.rounds} does not see each inverse equally often; pass a multiple of {EVERY}")
    x = torch.rand(options.batch, WIDTHS[0], generator=torch.Generator().manual_seed(0))
    names = [name for name in CANDIDATES if name == ADAMW or name in options.only]
    candidates = {name: Candidate(CANDIDATES[name], x, EVERY + 3) for name in names}
    for _ in range(options.rounds):
        for candidate in candidates.values():
            candidate.once()
    counts, base = arithmetic(options.batch), candidates[ADAMW].times
    print(f"batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| step | ms | / AdamW | means / AdamW | arithmetic, 10⁹ | arithmetic / AdamW | slowest place / median "
        "| slowest step / median |"
    )
    print("|" + "---|" * 8)
    for name, candidate in candidates.items():
        times, median = candidate.times, statistics.median(candidate.times)
        columns = [
            name,
            f"{median * 1e3:.0f}",
            f"{median / statistics.median(base):.2f}",
            f"{statistics.mean(times) / statistics.mean(base):.2f}",
            f"{counts[name]:.1f}",
            f"{counts[name] / counts[ADAMW]:.2f}",
            f"{max(statistics.median(times[k::EVERY]) for k in range(EVERY)) / median:.2f}",
            f"{max(times) / median:.2f}",
        ]
        print(f"| {' | '.join(columns)} |")
    print("\nMiB of state, for each layer:\n")
    for name, candidate in candidates.items():
        if name != ADAMW:
            for layer, sizes in candidate.optimizer.memory().items():
                print(f"| {name} | {layer} | {', '.join(f'{k} {v / 2**20:.2f}' for k, v in sizes.items())} |")


if __name__ == "__main__":
    main()
