"""One optimizer step, ours against a named peer, as ratios measured in one run.

    python benchmarks/step_time.py [--rounds N] [--only NAME …] [--no-compile]

The model is a GPT of 10.92 million parameters (6 layers, width 384, vocabulary 512), as tensors with fixed gradients.
Every round times each candidate once, in turn, so that a machine that speeds up or slows down does so for all of them;
the ratio of medians is printed. Bandwidth is what the rule has to move at least (parameter, gradient and state, read
and written once) over the time, as a share of what a plain copy reaches in the same run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from peers import PEERS, Pair

DEPTH, WIDTH, VOCABULARY, CONTEXT = 6, 384, 512, 256


def shapes() -> list[tuple[int, ...]]:
    """The tensors of a GPT: two embeddings, the blocks, a last norm."""
    d = WIDTH
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(VOCABULARY, d), (CONTEXT, d), *block * DEPTH, (d,), (d,)]


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes()]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


class Candidate:
    """A built optimizer, its first-step seconds, its state, and the times of its steps."""

    def __init__(self, build: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> None:
        self.params = parameters()
        self.optimizer = build(self.params)
        start = time.perf_counter()
        self.optimizer.step()
        self.first = time.perf_counter() - start
        self.optimizer.step()
        states = (v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        self.state = nbytes(x for x in states if x.numel() > 1)
        self.times: list[float] = []

    def once(self) -> None:
        start = time.perf_counter()
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def extra_memory(candidate: Candidate) -> int:
    """Peak bytes that one step allocates beyond what it leaves behind."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        candidate.optimizer.step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(pair: Pair, rounds: int, compiled: bool, copy: Callable[[], float]) -> None:
    count = sum(p.numel() for p in parameters())
    largest = 4 * max(p.numel() for p in parameters())
    engines = ["auto", "loop", "foreach"] + ["fused"] * (pair.ours.fused is not None) + ["compile"] * compiled
    ours = {engine: Candidate(lambda p, engine=engine: pair.build(p, engine=engine)) for engine in engines}
    theirs = Candidate(pair.peer)
    copies = []
    for _ in range(rounds):
        for candidate in (theirs, *ours.values()):
            candidate.once()
        copies.append(copy())
    best = min(ours, key=lambda engine: ours[engine].seconds)
    moved = 12 * count + 2 * ours["auto"].state  # parameter read and written, gradient read, state both ways
    share = moved / ours[best].seconds / (8 * count / statistics.median(copies))
    ratio = {engine: candidate.seconds / theirs.seconds for engine, candidate in ours.items()}
    columns = [
        pair.name,
        pair.against,
        f"{theirs.seconds * 1e3:.1f}",
        f"{ratio['auto']:.2f}",
        f"{ratio[best]:.2f} ({best})",
        ", ".join(f"{engine} {value:.2f}" for engine, value in ratio.items()),
        f"{share:.0%}",
        f"{ours['auto'].state / (4 * sum(map(pair.state, shapes()))):.2f}",
        f"{extra_memory(ours['auto']) / largest:.2f}",
        f"{ours['compile'].first:.1f}" if compiled else "",
    ]
    print(f"| {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    source = [p.detach() for p in parameters()]
    target = [torch.empty_like(x) for x in source]

    def copy() -> float:
        start = time.perf_counter()
        for a, b in zip(target, source, strict=True):
            a.copy_(b)
        return time.perf_counter() - start

    count = sum(x.numel() for x in source)
    print(f"{count / 1e6:.2f} M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| optimizer | peer | peer ms | default / peer | best / peer | all engines / peer | bandwidth of a copy "
        "| state bytes / minimum of the rule | extra memory / largest parameter | first compiled step, s |"
    )
    print("|" + "---|" * 10, flush=True)
    for pair in PEERS:
        if not options.only or pair.name in options.only:
            measure(pair, options.rounds, not options.no_compile, copy)


if __name__ == "__main__":
    main()
