"""Chapters 09 and 10 under DistributedDataParallel: equal on all processes, and to one on the whole batch."""

from tests.distributed.launch import torchrun


def test_replicas_stay_equal_and_equal_one_process():
    assert torchrun("replicas.py").count("done") == 2 * (6 + 2 + 1 + 1)
