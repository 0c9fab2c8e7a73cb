"""``mmfast.explain``: what it says, and that it leaves everything as it was."""

import copy

import pytest
import torch
from graphs import CASES
from late_fusion import LateFusion, batch, model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import mmfast
from mmfast.compiler._explain import _copies


@pytest.mark.inductor
def test_explain_says_what_was_found_and_what_it_brought(capsys, monkeypatch):
    monkeypatch.setattr("mmfast.compiler._explain.SECONDS", 0.0)
    monkeypatch.setattr("mmfast.compiler._worth.slower", lambda match: "")
    ours = model()
    state = copy.deepcopy(ours.state_dict())
    told = mmfast.explain(ours, *batch())
    assert capsys.readouterr().out == f"{told}\n"
    assert [(f.op, f.replaced) for f in told.findings] == [("concat_linear", True), ("cross_attention", True)]
    lines = str(told).splitlines()
    assert lines[0] == "2 found in 1 graph, 2 replaced"
    assert "late_fusion.py:" in lines[1] and lines[1].endswith("2 sources, 1 of them broadcast, norm, gelu")
    assert lines[2].endswith("2 streams, key padding masks")
    assert lines[3].startswith("forward + backward: ") and told.before > 0 and told.after > 0
    assert all(p.grad is None for p in ours.parameters())
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in state.items())
    inputs = [torch.randn(shape) for shape in CASES["expanded"].shapes.values()]
    assert mmfast.explain(CASES["expanded"].function, *inputs).measured == "forward"
    with torch._dynamo.config.patch(recompile_limit=1):  # what was explained before is not in the way
        assert mmfast.explain(CASES["expanded"].function, *inputs).graphs == 1


class Mixed(LateFusion):
    """With statistics and dropout, and ways to be called."""

    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm1d(24)

    def forward(self, patches, *, sentence, seen, edited=None, split=False):
        patches = self.statistics(patches.flatten(0, 1)).view_as(patches)
        if split:
            torch._dynamo.graph_break()
        if edited is not None:
            edited.mul_(2)
            patches = patches + edited[0]
        return super().forward(patches, F.dropout(sentence, 0.1), seen)


@pytest.fixture
def explained(monkeypatch):
    """``explain`` without Inductor, with everything replaced; what it must leave as it was is looked at."""
    monkeypatch.setattr("mmfast.compiler._explain.SECONDS", 0.0)
    monkeypatch.setattr("mmfast.compiler._explain.ALONE", "aot_eager")
    monkeypatch.setattr("mmfast.compiler._explain.mmfast", torch._dynamo.lookup_backend("aot_eager"))
    monkeypatch.setattr("mmfast.compiler._worth.slower", lambda match: "")

    def kept(owner, tensors):
        full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in owner.state_dict().values()]
        gradients = [p.grad.clone() for p in owner.parameters()]
        return [t.clone() for t in (*full, *tensors, torch.get_rng_state())], gradients

    def explain(owner, inputs, **named):
        for p in owner.parameters():
            p.grad = torch.ones_like(p)
        grads, tensors = [p.grad for p in owner.parameters()], (*inputs, *named.values())
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
        before = kept(owner, tensors)
        told = mmfast.explain(owner, *inputs, **named)
        after = kept(owner, tensors)
        assert all(map(torch.equal, before[0], after[0])) and all(map(torch.equal, before[1], after[1]))
        assert all(p.grad is grad for p, grad in zip(owner.parameters(), grads, strict=True))
        assert all(t.grad is None and t.is_leaf for t in tensors)
        return told

    return explain


def test_explain_leaves_everything_as_it_was(explained):
    patches, sentence, seen = batch()
    told = explained(
        Mixed(), (patches.requires_grad_(),), sentence=sentence, seen=seen, edited=torch.ones(2, 24)
    )
    assert [finding.replaced for finding in told.findings] == [True, True]
    assert told.graphs == 1 and told.measured == "forward + backward"


def test_explain_tells_of_all_graphs_that_run_and_of_each_once(explained):
    class Counting(Mixed):
        calls = 0

        def forward(self, *inputs, **named):
            self.calls += 1  # a graph for each value
            return super().forward(*inputs, **named) * self.calls

    patches, sentence, seen = batch()
    ours = Counting()
    told = explained(ours, (patches,), sentence=sentence, seen=seen, split=True)
    assert [finding.op for finding in told.findings] == ["concat_linear", "cross_attention"]
    assert told.graphs == 3 and ours.calls == 0  # up to the break, from it on, and the product


def test_explain_says_what_is_left_and_why(explained, monkeypatch):
    monkeypatch.setattr("mmfast.compiler._worth.slower", lambda match: "not faster" * (match.op[1] == "r"))
    patches, sentence, seen = batch()
    lines = str(explained(Mixed(), (patches,), sentence=sentence, seen=seen)).splitlines()
    assert lines[0] == "2 found in 1 graph, 1 replaced"
    assert lines[1].startswith("  replaced  concat_linear") and lines[2].startswith(
        "  left      cross_attention"
    )
    assert lines[2].endswith(": not faster")


def test_explain_runs_a_model_that_cannot_be_copied_itself(explained, one_rank):
    ours = Mixed()
    fully_shard(ours.head, mesh=one_rank)
    fully_shard(ours, mesh=one_rank)
    patches, sentence, seen = batch()
    told = explained(ours, (patches,), sentence=sentence, seen=seen)
    assert "concat_linear" in [finding.op for finding in told.findings if finding.replaced]
    assert told.measured == "forward + backward"
    with torch.no_grad():
        assert explained(ours, (patches,), sentence=sentence, seen=seen).measured == "forward"


def test_copies_of_inputs_are_leaves_of_the_same_strides():
    whole = torch.arange(48.0).view(6, 8)
    weight = nn.Parameter(torch.randn(3, 4))
    history = torch.randn(4, requires_grad=True) * 2
    given = {
        "rows": whole[2:4],
        "columns": whole.t()[3:5],
        "wide": torch.randn(3, 1).expand(3, 5),
        "weight": weight,
        "again": [weight, history],
        "two": TwoTensor(torch.randn(3), torch.randn(3)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "number": 3,
    }
    made = _copies(given)
    before, after = (tree_leaves(tree) for tree in (given, made))
    for one, other in zip(before[:-1], after[:-1], strict=True):
        assert one is not other and torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr() or not one.data_ptr()
        assert (one.stride(), one.requires_grad) == (other.stride(), other.requires_grad)
        assert other.is_leaf
    assert made["again"][0] is made["weight"] and made["number"] == 3
    assert made["two"].a is not given["two"].a
    assert made["rows"].untyped_storage().nbytes() == 16 * 4  # not of the whole
