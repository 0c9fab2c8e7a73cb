"""nn.ConcatLinear in the place of nn.Linear, and inside the machinery of large training jobs."""

import pytest
import torch
from check import compiled
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mmfast.nn import ConcatLinear


def sources(grad=False):
    torch.manual_seed(1)
    return [torch.randn(4, 6, 8, requires_grad=grad), torch.randn(4, 1, 3, requires_grad=grad)]


def test_it_is_nn_linear_with_the_same_state_and_the_same_first_weights():
    torch.manual_seed(0)
    theirs = nn.Linear(11, 5)
    torch.manual_seed(0)
    ours = ConcatLinear([8, 3], 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    x, pooled = sources()
    torch.testing.assert_close(ours([x, pooled]), theirs(torch.cat([x, pooled.expand(4, 6, 3)], -1)))
    ours.load_state_dict(nn.Linear(11, 5).state_dict())


def test_norm_and_gate_add_their_own_parameters():
    layer = ConcatLinear([8, 3], 6, activation="swiglu", norm=True, gate="channel")
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (12, 11),
        "bias": (12,),
        "norm_weight": (11,),
        "norm_bias": (11,),
        "gate": (6,),
    }
    assert ConcatLinear([8], 6, bias=False, gate="scalar").gate.shape == (1,)
    assert "bias=True, activation=swiglu, norm_eps=1e-05, gate=channel" in repr(layer)


def test_a_closed_gate_with_a_residual_is_the_identity_and_opens_by_training():
    layer = ConcatLinear([8, 3], 6, gate="scalar")
    residual = torch.randn(4, 6, 6)
    out = layer(sources(), residual=residual)
    assert torch.equal(out, residual)
    out.square().sum().backward()
    assert layer.gate.grad.abs() > 0


@pytest.mark.parametrize("arguments", [{"in_features": []}, {"in_features": [3], "gate": "vector"}])
def test_a_wrong_description_is_refused(arguments):
    with pytest.raises(ValueError, match="ConcatLinear"):
        ConcatLinear(out_features=4, **arguments)


class Block(nn.Module):
    def __init__(self, rematerialise):
        super().__init__()
        self.fuse = ConcatLinear([8, 3], 8, activation="gelu", norm=True, gate="channel")
        self.rematerialise = rematerialise

    def forward(self, x, pooled, present):
        def fuse(x, pooled):
            return self.fuse([x, pooled], present=present, residual=x)

        return checkpoint(fuse, x, pooled, use_reentrant=False) if self.rematerialise else fuse(x, pooled)


class Tower(nn.Module):
    def __init__(self, rematerialise=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(rematerialise) for _ in range(2))

    def forward(self, x, pooled, present):
        for block in self.blocks:
            x = block(x, pooled, present)
        return x


def tower(rematerialise=False):
    torch.manual_seed(0)
    model = Tower(rematerialise)
    with torch.no_grad():
        for block in model.blocks:
            block.fuse.gate.normal_()
    return model


def step(model, call):
    x, pooled = sources()
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    out = call(x, pooled, present)
    out.square().mean().backward()
    gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    return [out.detach(), *gradients]


def test_checkpointing_compile_and_fsdp2_together(one_rank):
    plain = tower()
    meant = step(plain, plain)
    model = tower(rematerialise=True)
    for block in model.blocks:
        fully_shard(block, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(model, model), meant, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_mixed_precision_casts_every_parameter(one_rank):
    model = tower()
    for block in model.blocks:
        fully_shard(block, mesh=one_rank, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    out, *gradients = step(model, model)
    assert out.dtype == torch.bfloat16 and all(
        g.dtype == torch.float32 and g.isfinite().all() for g in gradients
    )


def test_checkpointing_alone_and_compile_alone():
    plain = tower()
    meant = step(plain, plain)
    again = tower(rematerialise=True)
    graph = tower()
    for model, call in ((again, again), (graph, compiled(graph))):
        for ours, theirs in zip(step(model, call), meant, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
