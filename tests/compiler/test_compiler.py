"""``torch.compile(backend="mmfast")`` in whole models: training, autocast, checkpoints, FSDP2, dynamic shapes."""

import copy
import importlib
from contextlib import nullcontext
from importlib.metadata import entry_points

import pytest
import torch
from graphs import CASES
from late_fusion import batch, model
from rewriting import assert_promised, counted, rewritten
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast.compiler import mmfast as backend
from mmfast.compiler import rewrite
from mmfast.ops import concat_linear, contrastive_loss, cross_attention, native_calls

NATIVE = "cpu" in {
    name for name, state in mmfast.ops.available("concat_linear", "cpu").items() if state == "ready"
}
needs_kernels = pytest.mark.skipif(not NATIVE, reason="the CPU kernels were not built")


class Pair(nn.Module):
    """CLIP: an image and a text tower, and the loss over all pairs of them."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(24, 32), nn.Linear(12, 32)
        self.log_scale = nn.Parameter(torch.ones(1))

    def forward(self, patches, sentence, seen):
        x = checkpoint(lambda x: F.gelu(self.image(x)).mean(1), patches, use_reentrant=False)
        a, b = F.normalize(x, dim=-1), F.normalize(self.text(sentence), dim=-1)
        logits, target = self.log_scale.exp() * a @ b.t(), torch.arange(len(a))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def pair():
    torch.manual_seed(0)
    return Pair()


def step(call, owner, inputs):
    """The output and every parameter's gradient."""
    out = call(*inputs)
    (out.float() if out.dtype == torch.bfloat16 else out).square().sum().backward()
    gradients = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in owner.parameters()
    ]
    return [out.detach(), *gradients]


def as_promised(got, owner, inputs, dtype=None):
    """Against the model that nobody compiled, in float64; where ``dtype`` is given, it rounds under autocast."""
    exact = copy.deepcopy(owner).double()
    meant = step(exact, exact, [t.double() if t.is_floating_point() else t for t in inputs])
    plain = copy.deepcopy(owner)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        same = step(plain, plain, inputs)
    for i, (ours, theirs, wanted) in enumerate(zip(got, same, meant, strict=True)):
        assert ours.dtype == theirs.dtype
        own = (theirs.double() - wanted).abs().max().item()
        assert_promised(ours.to(dtype or ours.dtype), wanted, own, f"output {i}")


def everything(graph, inputs):
    """The backend with what is found here replaced, however small it is."""
    assert all(finding.replaced for finding in rewrite(graph, only_faster=False))
    assert counted([graph], concat_linear) == counted([graph], cross_attention) == 1
    return backend(graph, inputs)


@pytest.mark.inductor
def test_a_training_step():
    ours = model()
    call = torch.compile(ours, backend=everything, fullgraph=True)
    as_promised(step(call, ours, batch()), model(), batch())


@pytest.mark.inductor
@pytest.mark.parametrize("inside", [True, False], ids=["inside the model", "around it"])
def test_a_training_step_under_autocast(inside):
    ours = model(rematerialise=inside)

    def within(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(*inputs)

    with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        got = step(
            torch.compile(within if inside else ours, backend=everything, fullgraph=True), ours, batch()
        )
    as_promised(got, model(), batch(), torch.bfloat16)


def test_what_autocast_would_round_before_a_norm_is_left():
    def norm_of_float32(x, pooled, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.layer_norm(torch.cat([x, pooled], -1), (20,)), weight)

    _, (finding,), _ = _found(norm_of_float32, torch.randn(3, 8), torch.randn(3, 12), torch.randn(5, 20))
    assert not finding.replaced and "autocast would round" in finding.why


def test_a_residual_that_is_wider_than_the_product_stays_outside():
    def mixed(x, pooled, weight, residual):
        with torch.autocast("cpu", torch.bfloat16):
            return residual + F.linear(torch.cat([x, pooled], -1), weight)

    inputs = torch.randn(3, 8), torch.randn(3, 12), torch.randn(5, 20), torch.randn(3, 5)
    call, (finding,), _ = _found(mixed, *inputs)
    assert finding.replaced and "residual" not in finding.why and call(*inputs).dtype == torch.float32


def _found(function, *inputs):
    call, found, graphs = rewritten(function)
    call(*inputs)
    return call, found, graphs


@needs_kernels
def test_a_checkpointed_region_is_rewritten_and_computed_again():
    ours = model(rematerialise=True)
    call, found, graphs = rewritten(ours)
    before = native_calls("concat_linear.cpu")
    got = step(call, ours, batch())
    assert sorted((f.op, f.replaced) for f in found) == [("concat_linear", True), ("cross_attention", True)]
    assert counted(graphs, concat_linear) == 1 and counted(graphs, torch.cat) == 0
    assert native_calls("concat_linear.cpu") == before + 2  # forward, and once more before the backward
    as_promised(got, model(), batch())


def test_checkpointed_regions_may_share_what_they_read():
    def twice(x, pooled, weight):
        def region(x):
            return F.silu(F.linear(torch.cat([x, pooled[:, None].expand(-1, 5, -1)], -1), weight))

        for _ in range(2):
            x = checkpoint(region, x, use_reentrant=False)
        return x

    _, found, _ = _found(twice, torch.randn(3, 5, 8), torch.randn(3, 4), torch.randn(8, 12))
    assert [finding.replaced for finding in found] == [True, True]


def test_a_checkpointed_region_whose_input_is_edited_later_is_left():
    def edited(x, pooled, weight):
        x = x.clone()
        y = checkpoint(lambda x: F.linear(torch.cat([x, pooled], -1), weight), x, use_reentrant=False)
        return x.mul_(2).sum() + y

    weight = torch.randn(8, 12, requires_grad=True)
    _, found, _ = _found(edited, torch.randn(3, 8), torch.randn(3, 4), weight)
    assert [finding.replaced for finding in found] == [False] and "edited in place" in found[0].why


@pytest.mark.parametrize("change", [torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_a_cast_that_loses_something_is_part_of_no_pattern(change):
    def rounded(q, k1, k2):
        keys = torch.cat([k1, k2], 2)
        return (q @ keys.mT).softmax(-1).to(change).to(q.dtype) @ keys

    def targets(image, text):
        target = torch.arange(6).to(change).long()
        logits = image @ text.T
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    _, found, _ = _found(rounded, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4))
    assert not found
    if change != torch.float8_e4m3fn:  # which holds no target but 0
        _, found, _ = _found(targets, torch.randn(6, 8), torch.randn(6, 8))
        assert [finding.replaced for finding in found] == [change == torch.int64]


def test_what_is_written_to_by_the_way_is_written_to():
    def into(a, b, weight):
        room = torch.empty(3, 20)
        return F.linear(torch.cat([a, b], -1, out=room), weight) + room.sum()

    def statistics(a, b, weight):
        mean = torch.zeros(12)
        both = torch.cat([a, mean.expand(3, -1)], -1)
        F.batch_norm(b, mean, torch.ones(12), training=True)
        return F.linear(both, weight)

    def renormed(a, b, weight):
        both = torch.cat([a, b], -1)
        F.embedding(torch.tensor([1]), b, max_norm=0.1)
        return F.linear(both, weight)

    inputs = torch.randn(3, 8), torch.randn(3, 12), torch.randn(5, 20)
    for function, said in ((into, []), (statistics, ["edited"]), (renormed, ["edited"])):
        wanted = function(*(t.clone() for t in inputs))
        call, found, _ = rewritten(function)
        torch.testing.assert_close(call(*(t.clone() for t in inputs)), wanted)
        assert not any(finding.replaced for finding in found)
        assert len(found) == len(said) and all(w in f.why for w, f in zip(said, found, strict=True))


def test_floor_division_is_not_a_scale():
    def floored(image, text):
        logits = torch.div(image @ text.T, 0.5, rounding_mode="floor")
        target = torch.arange(6)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    assert not _found(floored, torch.randn(6, 8), torch.randn(6, 8))[1]


def test_the_loss_of_float64_features_keeps_their_digits():
    def over_a_temperature(image, text):
        logits, target = image @ text.T / 0.07, torch.arange(6)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    inputs = torch.randn(2, 6, 8, dtype=torch.float64)
    call, (finding,), _ = _found(over_a_temperature, *inputs)
    assert finding.replaced
    torch.testing.assert_close(call(*inputs), over_a_temperature(*inputs), rtol=1e-14, atol=0)


def test_a_weight_of_another_class_is_left():
    weight = TwoTensor(torch.randn(5, 20), torch.randn(5, 20))
    _, found, _ = _found(
        lambda a, b: F.linear(torch.cat([a, b], -1), weight), torch.randn(3, 8), torch.randn(3, 12)
    )
    assert not any(finding.replaced for finding in found)


def test_sizes_that_only_the_data_tell_are_no_obstacle():
    def some(x, pooled, weight, n):
        n = n.item()
        return F.linear(torch.cat([x[:n], pooled[None].expand(n, -1)], -1), weight)

    inputs = torch.randn(7, 8), torch.randn(12), torch.randn(5, 20), torch.tensor(4)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        call, found, _ = _found(some, *inputs)
    assert len(found) == 1
    torch.testing.assert_close(call(*inputs), some(*inputs))


def test_a_clip_loss_under_autocast():
    def loss(image, text, scale):
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = scale * image @ text.T, torch.arange(6)
            return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    inputs = [t.requires_grad_() for t in (*torch.randn(2, 6, 8), torch.tensor(3.0))]
    call, (finding,), _ = _found(loss, *inputs)
    assert finding.replaced and call(*inputs).dtype == torch.float32
    exact = loss(*inputs).double()
    assert_promised(call(*inputs).bfloat16(), exact, 0.02 * exact.item(), "loss")


def test_a_new_batch_size_compiles_once_more_and_never_again():
    counter = CompileCounterWithBackend(
        lambda graph, _: (rewrite(graph, only_faster=False), graph.forward)[1]
    )
    ours = model()
    call = torch.compile(ours, backend=counter, fullgraph=True)
    for size in range(2, 12):
        as_promised(step(call, ours, batch(size)), model(), batch(size))
        ours.zero_grad()
    assert counter.frame_count <= 2
    assert (
        counted(counter.graphs, concat_linear)
        == counted(counter.graphs, cross_attention)
        == len(counter.graphs)
    )


@pytest.mark.parametrize(
    ("make", "ops"),
    [(lambda: model(rematerialise=True), (concat_linear, cross_attention)), (pair, (contrastive_loss,))],
    ids=["late fusion", "CLIP"],
)
def test_fsdp2_and_checkpointing(one_rank, make, ops):
    ours = make()
    fully_shard(ours, mesh=one_rank)
    graphs = []

    def keep(graph, inputs):
        assert all(finding.replaced for finding in rewrite(graph, only_faster=False))
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    ours.compile(backend=keep, fullgraph=True)
    as_promised(step(ours, ours, batch()), make(), batch())
    assert [counted(graphs, op) for op in ops] == [1] * len(ops)


def test_without_gradients_a_later_edit_is_harmless():
    def edited(a, b, weight):
        a = a.clone()
        y = F.linear(torch.cat([a, b], -1), weight)
        return a.mul_(2).sum() + y

    a, b, weight = torch.randn(3, 8), torch.randn(3, 12), torch.randn(5, 20)
    call, (finding,), _ = _found(edited, a, b, weight)
    assert finding.replaced
    torch.testing.assert_close(call(a, b, weight), edited(a, b, weight))


@needs_kernels
@pytest.mark.inductor
def test_it_is_found_by_its_name_and_takes_modes_and_options(monkeypatch):
    monkeypatch.setattr("mmfast.compiler._worth.slower", lambda match: "")
    (entry,) = entry_points(group="torch_dynamo_backends", name="mmfast")
    assert entry.load() is backend
    case = CASES["expanded"]
    inputs = [torch.randn(shape) for shape in case.shapes.values()]
    for options in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue-fusion": False}}):
        call = torch.compile(case.function, backend="mmfast", **options)
        before = native_calls("concat_linear.cpu")
        torch.testing.assert_close(call(*inputs), case.function(*inputs), rtol=1e-5, atol=1e-5)
        assert native_calls("concat_linear.cpu") == before + 1


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "replaced", "why"),
    [((64, 196), True, "2 sources, 1 of them broadcast, relu"), ((2, 3), False, "not faster")],
)
def test_only_what_the_table_calls_faster_is_replaced(rows, replaced, why):
    def late(x, pooled, weight):
        return torch.relu(F.linear(torch.cat([x, pooled[:, None].expand(-1, x.shape[1], -1)], -1), weight))

    call, found, _ = rewritten(late, only_faster=True)
    call(torch.randn(*rows, 64), torch.randn(rows[0], 192), torch.randn(96, 256))
    assert [finding.replaced for finding in found] == [replaced] and why in found[0].why


@needs_kernels
@pytest.mark.parametrize("features", [16, 32])
@pytest.mark.parametrize("layer", [False, True])
def test_narrow_heads_over_one_stream_are_left_to_pytorch_in_float32(features, layer):
    mha = torch.nn.MultiheadAttention(2 * features, 2, batch_first=True)

    def attend(query, key):
        if layer:
            return mha(query, key, key, need_weights=False)[0]
        query, key = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (query, key))
        return F.scaled_dot_product_attention(query, key, key)

    call, found, _ = rewritten(attend, only_faster=True)
    call(torch.randn(1, 6000, 2 * features), torch.randn(1, 6000, 2 * features))
    (finding,) = found
    assert finding.replaced == (features == 32)
    assert finding.replaced or "not faster: heads of 16 features" in finding.why


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [64, 128])
def test_products_of_wide_heads_are_left_unless_there_is_a_mask(features, masked):
    def attend(query, key, seen):
        logits = query @ key.mT
        logits = logits.masked_fill(~seen[:, None], -torch.inf) if masked else logits
        return logits.softmax(-1) @ key

    call, found, _ = rewritten(attend, only_faster=True)
    query, key = torch.randn(1, 4000, features), torch.randn(1, 2000, features)
    call(query, key, torch.ones(1, 2000, dtype=torch.bool))
    assert [finding.replaced for finding in found] == [masked or features == 64]


@needs_kernels
def test_what_nobody_has_measured_is_left(monkeypatch):
    monkeypatch.setattr("mmfast.compiler._worth.measured", lambda op, device: {"compiler": {}})
    for name in ("sdpa", "clip"):
        call, found, _ = rewritten(CASES[name].function, only_faster=True)
        call(*[torch.randn(shape) for shape in CASES[name].shapes.values()])
        assert [finding.why for finding in found] == ["it is not measured in float32"]


def test_a_device_without_a_measured_kernel_keeps_its_model(monkeypatch):
    monkeypatch.setattr("mmfast.compiler._worth.choose", lambda op, device: "reference")
    call, found, _ = rewritten(CASES["sdpa"].function, only_faster=True)
    call(*[torch.randn(shape) for shape in CASES["sdpa"].shapes.values()])
    assert [finding.why for finding in found] == ["no kernel of it is measured for cpu"]


@pytest.mark.inductor
@pytest.mark.parametrize("broken", ["__init__.Body", "_worth.slower", "__init__._spare", "__init__.write"])
@pytest.mark.parametrize("rematerialise", [False, True])
def test_an_error_of_the_search_leaves_the_graph_as_it_was(broken, rematerialise, monkeypatch, caplog):
    place, function = broken.split(".")
    place = importlib.import_module(f"mmfast.compiler{'' if place == '__init__' else f'.{place}'}")
    works, calls = getattr(place, function), []
    monkeypatch.setattr("mmfast.compiler._worth.slower", lambda match: "")

    def fails(*args):
        calls.append(args)
        if len(calls) == (2 if rematerialise or function in ("slower", "write") else 1):
            raise ZeroDivisionError("of the search")
        return "" if function == "slower" else works(*args)

    monkeypatch.setattr(place, function, fails)
    ours, printed = model(rematerialise=rematerialise), []

    def kept(graph, inputs):
        before = graph.print_readable(print_output=False)
        call = backend(graph, inputs)
        printed.append((before, graph.print_readable(print_output=False)))
        return call

    got = step(torch.compile(ours, backend=kept, fullgraph=True), ours, batch())
    as_promised(got, model(), batch())
    assert all(before == after for before, after in printed) and len(printed) == 1
    (record,) = [r for r in caplog.records if r.name == "mmfast.compiler"]
    assert "ZeroDivisionError: of the search" in record.getMessage()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_taken_in_the_graph_keep_their_gradients(checkpointed):
    def penalised(a, b, weight):
        def region(a):
            return F.silu(F.linear(torch.cat([a, b], -1), weight))

        a = a * 1.0
        y = (checkpoint(region, a, use_reentrant=False) if checkpointed else region(a)).sum()
        (slope,) = torch.autograd.grad(y, a, create_graph=True)
        return y + slope.square().sum()

    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (3, 4), (6, 12))]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        call, found, _ = rewritten(penalised)
        got = torch.autograd.grad(call(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(penalised(*inputs), inputs))
    assert [f.why for f in found] == [
        "gradients are taken inside the graph, and the op has no second derivative"
    ]


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_edits_inside_a_transform_are_seen(transform):
    def doubled(x):
        return transform(lambda row: row.clone().mul_(2).sum())(x)

    x = torch.randn(4, 3)
    call, _, _ = rewritten(doubled)
    torch.testing.assert_close(call(x), doubled(x))


def test_an_edit_by_vmap_is_seen():
    def edited(x, pooled, weight):
        y = F.linear(torch.cat([x, pooled], -1), weight)
        torch.vmap(lambda row: row.mul_(2))(x)
        return y

    inputs = torch.randn(4, 3), torch.randn(4, 5), torch.randn(6, 8, requires_grad=True)
    call, found, _ = rewritten(edited)
    torch.testing.assert_close(call(*(t.clone() for t in inputs)), edited(*(t.clone() for t in inputs)))
    assert len(found) == 1 and "edited in place" in found[0].why


def test_sizes_that_only_the_data_tell_in_a_checkpointed_region():
    def some(x, pooled, weight, n):
        def region(x):
            return F.silu(F.linear(torch.cat([x, pooled[None].expand(x.shape[0], -1)], -1), weight))

        return checkpoint(region, x[: n.item()], use_reentrant=False)

    inputs = torch.randn(7, 8), torch.randn(12), torch.randn(5, 20, requires_grad=True), torch.tensor(4)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        call, found, _ = rewritten(some)
        torch.testing.assert_close(call(*inputs), some(*inputs))
    assert len(found) == 1 and "only the data tell" in found[0].why


@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_written_out_attention_may_be_edited_once_it_is_given_back(heads):
    def attend(q, k1, k2):
        keys = torch.cat([k1, k2], -2)
        return (q @ keys.mT * 0.1).softmax(-1) @ keys

    inputs = [torch.randn(2, *heads, n, 4, requires_grad=True) for n in (3, 5, 6)]
    gradients = []
    call, found, _ = rewritten(attend)
    for function in (call, attend):
        out = function(*inputs)
        out += 1
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(*gradients)
    assert [finding.replaced for finding in found] == [True]


def test_what_cannot_be_read_is_left():
    def along_a_dimension_that_is_given(a, b, weight, dim):
        return F.linear(torch.cat([a, b], dim), weight)

    a, b, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(5, 16)
    call, found, _ = rewritten(along_a_dimension_that_is_given, dynamic=True)
    torch.testing.assert_close(call(a, b, weight, -1), along_a_dimension_that_is_given(a, b, weight, -1))
    assert len(found) == 1 and "cannot be read" in found[0].why


def test_two_outputs_are_two_tensors():
    def twice(a, b, weight):
        first = F.linear(torch.cat([F.relu(a), b], -1), weight)
        return first, F.linear(torch.cat([F.relu(a), b], -1), weight)

    a, b, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 4), torch.randn(6, 12)
    call, found, _ = rewritten(twice)
    first, second = call(a, b, weight)
    assert [finding.replaced for finding in found] == [True, True]
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


def test_what_is_recast_in_place_is_left():
    def turned(p, r, weight):
        p = p * 1
        y = F.linear(torch.cat([p.expand(2, 2, 4), r.expand(2, 2, 4)], -1), weight)
        p.transpose_(0, 1)
        return y, p

    def detached(a, b, weight):
        y = F.linear(torch.cat([a, b], -1), weight)
        z = y * 2
        y.detach_()
        a.mul_(2)
        return z

    one, wide = torch.randn(2, 1, 2, 4), torch.randn(4, 8, requires_grad=True)
    leaf = torch.randn(3, 4, requires_grad=True)
    for function, inputs in (
        (turned, lambda: (*one, wide.detach())),
        (detached, lambda: (leaf * 1, leaf, wide)),
    ):
        call, found, _ = rewritten(function)
        torch.testing.assert_close(call(*inputs()), function(*inputs()))
        assert len(found) == 1 and "changed in place" in found[0].why


def test_a_scale_narrower_than_the_features_keeps_their_digits():
    def scaled(image, text, scale):
        logits, target = image @ text.T * scale * 70.7, torch.arange(6)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    inputs = *torch.randn(2, 6, 8, dtype=torch.float64), torch.tensor(0.3)
    call, (finding,), _ = _found(scaled, *inputs)
    assert finding.replaced
    torch.testing.assert_close(call(*inputs), scaled(*inputs), rtol=1e-13, atol=0)
