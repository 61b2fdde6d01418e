"""Steps of chapter 10's methods against pytorch_optimizer's SOAP: mean, median and slowest, as ratios of one run.

    python benchmarks/shampoo_step.py [--rounds N] [--only NAME …]

The tensors are those of step_time.py, a GPT of 10.92 million parameters, with fixed gradients. Every round times each
candidate once, in turn; a multiple of ten rounds sees every turn equally often. Means count here: a renewal that comes
once in ten steps is in no median. "slowest / median" says how evenly the work is spread.
"""

import argparse
import statistics

from step_time import Candidate, parameters

import guided_descent as gd


def peer(params):
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=1e-3)


CANDIDATES = {
    "pytorch_optimizer SOAP": peer,
    "SOAP": lambda p: gd.SOAP(p, lr=1e-3),
    "SOAP, no blocks": lambda p: gd.SOAP(p, lr=1e-3, block_size=None),
    "Shampoo": lambda p: gd.Shampoo(p, lr=1e-3),
    "KLShampoo": lambda p: gd.KLShampoo(p, lr=1e-3),
    "PSGDKron": lambda p: gd.PSGDKron(p, lr=1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="a multiple of ten")
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    if options.rounds < 10 or options.rounds % 10:
        parser.error(f"--rounds {options.rounds} does not see each turn equally often; pass a multiple of 10")
    names = [n for n in CANDIDATES if not options.only or n in options.only or n.startswith("pytorch")]
    count = sum(p.numel() for p in parameters())
    made = {name: Candidate(CANDIDATES[name]) for name in names}
    for _ in range(options.rounds):
        for candidate in made.values():
            candidate.once()
    base = statistics.mean(made[names[0]].times)
    print("| method | mean ms | mean / peer's mean | slowest / median | state bytes a parameter |")
    print("|---|---|---|---|---|")
    for name, candidate in made.items():
        mean = statistics.mean(candidate.times)
        spike = max(candidate.times) / candidate.seconds
        state = f"{candidate.state / count:.1f}" if not name.startswith("pytorch") else ""
        print(f"| {name} | {mean * 1e3:.0f} | {mean / base:.2f} | {spike:.2f} | {state} |", flush=True)


if __name__ == "__main__":
    main()
