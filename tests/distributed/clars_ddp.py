"""CLARS under DistributedDataParallel, against one process; started by test_clars_ddp.py under torchrun."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()


def train(data_parallel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    net = DistributedDataParallel(model) if data_parallel else model
    alone = {} if data_parallel else {"process_group": groups[rank]}
    optimizer = gd.CLARS(net, lr=0.2, trust=0.5, weight_decay=0.1, **alone)
    for t in range(4):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        if data_parallel:
            x, y = x.chunk(count)[rank], y.chunk(count)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


groups = [dist.new_group([k]) for k in range(count)]
torch.testing.assert_close(train(True), train(False), rtol=1e-12, atol=1e-12)
model = nn.Linear(3, 2)
optimizer = gd.CLARS(model)
model(torch.ones(2, 3)).sum().backward()
try:
    optimizer.step()
except RuntimeError as error:
    assert "pass process_group=" in str(error), error
else:
    raise AssertionError("CLARS stepped on several processes without knowing them")
print("done", flush=True)
dist.destroy_process_group()
