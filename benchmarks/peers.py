"""Which optimizer is compared with which, and how many numbers its state must hold at least."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import guided_descent as gd


@dataclass(frozen=True)
class Pair:
    """Ours and a peer that runs the same algorithm, with the state that the rule needs for a tensor of some shape."""

    name: str
    ours: type[gd.Optimizer]
    against: str
    peer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    state: Callable[[tuple[int, ...]], int]
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, params: list[torch.Tensor], **options: Any) -> gd.Optimizer:
        return self.ours(params, lr=1e-3, **self.arguments, **options)


def copies(count: int) -> Callable[[tuple[int, ...]], int]:
    return lambda shape: count * math.prod(shape)


def rows_and_columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape) if len(shape) < 2 else math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def ademamix(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdEMAMix

    return AdEMAMix(params, lr=1e-3)


def theirs(name: str, **arguments: Any) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    def build(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(params, lr=1e-3, **arguments)

    return build


def lion(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(params, lr=1e-3)
def schedule_free(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=1e-3)
    optimizer.train()
    return optimizer


PEERS = [
    Pair(
        "SGD momentum",
        gd.SGD,
        "torch fused",
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
        copies(1),
        {"momentum": 0.9},
    ),
    Pair("Adagrad", gd.Adagrad, "torch fused", lambda p: torch.optim.Adagrad(p, lr=1e-3, fused=True), copies(1)),
    Pair("Adam", gd.Adam, "torch fused", lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), copies(2)),
    Pair("AdamW", gd.AdamW, "torch fused", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), copies(2)),
    Pair("RMSprop", gd.RMSprop, "torch default", lambda p: torch.optim.RMSprop(p, lr=1e-3), copies(1)),
    Pair("NAdam", gd.NAdam, "torch default", lambda p: torch.optim.NAdam(p, lr=1e-3), copies(2)),
    Pair("Adafactor", gd.Adafactor, "torch default", lambda p: torch.optim.Adafactor(p, lr=1e-3), rows_and_columns),
    Pair("AdEMAMix", gd.AdEMAMix, "pytorch_optimizer", ademamix, copies(3)),
    Pair("Lion", gd.Lion, "pytorch_optimizer", theirs("Lion"), copies(1)),
    Pair("Lion", gd.Lion, "lion-pytorch", lion, copies(1)),
    Pair("Signum", gd.Signum, "pytorch_optimizer", theirs("SignSGD"), copies(1)),
    Pair("ScheduleFreeAdamW", gd.ScheduleFreeAdamW, "schedulefree", schedule_free, copies(2)),
    Pair(
        "ScheduleFreeAdamW, as AdamW",
        gd.ScheduleFreeAdamW,
        "torch fused AdamW",
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        copies(2),
    ),
    Pair(
        "LARS",
        gd.LARS,
        "torch fused AdamW",
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        copies(1),
        {"weight_decay": 1e-2},
    ),
    Pair("LAMB", gd.LAMB, "torch fused AdamW", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), copies(2)),
]
