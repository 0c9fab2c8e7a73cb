"""Every op with CPU kernels, forward and backward, in the forked workers of a data loader."""

from pathlib import Path

import pytest
import test_concat_linear
import test_contrastive_loss
import test_cross_attention
import test_cross_attention_cpu
import test_group_norm
import test_lowrank_fusion
import test_weighted_fusion
import torch
from check import cast, python, run, same_bits, threads

from mmfast.ops import available

OPS = {
    "concat_linear": (
        test_concat_linear.on("cpu"),
        lambda n: test_concat_linear.example(((6, 50, 64), (6, 1, 32)), 48, seed=n),
    ),
    "contrastive_loss": (
        test_contrastive_loss.ours("cpu"),
        lambda n: test_contrastive_loss.example(300, problems=1, seed=n),
    ),
    "cross_attention": (
        test_cross_attention.all_of(test_cross_attention.on("cpu")),
        lambda n: test_cross_attention.example(
            1, **test_cross_attention_cpu.SPLIT, lengths=True, bias=2, seed=n
        ),
    ),
    "group_norm": (test_group_norm.on("cpu"), lambda n: test_group_norm.example((8, 32, 14, 14), seed=n)),
    "lowrank_fusion": (
        test_lowrank_fusion.on("cpu"),
        lambda n: test_lowrank_fusion.example((64, 32, 16), 300, width=48, present=True, seed=n),
    ),
    "weighted_fusion": (
        test_weighted_fusion.on("cpu"),
        lambda n: test_weighted_fusion.example(((60, 50, 64), (60, 1, 64)), present=True, seed=n),
    ),
}


class _Made(torch.utils.data.Dataset):
    def __init__(self, op):
        self.op = op

    def __len__(self):
        return 2

    def __getitem__(self, n):
        function, example = OPS[self.op]
        return run(function, cast(example(n), torch.float32))


def in_forked_workers(op):
    """The parent's threads exist already when its workers are forked; they do not come along."""
    made = _Made(op)
    with threads(1):  # as in a worker: how work is split follows the number of threads
        wanted = [made[n] for n in range(2)]
    with threads(2):
        made[0]
        workers = torch.utils.data.DataLoader(
            made, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        for found, meant in zip(workers, wanted, strict=True):
            assert found.keys() == meant.keys() and len(meant) > 1
            assert all(same_bits(found[key], meant[key]) for key in meant)


@pytest.mark.parametrize("op", OPS)
def test_it_runs_forward_and_backward_in_forked_workers(op):
    """In a fresh process: PyTorch's autograd refuses to run in a fork once it has had threads of its own."""
    if available(op, "cpu")["cpu"] != "ready":
        pytest.skip("the native CPU library is not there")
    here = str(Path(__file__).parent)
    python(f"import sys; sys.path.append({here!r}); import {__name__}; {__name__}.in_forked_workers({op!r})")
