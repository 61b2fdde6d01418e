"""Every elementwise optimizer on FSDP2 shards, against one process; started by test_sharded.py under torchrun."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import guided_descent as gd
from guided_descent.core import known
from guided_descent.problems import GradientDescent

CASES = {
    "GradientDescent": (GradientDescent, {}),
    "SGD": (gd.SGD, {}),
    "SGD-momentum": (gd.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adagrad": (gd.Adagrad, {}),
    "RMSprop": (gd.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adam": (gd.Adam, {"amsgrad": True}),
    "AdamW": (gd.AdamW, {}),
    "NAdam": (gd.NAdam, {}),
    "AdEMAMix": (gd.AdEMAMix, {}),
    "Adafactor": (gd.Adafactor, {"weight_decay": 0.1}),
    "Lion": (gd.Lion, {"weight_decay": 0.1}),
    "NormalizedSGD": (gd.NormalizedSGD, {"momentum": 0.9}),
    "NormalizedSGD-layer": (gd.NormalizedSGD, {"scope": "layer"}),
    "LARS": (gd.LARS, {"weight_decay": 0.1, "trust": 0.5, "adapt_vectors": True}),
    "LAMB": (gd.LAMB, {"weight_decay": 0.1}),
}
rank, folder = int(dist.init_process_group("gloo") or dist.get_rank()), Path(sys.argv[1])
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.compile = functools.partial(torch.compile, backend="eager")


def model(sharded=True):
    """Five rows on two processes are uneven, one row leaves a process with nothing."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    return fully_shard(made, mesh=mesh) if sharded else made


def train(net, optimizer, steps, mine, spoil=None):
    """Each process sees its half of a batch; gradients are averaged. One process alone sees the whole."""
    for t in steps:
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        x = x.chunk(dist.get_world_size())[rank] if mine else x
        optimizer.zero_grad()
        net(x * float("nan") if t == spoil else x).square().mean().backward()
        optimizer.step()
    return [full(p.detach()) for p in net.parameters()]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def refused(call, message):
    try:
        call()
    except (ValueError, FloatingPointError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"went through; expected: {message}")


def train_one(build):
    alone = model(sharded=False)
    return train(alone, build(alone.parameters(), engine="loop"), [1], mine=False)


def engines(cls):
    return [e for e in ("auto", "loop", "foreach", "fused", "compile") if e != "fused" or cls.fused]


for name, (cls, options) in CASES.items():
    build = functools.partial(cls, lr=0.05, **options)
    alone = model(sharded=False)
    expected = train(alone, build(alone.parameters(), engine="loop"), range(5), mine=False)
    whole = not cls.elementwise or cls in (gd.LARS, gd.LAMB)  # norms of whole tensors
    for engine in ["auto", "loop"] if whole else engines(cls):
        net = model()
        optimizer = build(net.parameters(), engine=engine)
        close(train(net, optimizer, range(5), mine=True), expected)
        # save after two steps by torch's distributed checkpoint, load into a new model and optimizer, go on
    first = model()
    optimizer = build(first.parameters())
    train(first, optimizer, range(2), mine=True)
    weights, state = get_state_dict(first, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    second = model()
    with torch.no_grad():
        for p in second.parameters():
            p.add_(1.0)
    resumed = cls(second.parameters(), lr=0.9, **options)
    weights, state = get_state_dict(second, resumed)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    set_state_dict(second, resumed, model_state_dict=weights, optim_state_dict=state)
    close(train(second, resumed, range(2, 5), mine=True), expected)
    # one process's infinity is a skip, or an error, of all; also where the host does not know it, as on a GPU
    alone = model(sharded=False)
    kept = build(alone.parameters(), engine="loop")
    expected = train(alone, kept, [1, 3], mine=False)
    for look in (known, lambda finite: True if finite is None else None):
        gd.core.known, net = look, model()
        careful = build(net.parameters(), nonfinite="skip")
        close(train(net, careful, [0, 1], mine=True, spoil=0 if rank else None), train_one(build))
        close(train(net, careful, [2, 3], mine=True, spoil=2 if rank else None), expected)
        assert careful.skipped_steps == 2
    gd.core.known = known
    net = model()
    before = [full(p.detach()) for p in net.parameters()]
    strict = build(net.parameters(), nonfinite="raise")
    wrong = functools.partial(train, net, strict, [0], mine=True, spoil=0 if rank else None)
    refused(wrong, "is not finite and nonfinite='raise'")
    close([full(p.detach()) for p in net.parameters()], before)
    print(f"{name} done", flush=True)

# an unsharded checkpoint is dealt out
alone, net = model(sharded=False), model()
whole = gd.AdamW(alone.parameters(), lr=0.05)
train(alone, whole, range(2), mine=False)
optimizer = gd.AdamW(net.parameters())
optimizer.load_state_dict(whole.state_dict())
state = optimizer.state[next(net.parameters())]
close(full(state["exp_avg"]), whole.state[next(alone.parameters())]["exp_avg"])

# what needs whole matrices says so, and so do engines that cannot reduce
weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
refused(gd.Muon([weight]).step, "a parameter, (4, 3): it is sharded over processes (DTensor), and Muon needs all of it")
refused(gd.Adafactor([weight], engine="compile").step, "where Adafactor has no engine='compile'")
refused(gd.LARS([weight], engine="foreach").step, "where LARS has no engine='foreach'")
refused(lambda: gd.CLARS(fully_shard(nn.Linear(3, 4), mesh=mesh)), "where CLARS sees no example's gradient")
weight.grad = distribute_tensor(torch.full((4, 3), 5.0), mesh, [Shard(0)])
assert abs(gd.clip_by_norm_([weight], 1.0).item() - 300**0.5) < 1e-5
torch.testing.assert_close(full(weight.grad), torch.full((4, 3), 12**-0.5))
gd.adaptive_clip_([weight], 0.1)
torch.testing.assert_close(full(weight.grad), torch.full((4, 3), 0.1))
bigger = gd.AdamW([weight])
bigger.step()
bigger.state[weight]["exp_avg"] = torch.zeros(6, 3)
refused(bigger.step, "its state 'exp_avg' has shape (6, 3), which has to be (4, 3)")
print("refusals done", flush=True)
dist.destroy_process_group()
