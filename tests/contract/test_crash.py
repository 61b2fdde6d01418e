"""A training process that is killed at any moment resumes to exactly the run that was never killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys, torch
import guided_descent as gd
folder, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
optimizer = getattr(gd, name)(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
start, path = 0, os.path.join(folder, "checkpoint.pt")
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    start = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
for t in range(start, steps):
    batch = torch.randn(32, 8, generator=torch.Generator().manual_seed(t))
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    scheduler.step()
    state = {"step": t + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["scheduler"] = scheduler.state_dict()
    torch.save(state, path + ".new")
    os.replace(path + ".new", path)
    print(t, flush=True)
"""


def start(folder, name, steps):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(folder), name, str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_killed_at_random_moments(tmp_path, name):
    steps, rng = 400, random.Random(0)  # many more than a slow reader of the pipe can lag behind
    whole = start(tmp_path / "whole", name, steps)
    assert whole.wait() == 0
    for kill in range(3):
        process = start(tmp_path / "killed", name, steps)
        for _ in range(rng.randint(2, 12)):  # some steps, then some instant within one
            if not process.stdout.readline():
                break
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"the run ended before kill {kill}"
    assert start(tmp_path / "killed", name, steps).wait() == 0
    a, b = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "killed"))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
