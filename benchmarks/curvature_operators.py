"""Products with curvature matrices, ours against curvlinops', as ratios measured in one run.

    python benchmarks/curvature_operators.py [--rounds N] [--only NAME …]

Every round times each candidate once, in turn, so that a machine that speeds up or slows down does so for all of them;
the ratio of medians is printed. "Kept" reuses the graph of the batch from product to product (the default for one
batch), "fresh" evaluates the model anew for each. A gradient of the same model is timed beside them: by count, a
product from a kept graph is four thirds of it. "First" is the first product, which builds the graph.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import curvlinops
import torch
from torch import Tensor, nn

import guided_descent as gd


class Block(nn.Module):
    """One block of a transformer, without attention's mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [x for a, b in zip(sizes, sizes[1:], strict=False) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def settings() -> dict[str, tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]]:
    """Model, loss and a batch, by name."""
    torch.manual_seed(0)
    images, classes = torch.randn(128, 3, 16, 16), torch.randint(10, (256,))
    cnn = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
    cnn = nn.Sequential(*cnn, nn.Flatten(), nn.Linear(32 * 49, 10))
    gpt = nn.Sequential(nn.Embedding(128, 128), Block(128, 4), Block(128, 4), nn.Linear(128, 128))
    gpt = nn.Sequential(*gpt, nn.Flatten(0, 1))
    autoencoder = mlp(784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    pixels = torch.rand(512, 784)
    return {
        "digits 64-50-50-10, batch 256": (mlp(64, 50, 50, 10), nn.CrossEntropyLoss(), (torch.randn(256, 64), classes)),
        "autoencoder 784-1000-500-250-30, batch 512": (autoencoder, nn.MSELoss(), (pixels, pixels)),
        "CNN, batch 128": (cnn, nn.CrossEntropyLoss(), (images, classes[:128])),
        "transformer, 8×64 tokens": (gpt, nn.CrossEntropyLoss(), (torch.randint(128, (8, 64)), classes.repeat(2))),
    }


PAIRS: dict[str, tuple[Any, Any]] = {
    "GGN": (gd.GGN, curvlinops.GGNLinearOperator),
    "Hessian": (gd.Hessian, curvlinops.HessianLinearOperator),
    "EmpiricalFisher": (gd.EmpiricalFisher, curvlinops.EFLinearOperator),
}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(setting: str, model: nn.Module, loss: nn.Module, batch: Any, name: str, rounds: int) -> None:
    ours, theirs = PAIRS[name]
    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    V = torch.randn(len(v), 8)
    kept, fresh = ours(model, loss, [batch]), ours(model, loss, [batch], cache=False)
    peer = theirs(model, loss, params, [batch], check_deterministic=False)
    ours(model, loss, [batch]) @ v  # warms up
    first = seconds(lambda: kept @ v)
    error = float((kept @ v - peer @ v).norm() / (peer @ v).norm())
    if error > 1e-3 and name != "EmpiricalFisher":  # theirs scales a mean over outputs otherwise
        raise SystemExit(f"{setting}: {name} differs from curvlinops by {error:.1e}")
    calls = {
        "peer": lambda: peer @ v,
        "kept": lambda: kept @ v,
        "fresh": lambda: fresh @ v,
        "gradient": lambda: torch.autograd.grad(loss(model(batch[0]), batch[1]), params),
    }
    matrix = {"peer": lambda: peer @ V, "kept": lambda: kept @ V}
    times: dict[str, list[float]] = {key: [] for key in (*calls, "peer V", "kept V")}
    for i in range(rounds):
        for key, call in calls.items():
            times[key].append(seconds(call))
        if i % 5 == 0:
            for key, call in matrix.items():
                times[f"{key} V"].append(seconds(call))
    t = {key: statistics.median(values) for key, values in times.items()}
    columns = [
        setting,
        name,
        f"{t['peer'] * 1e3:.2f}",
        f"{t['kept'] / t['peer']:.2f}",
        f"{t['fresh'] / t['peer']:.2f}",
        f"{t['kept V'] / t['peer V']:.2f}",
        f"{t['kept'] / t['gradient']:.2f}",
        f"{first / t['kept']:.1f}",
    ]
    print(f"| {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="*", default=[], choices=[*PAIRS, []])
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, curvlinops 3.0.1\n")
    print(
        "| model | matrix | peer ms | kept / peer | fresh / peer | 8 columns, kept / peer | kept / gradient "
        "| first / kept |"
    )
    print("|" + "---|" * 8, flush=True)
    for setting, (model, loss, batch) in settings().items():
        for name in PAIRS:
            if not options.only or name in options.only:
                measure(setting, model, loss, batch, name, options.rounds)


if __name__ == "__main__":
    main()
