"""Which optimizer is compared with which, and what its state must take at least."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import guided_descent as gd


@dataclass(frozen=True)
class Pair:
    """Ours and a peer that runs the same algorithm, with the state bytes per fp32 parameter that it needs."""

    name: str
    ours: type[gd.Optimizer]
    against: str
    peer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    minimum: float
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, params: list[torch.Tensor], **options: Any) -> gd.Optimizer:
        return self.ours(params, lr=1e-3, **self.arguments, **options)


def ademamix(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdEMAMix

    return AdEMAMix(params, lr=1e-3)


PEERS = [
    Pair(
        "SGD momentum",
        gd.SGD,
        "torch fused",
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
        4,
        {"momentum": 0.9},
    ),
    Pair("Adagrad", gd.Adagrad, "torch fused", lambda p: torch.optim.Adagrad(p, lr=1e-3, fused=True), 4),
    Pair("Adam", gd.Adam, "torch fused", lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), 8),
    Pair("AdamW", gd.AdamW, "torch fused", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 8),
    Pair("RMSprop", gd.RMSprop, "torch default", lambda p: torch.optim.RMSprop(p, lr=1e-3), 4),
    Pair("NAdam", gd.NAdam, "torch default", lambda p: torch.optim.NAdam(p, lr=1e-3), 8),
    Pair("Adafactor", gd.Adafactor, "torch default", lambda p: torch.optim.Adafactor(p, lr=1e-3), 0.02),
    Pair("AdEMAMix", gd.AdEMAMix, "pytorch_optimizer", ademamix, 12),
]
