"""Chapter 12's slower experiments: a character MLP and a small transformer, and how rates transfer in width.

    python benchmarks/muon_results.py [mlp] [transformer] [width]

The text is what scikit-learn says of its data sets, 26 letters and a blank. Networks of all seeds are trained at once,
each on its own batches: a weight is (seeds, m, n). Every method's rate is chosen on seeds 100 to 102 from a grid by
factors of 2 that grows until its best is interior; then ten other seeds are run at that rate. Vectors, embedding and
head go by AdamW at 0.01 wherever a matrix method steps the rest. All rates fall to zero linearly.
"""

import math
import re
import sys
import time

import torch
from sklearn import datasets
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import guided_descent as gd
from guided_descent.problems import digits

torch.set_num_threads(1)
TUNE, FRESH = range(100, 103), range(10)
NAMES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


def corpus() -> torch.Tensor:
    text = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in NAMES).lower()
    text = re.sub(r"[^a-z]+", " ", text)
    return torch.tensor([0 if x == " " else ord(x) - 96 for x in text])


TEXT = corpus()
SEEN, UNSEEN = TEXT[: int(0.85 * len(TEXT))], TEXT[int(0.85 * len(TEXT)) :]


def matrix(seeds, m, n, k, gain=1.0):
    draws = [torch.Generator().manual_seed(1000 * at + k) for at in seeds]
    return nn.Parameter(torch.stack([torch.randn(m, n, generator=g) * gain / n**0.5 for g in draws]))


class MLP(nn.Module):
    """Eight characters, two hidden layers, the next character."""

    length = 8

    def __init__(self, seeds, width=96, inner=12):
        super().__init__()
        shapes = [(27, inner), (width, 8 * inner), (width, width), (27, width)]
        made = [matrix(seeds, m, n, k, (n**0.5, 1.4, 1.4, 1)[k]) for k, (m, n) in enumerate(shapes)]
        self.embed, self.first, self.second, self.head = made
        self.rest, self.matrices = [self.embed, self.head], [self.first, self.second]

    def forward(self, x):  # (seeds, batch, length)
        each = torch.arange(len(x))[:, None, None]
        h = self.embed[each, x].flatten(2)
        for W in self.matrices:
            h = (h @ W.mT).relu()
        return h @ self.head.mT


def unit(h):
    return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Transformer(nn.Module):
    """Two layers, four heads, norms without gains."""

    length = 32

    def __init__(self, seeds, width=32, heads=4, layers=2):
        super().__init__()
        self.heads, d = heads, width
        self.embed, self.place = matrix(seeds, 27, d, 0, d**0.5), matrix(seeds, self.length, d, 1, d**0.5)
        self.head, self.blocks, k = matrix(seeds, 27, d, 2), [], 3
        for _ in range(layers):
            block = []
            for m, n in ((d, d), (d, d), (d, d), (d, d), (4 * d, d), (d, 4 * d)):
                block.append(matrix(seeds, m, n, k))
                k += 1
            self.blocks.append(nn.ParameterList(block))
        self.layers = nn.ModuleList(self.blocks)
        self.rest, self.matrices = [self.embed, self.place, self.head], [W for x in self.blocks for W in x]

    def forward(self, x):  # (seeds, batch, length)
        S, N, T = x.shape
        each = torch.arange(S)[:, None, None]
        h = (self.embed[each, x] + self.place[:, None, :T]).flatten(1, 2)
        for Q, K, V, O, A, B in self.blocks:  # noqa: E741
            y = unit(h)
            q, k, v = ((y @ W.mT).view(S * N, T, self.heads, -1).transpose(1, 2) for W in (Q, K, V))
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + y.transpose(1, 2).reshape(S, N * T, -1) @ O.mT
            h = h + (unit(h) @ A.mT).relu() @ B.mT
        return (unit(h) @ self.head.mT).view(S, N, T, -1)


def windows(text, length, seeds, batch, generators):
    """Inputs and targets (seeds, batch, length), random places of the text."""
    at = torch.stack([torch.randint(len(text) - length - 1, (batch,), generator=g) for g in generators])
    rows = text[at[..., None] + torch.arange(length + 1)]
    return rows[..., :-1], rows[..., 1:]


def losses(net, x, y):
    """One for each seed."""
    z = net(x)
    y = y if z.dim() == 4 else y[..., -1]
    each = cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(len(x), -1).mean(1)


class Signum(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.add_(m.lerp_(p.grad, 1 - group["momentum"]).sign(), alpha=-group["lr"])


def parts(net, lr):
    rest = {"params": net.rest, "algorithm": "adamw", "lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0}
    return [{"params": net.matrices, "lr": lr, "batched": True}, rest]


METHODS = {
    "SGD, momentum": (lambda net, lr: gd.SGD(net.parameters(), lr, momentum=0.9), 0.2),
    "Adam": (lambda net, lr: gd.Adam(net.parameters(), lr, (0.9, 0.95)), 0.01),
    "Signum": (lambda net, lr: Signum(net.parameters(), lr), 0.002),
    "Muon": (lambda net, lr: gd.Muon(parts(net, lr), engine="foreach"), 0.02),
}


def fit(kind, method, lr, seeds, steps=200, batch=None):
    """Losses on training and unseen text, one for each seed."""
    net = kind(seeds)
    batch = batch or (8 if kind is Transformer else 128)
    optimizer = METHODS[method][0](net, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    draws = [torch.Generator().manual_seed(7000 + at) for at in seeds]
    for _ in range(steps):
        x, y = windows(SEEN, net.length, seeds, batch, draws)
        optimizer.zero_grad()
        losses(net, x, y).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        same = [torch.Generator().manual_seed(1) for _ in seeds]
        many = 2048 if kind is MLP else 64
        return [losses(net, *windows(text, net.length, seeds, many, same)) for text in (SEEN, UNSEEN)]


def tuned(kind, method):
    """The best rate by factors of 2, interior."""
    found, lr = {}, METHODS[method][1]

    def score(k):
        if k not in found:
            x = fit(kind, method, lr * 2**k, TUNE)[0].mean()
            found[k] = float(x) if x.isfinite() else math.inf
        return found[k]

    best = 0
    while (better := min((best - 1, best, best + 1), key=score)) != best:
        best = better
    return lr * 2**best, [round(found[k], 3) for k in (best - 1, best, best + 1)]


def language(kind) -> None:
    for method in METHODS:
        start = time.perf_counter()
        lr, basin = tuned(kind, method)
        train, test = fit(kind, method, lr, FRESH)
        print(
            f"{kind.__name__:>11} {method:>13} lr {lr:<8.4g} basin {basin}"
            f"  train {train.mean():.3f} ± {train.std():.3f}  unseen {test.mean():.3f} ± {test.std():.3f}"
            f"  ({time.perf_counter() - start:.0f} s)\n"
            f"      unseen = {[round(x, 3) for x in test.tolist()]}",
            flush=True,
        )


def width() -> None:
    """Training loss of a net for digits whose hidden layers are wider and wider, by rate and scale."""
    images, labels = (torch.as_tensor(x) for x in digits())
    images = images.float() / images.max()
    seeds, steps = range(5), 60

    def final(scale, size, lr):
        shapes = [(size, 64), (size, size), (size, size), (10, size)]
        weights = [matrix(seeds, m, n, k) for k, (m, n) in enumerate(shapes)]
        with torch.no_grad():
            for W, (m, n) in zip(weights, shapes, strict=True):
                W.copy_(gd.polar(W, "svd") * (m / n) ** 0.5)
        optimizer = gd.Muon([{"params": weights, "batched": True}], lr=lr, scale=scale, engine="foreach")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
        draws = [torch.Generator().manual_seed(7000 + at) for at in seeds]

        def loss(rows):
            h = images[rows] * 2
            for W in weights[:-1]:
                h = (h @ W.mT).relu() * 2**0.5
            z = h @ weights[-1].mT
            return cross_entropy(z.flatten(0, 1), labels[rows].flatten(), reduction="none").view(len(rows), -1).mean(1)

        for _ in range(steps):
            optimizer.zero_grad()
            loss(torch.stack([torch.randint(len(images), (128,), generator=g) for g in draws])).sum().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found = loss(torch.arange(600).expand(len(seeds), -1))
        return found.nan_to_num(9.0, 9.0).clamp_max(9.0)

    for scale, start in (("scion", -4), ("keller", -4), ("moonlight", -6), ("spectral", -8)):
        rates = [start + k / 2 for k in range(-5, 6)]
        table = {}
        for size in (32, 64, 128):
            table[size] = torch.stack([final(scale, size, 2**k) for k in rates]).log().mean(1)
            best = int(table[size].argmin())  # basins are wide: look at the row, too
            kept = int(table[32].argmin())
            ratio = float((table[size][kept] - table[size][best]).exp())
            print(
                f"{scale:>9} width {size:>3}: best 2^{rates[best]:+.1f}, loss {table[size][best].exp():.4f};"
                f" at the rate of width 32: {ratio:.2f} times; {[round(float(x.exp()), 4) for x in table[size]]}",
                flush=True,
            )


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["mlp", "transformer", "width"]
    print(f"{len(TEXT)} characters")
    for name in wanted:
        {"mlp": lambda: language(MLP), "transformer": lambda: language(Transformer), "width": width}[name]()
