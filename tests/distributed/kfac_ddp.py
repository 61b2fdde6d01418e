"""K-FAC on two processes, under torchrun; test_kfac_ddp.py says what it checks."""

import copy
import functools
import math
import os
import warnings

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd
from guided_descent.kfac import EKFAC, FOOF, KFAC

torch.set_default_dtype(torch.float64)
METHODS = {"KFAC": KFAC, "EKFAC": EKFAC, "FOOF": FOOF}


class Net(nn.Module):
    """Two layers, an embedding and a norm, and a loose scale."""

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


def train(model, optimizer, rows, steps, uneven=False):
    for t in range(steps):
        i, y = batch(t)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(i[rows]), y[rows])
        if uneven:  # DDP takes the mean over processes; so that it is the mean over examples:
            loss = loss * len(y[rows]) * distributed.get_world_size() / len(y)
        loss.backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spread(model):
    """The largest difference of parameters between processes."""
    mine = flat(model)
    first = mine.clone()
    distributed.broadcast(first, 0)
    gap = (mine - first).abs().max()
    distributed.all_reduce(gap, distributed.ReduceOp.MAX)
    return float(gap)


def refused(call, words):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        assert words in str(error), error
        return
    raise AssertionError(f"nothing was refused: {words}")


def main():
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mine = [distributed.new_group([r]) for r in range(distributed.get_world_size())][rank]
    even, uneven = slice(12 * rank, 12 * rank + 12), (slice(0, 7), slice(7, 24))[rank]
    for name, method in METHODS.items():
        exact = {} if method is FOOF else {"fisher": "type-2"}
        for wrapped_first in (True, False):
            for share in (even, uneven):
                # an absolute scale of the loss is meant where shares are uneven
                options = exact if method is FOOF else {**exact, "reduction": "mean"}
                alone, ours = Net(), Net()
                reference = method(alone, 0.3, process_group=mine, **options)
                ddp = DistributedDataParallel(ours)
                optimizer = method(ddp if wrapped_first else ours, 0.3, **options)
                assert optimizer.coverage()["layers"] == reference.coverage()["layers"]
                train(alone, reference, slice(None), 12)
                train(ddp, optimizer, share, 12, uneven=share is uneven)
                assert spread(ours) == 0, (name, spread(ours))
                torch.testing.assert_close(flat(ours), flat(alone), rtol=1e-8, atol=1e-9)
        drawn = {} if method is FOOF else {"fisher": "mc"}
        model = Net()
        ddp = DistributedDataParallel(model)
        optimizer = method(model, 0.3, factor_update_every=2, inverse_update_every=3, **drawn)
        train(ddp, optimizer, even, 12)
        optimizer.factor_update_every = 1
        optimizer._prepare()
        assert spread(model) == 0, name
        twin = copy.deepcopy(optimizer)  # process groups cannot be copied, and are found again
        assert twin.capture.process_group is None
        # infinite on one process: skipped on all
        i, y = batch(99)
        before = flat(model)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(i[even]), y[even])
        (loss * (math.inf if rank else 1.0)).backward()
        optimizer.step()
        assert torch.equal(flat(model), before) and optimizer.skipped_steps == 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(i[even]), y[even]).backward()
        if rank:
            optimizer.pending[optimizer.capture.layers[-1]]["A"].fill_(math.nan)
        optimizer.step()
        assert torch.equal(flat(model), before) and optimizer.skipped_steps == 2
        train(ddp, optimizer, even, 2)
        assert spread(model) == 0 and not torch.equal(flat(model), before)
    draws()
    tokens()
    refusals()
    distributed.destroy_process_group()


def draws():
    """Each process draws targets of its own, also of the same examples."""
    model, seen = Net(), []
    ddp = DistributedDataParallel(model)
    optimizer = KFAC(ddp, 0.3)
    i, y = batch(0)
    statistics = optimizer.statistics

    def keep(layer, a, g):
        if layer.name == "head":
            seen.append(g.clone())
        return statistics(layer, a, g)

    optimizer.statistics = keep
    nn.functional.cross_entropy(ddp(i), y).backward()
    first = seen[0].clone()
    distributed.broadcast(first, 0)
    assert distributed.get_rank() == 0 or not torch.equal(first, seen[0])


def tokens():
    """The scale of a loss is that of its mean over processes, whose shares may differ."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    i, y = batch(0)
    y[4 : len(y) // 2] = -100  # the first process has few targets
    rows = slice(12 * rank, 12 * rank + 12)
    for times in (1, 3):
        model = Net()
        ddp = DistributedDataParallel(model)
        optimizer, before = KFAC(ddp), flat(model)
        total = nn.functional.cross_entropy(ddp(i[rows]), y[rows], reduction="sum")
        (times * total * world / (y >= 0).sum()).backward()
        if times == 3:
            refused(optimizer.step, "the loss is 3 times the mean over the 12 rows")
        else:
            optimizer.step()
        assert torch.equal(flat(model), before) == (times == 3)


def vectors():
    """Methods that evaluate the loss themselves: refused on a loss of one process, right on the mean over all."""
    rank = distributed.get_rank()
    data = [torch.arange(6.0).view(3, 2).cos() + k for k in range(distributed.get_world_size())]

    def run(method, loss, steps=3):
        w = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = method([w])

        def closure():
            optimizer.zero_grad()
            value = loss(w)
            if not optimizer.differentiates:
                value.backward()
            return value

        for _ in range(steps):
            optimizer.step(closure)
        return w.detach()

    def mean(w):
        return torch.stack([(x @ w - 1).square().mean() for x in data]).mean()

    for method in (gd.BFGS, gd.LBFGS, gd.Newton, gd.NewtonCG):
        refused(lambda: run(method, lambda w: (data[rank] @ w - 1).square().mean()), "would drift apart on them")  # noqa: B023
        seen = [torch.zeros(2) for _ in data]
        distributed.all_gather(seen, run(method, mean))
        assert all(torch.equal(x, seen[0]) for x in seen) and mean(seen[0]) < mean(torch.tensor([1.0, -2.0]))


def refusals():
    model = Net()
    optimizer = KFAC(model)
    i, y = batch(0)
    nn.functional.cross_entropy(model(i), y).backward()
    refused(optimizer.step, "wrap the model in DistributedDataParallel, or pass process_group=")
    model = Net()
    ddp = DistributedDataParallel(model)
    optimizer = KFAC(ddp, reduction="sum")
    nn.functional.cross_entropy(ddp(i), y, reduction="sum").backward()
    refused(optimizer.step, "reduction='sum' is not supported on several processes")
    vectors()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)))
    for method in METHODS.values():
        refused(functools.partial(method, sharded), "is sharded over processes (DTensor)")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
    print("done", os.environ["RANK"])
