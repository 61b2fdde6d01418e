"""CLARS: the mean norm of the examples' gradients is that of all processes."""

from tests.distributed.launch import torchrun


def test_two_processes_take_the_steps_of_one():
    assert torchrun("clars_ddp.py").count("done") == 2
