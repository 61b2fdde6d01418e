"""FSDP2: sharded parameters take the steps of one process, on every engine, through checkpoints and refusals."""

from tests.distributed.launch import torchrun


def test_shards_take_the_steps_of_one_process(tmp_path):
    printed = torchrun("sharded.py", str(tmp_path))
    assert printed.count("done") == 2 * (15 + 1)
