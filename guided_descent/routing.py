# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 7db1055e
"""Chapter 23, The machinery."""

__all__ = [
    "FUSED",
    "RECURRENT",
    "ROUTERS",
    "TRANSPOSED",
    "Groups",
    "Route",
    "heads",
    "param_groups",
]


# %% 23_machinery sec-routing 1 5eeeb002
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Names of projections that hold several, and how many.
FUSED = {"qkv": 3, "Wqkv": 3, "query_key_value": 3, "c_attn": 3, "qkv_proj": 3}
FUSED |= {"in_proj_weight": 3, "gate_up_proj": 2}
#: Modules that keep a weight as inputs by outputs.
TRANSPOSED = ("Conv1D", "Llama4TextExperts")
#: Names of modules that choose an expert.
ROUTERS = ("gate", "router")
#: Torch's recurrent modules; they stack the weights of their gates.
RECURRENT = nn.RNNBase | nn.RNNCellBase


class Route(NamedTuple):
    """What becomes of a parameter, and why."""

    name: str
    shape: tuple[int, ...]
    method: str
    reason: str


class Groups(list):
    """Parameter groups; printed, a table of what went where and why."""

    routes: tuple[Route, ...] = ()

    def __repr__(self) -> str:
        width = max(len(route.name) for route in self.routes)
        rows = [
            f"{name:<{width}}  {'×'.join(map(str, shape)):>12}  {method:<6}  {reason}"
            for name, shape, method, reason in self.routes
        ]
        return "\n".join(rows)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output; the logits alone, where it says so."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        logits = [x for name, x in output.items() if "logits" in name]
        for x in logits or output.values():
            yield from _tensors(x)
    elif isinstance(output, tuple | list):
        for x in output:
            yield from _tensors(x)


def heads(model: nn.Module, example: Any) -> set[Tensor]:
    """The matrices nearest to the output, on each path of autograd's graph.

    Args:
        model: Run once, in evaluation mode.
        example: Its input: a tensor, a tuple, or a dictionary of keywords.

    Source: appendix "The machinery".
    """
    args, kwargs = (), {}
    if isinstance(example, dict):
        kwargs = example
    else:
        args = example if isinstance(example, tuple) else (example,)
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen = [p for p in frozen if p.is_floating_point()]  # a frozen head is one too
    model.eval()
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            output = model(*args, **kwargs)
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode
    stack = [x.grad_fn for x in _tensors(output) if x.grad_fn is not None]
    found, seen = set(), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        below = [child for child, _ in node.next_functions if child is not None]
        leaves = [_leaf(child) for child in below]
        matrices = {x for x in leaves if x is not None and x.dim() > 1}
        found |= matrices
        stack += [] if matrices else below
    return found


def _leaf(node: Any) -> Tensor | None:
    """The parameter that a node passes on, through views and casts alone."""
    while not hasattr(node, "variable"):
        below = [child for child, _ in node.next_functions if child is not None]
        if len(below) != 1:
            return None
        node = below[0]
    return node.variable


# %% 23_machinery sec-routing 2 fb6ccee7
def _fused(name: str, rows: int, columns: int, told: str) -> tuple[dict, str]:
    """How a fused projection splits, if it is one; and what to say of it."""
    if (parts := FUSED.get(name, 1)) == 1:
        return {}, told
    if rows % parts or parts == 3 and rows != parts * columns:
        return {}, f"{told}, fused in unequal parts? then pass split_sizes="
    return {"split_sizes": (rows // parts,) * parts}, f"{told}, fused, {parts} parts"


def _route(
    name: str, p: Tensor, owners: list[nn.Module], outputs: set[Tensor]
) -> tuple[dict[str, Any] | None, str]:
    """The keys of a parameter's group, None for another algorithm; and the reason."""
    owner, (*_, place, last) = owners[0], ["", *name.split(".")]
    kind = type(owner).__name__
    experts = p.dim() == 3 and "expert" in f"{kind}.{name}".lower()
    if any(isinstance(x, nn.Embedding | nn.EmbeddingBag) for x in owners):
        return None, "embedding" + (", tied" if len(owners) > 1 else "")
    if p.dim() < 2 or last.endswith("bias"):
        return None, "bias" if "bias" in last else "norm, gain or other vector"
    if isinstance(owner, RECURRENT):
        gates, rest = divmod(len(p), owner.hidden_size)
        if rest or gates < 2:
            return {}, "recurrent"
        sizes = (owner.hidden_size,) * gates
        return {"split_sizes": sizes}, f"recurrent, {gates} gates"
    if p in outputs:
        return None, "output layer"
    if not experts and 1 in (len(p), p[:1].numel()):
        return None, "one row or column"
    if isinstance(owner, nn.modules.conv._ConvNd):
        if owner.groups > 1:
            return None, "grouped or depthwise convolution"
        if owner.transposed:
            return None, "transposed convolution"
        if owner.kernel_size == owner.stride and owner.stride[0] > 1:
            return None, "patch embedding"
        return {}, "convolution, flattened"
    if "router" in kind.lower() or place in ROUTERS and len(p) < p.shape[-1]:
        return None, "router"
    turned = {}
    if kind in TRANSPOSED or getattr(owner, "is_transposed", False):
        turned = {"transposed": True}
    rows, columns = p.shape[-2:] if not turned else (p.mT.shape[-2:])
    word = last if last in FUSED else place
    if not getattr(owner, "is_concatenated", True):
        word = ""  # the parts alternate, row by row
    if experts:
        told, turned = f"experts, {len(p)} matrices", turned | {"batched": True}
    elif turned:
        told = "kept as inputs × outputs"
    elif isinstance(owner, nn.Linear) or last.endswith("proj_weight"):
        told = "linear"
    else:
        return None, f"unrecognised: {kind}"
    keys, told = _fused(word, rows, columns, told)
    return turned | keys, told


def param_groups(
    model: nn.Module,
    example: Any = None,
    *,
    lr: float | None = None,
    rest: dict[str, Any] | None = None,
    verbose: bool = False,
) -> Groups:
    """Groups for a matrix method: hidden matrices, and the rest for AdamW.

    Args:
        model: Its trainable parameters are routed by the module that owns them.
        example: An input, to find the output layer: a tensor, a tuple, or a
            dictionary of keywords. ``None``: the last linear layer is taken for it.
        lr: Of the matrices. ``None``: the optimizer's.
        rest: What the other groups hold, such as ``{"lr": 3e-4}``. By default
            ``algorithm="adamw"`` with AdamW's defaults, and no decay of vectors.
        verbose: Print the table.

    Returns:
        A list of groups; printed, it is a table with reasons.

    Raises:
        ValueError: No matrix is left; the reasons are in the message.

    Source: appendix "The machinery".
    """
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append(module)
    told = ""
    if example is not None:
        outputs = heads(model, example)
    else:
        linear = [x for x in model.modules() if isinstance(x, nn.Linear)]
        outputs = {linear[-1].weight} if len(linear) > 1 else set()
        told = " (the last linear one; pass example= to be sure)"
    made: dict[Any, dict[str, Any]] = {}
    routes = []
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        if not p.requires_grad:
            routes.append(Route(name, shape, "-", "frozen"))
            continue
        keys, reason = _route(name, p, owners[p], outputs)
        if keys is None:
            group = {"algorithm": "adamw", **(rest or {})}
            if p.dim() < 2:
                group["weight_decay"] = 0.0
        else:
            group = {**keys, **({} if lr is None else {"lr": lr})}
        reason += told if reason == "output layer" else ""
        method = "matrix" if keys is not None else group["algorithm"]
        routes.append(Route(name, shape, method, reason))
        made.setdefault(str(group), {"params": [], **group})["params"].append((name, p))
    groups = Groups(made.values())
    groups.routes = tuple(routes)
    if not any(route.method == "matrix" for route in routes):
        said = f"no parameter of {type(model).__name__} is a hidden matrix"
        raise ValueError(f"{said}; use AdamW, or groups of your own:\n{groups!r}")
    if verbose:
        print(groups)
    return groups
