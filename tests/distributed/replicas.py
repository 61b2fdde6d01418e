"""Matrix methods and diagonal curvature on two processes, under torchrun; test_replicas.py says what it checks."""

import functools

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd
from guided_descent.curvature import GGN

torch.set_default_dtype(torch.float64)
MATRICES = {
    "Shampoo": (gd.Shampoo, {"precondition_every": 2}),
    "Shampoo, blocks": (gd.Shampoo, {"precondition_every": 1, "block_size": 4, "exponent": -0.5}),
    "SOAP": (gd.SOAP, {"precondition_every": 2}),
    "KL-SOAP": (gd.SOAP, {"precondition_every": 3, "kl": True}),
    "KLShampoo": (gd.KLShampoo, {"precondition_every": 2}),
    "PSGDKron": (gd.PSGDKron, {}),
}
DIAGONAL = {
    "AdaHessian": (gd.AdaHessian, {"hessian_update_every": 2}),
    "Sophia": (gd.Sophia, {"hessian_update_every": 2, "samples": 2, "rho": 1.0, "eps": 1e-3}),
}


class Net(nn.Module):
    """An embedding, a layer, a norm, a loose scale, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.norm = nn.Embedding(20, 6), nn.Linear(6, 8), nn.LayerNorm(8)
        self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(8, 4)

    def forward(self, i):
        return self.head(self.norm(self.hidden(self.embed(i)).tanh()).mean(1) * self.scale)


def batch(t, n=24):
    generator = torch.Generator().manual_seed(t)
    i, noise = torch.randint(20, (n, 5), generator=generator), torch.randint(4, (n,), generator=generator)
    return i, (i.sum(1) + noise) % 4


def train(model, optimizer, rows, steps, spoil=None):
    for t in range(steps):
        i, y = batch(t)

        def loss(i=i, y=y, t=t):
            return cross_entropy(model(i[rows]), y[rows]) * (float("inf") if t == spoil else 1.0)

        if optimizer.differentiates:
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spread(x):
    """The largest difference between processes."""
    first = x.clone()
    distributed.broadcast(first, 0)
    gap = (x - first).abs().max()
    distributed.all_reduce(gap, distributed.ReduceOp.MAX)
    return float(gap)


def state(optimizer):
    return torch.cat([x.flatten() for s in optimizer.state.values() for x in s.values()])


def refused(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
        return
    raise AssertionError(f"nothing was refused: {words}")


def replicas(rank, alone_group):
    mine = slice(12 * rank, 12 * rank + 12)
    for name, (method, options) in {**MATRICES, **DIAGONAL}.items():
        alone, ours = Net(), Net()
        own = {"process_group": alone_group} if name in DIAGONAL else {}
        reference = method(alone.parameters(), lr=0.02, **options, **own)
        ddp = DistributedDataParallel(ours)
        optimizer = method(ours.parameters(), lr=0.02, **options)
        train(alone, reference, slice(None), 8)
        train(ddp, optimizer, mine, 8)
        assert spread(flat(ours)) == 0 and spread(state(optimizer)) == 0, name
        # gradients that were averaged differ by rounding, which a power step amplifies in directions that are empty
        rounding = 1e-5 if method is gd.SOAP else 1e-8
        assert (flat(ours) - flat(alone)).abs().max() < rounding, (name, (flat(ours) - flat(alone)).abs().max())
        before = flat(ours)  # one process's infinity is a skip of all
        train(ddp, optimizer, mine, 1, spoil=0 if rank else None)
        assert torch.equal(flat(ours), before) and optimizer.skipped_steps == 1, name
        assert not torch.equal(before, flat(Net()))
        print(f"{name} done", flush=True)


def drawn(rank):
    """Labels are drawn on each process; replicas stay equal, and the estimate is that of the whole batch."""
    model, i, y = Net(), *batch(0)
    rows = (slice(0, 8), slice(8, 24))[rank]  # shares of different sizes
    ddp = DistributedDataParallel(model)
    options = {"estimator": "gnb", "hessian_update_every": 1, "betas": (0.0, 0.0), "samples": 8}
    optimizer = gd.Sophia(model.parameters(), lr=0.0, model=ddp, **options)
    mean, draws = 0.0, 400
    for _ in range(draws):
        optimizer.zero_grad()
        cross_entropy(ddp(i[rows]), y[rows]).backward()
        optimizer.step()
        estimate = torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()])
        mean = mean + estimate / draws
    assert spread(estimate) == 0
    exact = GGN(Net(), nn.CrossEntropyLoss(), (i, y)).diagonal()
    assert abs(mean.sum() / exact.sum() - 1) < 0.05, mean.sum() / exact.sum()
    big = exact > exact.mean()
    assert ((mean / exact)[big] - 1).abs().median() < 0.08
    first = cross_entropy(ddp(i[:8]), y[:8])  # equal examples, other labels
    optimizer.zero_grad()
    first.backward()
    sums = torch.cat([s[0].flatten() for s in optimizer.sums.values()])
    assert spread(sums) > 0
    print("drawn done", flush=True)


def shards():
    """Parameters sharded by FSDP2 are refused, with what to do."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name, (method, options) in {**MATRICES, **DIAGONAL}.items():
        p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        if name in DIAGONAL:
            refused(functools.partial(method, [p], **options), "is sharded over processes; use AdamW for it")
        else:
            words = f"is sharded over processes (DTensor), and {method.__name__} needs all of it; "
            words += "put it into a group with algorithm='adamw'"
            refused(method([p], **options).step, words)
            mixed = method([{"params": [p], "algorithm": "adamw"}], **options)
            mixed.step()
    print("shards done", flush=True)


distributed.init_process_group("gloo")
process = distributed.get_rank()
groups = [distributed.new_group([r]) for r in range(distributed.get_world_size())]
replicas(process, groups[process])
drawn(process)
shards()
distributed.destroy_process_group()
