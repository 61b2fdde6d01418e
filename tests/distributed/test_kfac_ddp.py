"""K-FAC, EKFAC and FOOF under DistributedDataParallel: equal on all processes, and equal to one on the whole batch."""

from tests.distributed.launch import torchrun


def test_replicas_stay_equal_and_equal_one_process():
    assert torchrun("kfac_ddp.py").count("done") == 2
