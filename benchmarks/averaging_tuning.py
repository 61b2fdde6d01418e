"""The search behind the table of chapter 16: every method's settings on the autoencoder, tuned alike.

    python benchmarks/averaging_tuning.py STEPS [--only NAME …] [--seeds 1 2 3]

Ten step sizes run at once, each in a parameter group of its own, as stacks of networks, one for each seed. A line shows
a setting's loss at its best step size: the one whose mean with both neighbours is lowest.
"""

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import guided_descent as gd
from guided_descent.problems import digits

SIZES, BATCH, WARMUP = (64, 48, 24, 8, 24, 48, 64), 64, 10
RATES = [2 ** (-k / 2) for k in range(15, 5, -1)]
IMAGES = torch.as_tensor(digits()[0]).float()
IMAGES = IMAGES / IMAGES.max()


class Autoencoders(nn.Module):
    """Those of chapter 16, for every step size and seed."""

    def __init__(self, rates: int, seeds: list[int]) -> None:
        super().__init__()
        self.rates, made = rates, []
        for k, (a, b) in enumerate(itertools.pairwise(SIZES)):
            draws = [torch.Generator().manual_seed(100 * seed + k) for seed in seeds]
            W = torch.stack([torch.randn(b, a, generator=draw) / a**0.5 for draw in draws])
            made += [W, torch.zeros(len(seeds), 1, b)]
        copies = ([nn.Parameter(x.clone()) for x in made] for _ in range(rates))
        self.sets = nn.ModuleList(nn.ParameterList(x) for x in copies)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = x.repeat(self.rates, 1, 1)
        for k in range(0, 2 * len(SIZES) - 2, 2):
            W, b = (torch.cat([one[i] for one in self.sets]) for i in (k, k + 1))
            y = torch.baddbmm(b, y.tanh() if k else y, W.mT)
        return (y - x).square().sum(2).mean(1) / 2


def losses(
    steps: int,
    seeds: list[int],
    method: type[gd.Optimizer],
    average: Callable[[nn.Module], Any] | None = None,
    shape: Callable[[float], float] = lambda u: 1.0,
    **options: Any,
) -> torch.Tensor:
    """The loss at the end, of shape (step sizes, seeds)."""
    nets = Autoencoders(len(RATES), seeds)
    groups = [{"params": list(own), "lr": lr} for own, lr in zip(nets.sets, RATES, strict=True)]
    optimizer = method(groups, **options)
    mean = average(nets) if average else None
    draws = [torch.Generator().manual_seed(7000 + seed) for seed in seeds]
    for t in range(steps):
        pick = torch.stack([torch.randint(len(IMAGES), (BATCH,), generator=draw) for draw in draws])
        if method is not gd.ScheduleFreeAdamW:
            for group, lr in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = lr * min(1, (t + 1) / WARMUP) * shape(t / steps)
        optimizer.zero_grad()
        nets(IMAGES[pick]).sum().backward()
        optimizer.step()
        if mean:
            mean.update()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    with torch.no_grad(), mean.swap() if mean else contextlib.nullcontext():
        found = nets(IMAGES[::3].expand(len(seeds), -1, -1))
    return found.nan_to_num(nan=math.inf).view(len(RATES), len(seeds))


def adamw(beta1: float, **more: Any) -> dict[str, Any]:
    return {"method": gd.AdamW, "betas": (beta1, 0.99), "weight_decay": 0.0, **more}


def free(beta: float) -> dict[str, Any]:
    return {"method": gd.ScheduleFreeAdamW, "betas": (beta, 0.99), "warmup_steps": WARMUP}


def primal(beta1: float, mu_x: float, mu_y: float) -> dict[str, Any]:
    return {"method": gd.GPA, "betas": (beta1, 0.99), "mu_x": mu_x, "mu_y": mu_y}


def forget(mu: float) -> Callable[[nn.Module], Any]:
    return lambda model: gd.EMA(model, mu, warmup=10)


def root(u: float) -> float:
    return min(1.0, 1 - math.sqrt(max(0.0, (u - 0.8) / 0.2)))


BETAS, MEMORIES = (0.3, 0.5, 0.7, 0.9), (0.9, 0.97)
SETTINGS = {
    "constant": {f"β₁ {b}": adamw(b) for b in BETAS},
    "linear": {f"β₁ {b}": adamw(b, shape=lambda u: 1 - u) for b in BETAS},
    "root": {f"β₁ {b}": adamw(b, shape=root) for b in BETAS},
    "polyak": {f"β₁ {b}": adamw(b, average=gd.Polyak) for b in (0.0, 0.5, 0.7, 0.9)},
    "ema": {f"β₁ {b}, μ {mu}": adamw(b, average=forget(mu)) for b in (0.5, 0.7) for mu in MEMORIES},
    "schedule-free": {f"β {b}": free(b) for b in (0.8, 0.9, 0.95, 0.98)},
    "gpa": {f"μx {x}, μy {y}": primal(0.0, x, y) for x in MEMORIES for y in (0.7, 0.9)},
    "gpa with momentum": {f"μx {x}, μy {y}": primal(0.9, x, y) for x in MEMORIES for y in (0.3, 0.5)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    print("| method | setting | log₂ lr | loss | with neighbours | all step sizes |\n|---|---|---|---|---|---|")
    for name in options.only:
        for setting, what in SETTINGS[name].items():
            loss = losses(options.steps, options.seeds, **what).mean(1)
            smooth = (loss[:-2] + loss[1:-1] + loss[2:]) / 3
            i = int(smooth.argmin()) + 1
            each = " ".join(f"{x:.3f}" for x in loss)
            print(
                f"| {name} | {setting} | {math.log2(RATES[i]):.1f} | {loss[i]:.3f} | {smooth[i - 1]:.3f} | {each} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
