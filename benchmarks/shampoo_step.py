"""Steps of chapter 10's methods against pytorch_optimizer's: mean and slowest, as ratios of one run.

    python benchmarks/shampoo_step.py [--rounds N] [--only NAME …]

The tensors are those of step_time.py, a GPT of 10.92 million parameters, with fixed gradients. Every round times each
candidate once, in turn; a multiple of ten rounds sees every turn equally often. Means count here: a renewal that comes
once in ten steps is in no median. "slowest / median" says how evenly the work is spread. Shampoo and PSGD renew as
often as their peers: roots once in ten steps in blocks of at most 1024, factors in every step.
"""

import argparse
import statistics

import pytorch_optimizer
from step_time import Candidate, parameters

import guided_descent as gd

SOAP, SHAMPOO, KRON = "pytorch_optimizer SOAP", "pytorch_optimizer ScalableShampoo", "pytorch_optimizer Kron"
CANDIDATES = {
    SOAP: lambda p: pytorch_optimizer.SOAP(p, lr=1e-3),
    SHAMPOO: lambda p: pytorch_optimizer.ScalableShampoo(
        p, lr=1e-3, start_preconditioning_step=1, preconditioning_compute_steps=10, block_size=1024
    ),
    KRON: lambda p: pytorch_optimizer.Kron(p, lr=1e-3, pre_conditioner_update_probability=1.0),
    "SOAP": lambda p: gd.SOAP(p, lr=1e-3),
    "SOAP, no blocks": lambda p: gd.SOAP(p, lr=1e-3, block_size=None),
    "Shampoo": lambda p: gd.Shampoo(p, lr=1e-3),
    "KLShampoo": lambda p: gd.KLShampoo(p, lr=1e-3),
    "PSGDKron": lambda p: gd.PSGDKron(p, lr=1e-3),
}
PEERS = {"Shampoo": SHAMPOO, "PSGDKron": KRON}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="a multiple of ten")
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    if options.rounds < 10 or options.rounds % 10:
        parser.error(f"--rounds {options.rounds} does not see each turn equally often; pass a multiple of 10")
    ours = [n for n in CANDIDATES if n not in (SOAP, SHAMPOO, KRON) and (not options.only or n in options.only)]
    names = [*dict.fromkeys(PEERS.get(n, SOAP) for n in ours), *ours]
    count = sum(p.numel() for p in parameters())
    made = {name: Candidate(CANDIDATES[name]) for name in names}
    for _ in range(options.rounds):
        for candidate in made.values():
            candidate.once()
    mean = {name: statistics.mean(candidate.times) for name, candidate in made.items()}
    print("| method | mean ms | mean / its peer's mean | slowest / median | state bytes a parameter |")
    print("|---|---|---|---|---|")
    for name, candidate in made.items():
        spike = max(candidate.times) / candidate.seconds
        state = f"{candidate.state / count:.1f}" if name in ours else ""
        ratio = mean[name] / mean[PEERS.get(name, SOAP)] if name in ours else 1.0
        print(f"| {name} | {mean[name] * 1e3:.0f} | {ratio:.2f} | {spike:.2f} | {state} |", flush=True)


if __name__ == "__main__":
    main()
