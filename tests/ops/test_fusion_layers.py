"""The layers of mmfast.nn that fuse modalities, each against its paper's formula written out."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from check import compiled
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mmfast.nn import (
    BottleneckFusion,
    ConcatLinear,
    CrossModalAttention,
    CrossModalBlock,
    GatedFusion,
    LowRankFusion,
    PairwiseFusion,
    PerceiverResampler,
    WeightedFusion,
)
from mmfast.nn.masking import masked_mean

SIZES = (5, 3, 4)
VECTORS = {
    "weighted": lambda: WeightedFusion(SIZES, 6, activation="gelu"),
    "gated": lambda: GatedFusion(SIZES, 6),
    "low rank": lambda: LowRankFusion(SIZES, 6, rank=2),
}
DIMS = {"image": 5, "text": 3, "audio": 4}
SEQUENCES = {
    "bottleneck": lambda: BottleneckFusion(8, 2, DIMS, num_bottlenecks=3),
    "pairwise": lambda: PairwiseFusion(8, 2, DIMS, activation="gelu"),
}
PRESENT = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()
LENGTHS = {"image": torch.tensor([6, 2, 4, 1]), "audio": torch.tensor([1, 2, 3, 0])}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vectors():
    return [torch.randn(4, d, dtype=torch.float64) for d in SIZES]


def sequences():
    return {name: torch.randn(4, 6 - i, d, dtype=torch.float64) for i, (name, d) in enumerate(DIMS.items())}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_from_linear_gives_the_outputs_of_the_linear_layer():
    for bias in (True, False):
        linear, inputs = nn.Linear(12, 7, bias=bias).double().eval(), vectors()
        layer = ConcatLinear.from_linear(linear, SIZES)
        assert layer.state_dict().keys() == linear.state_dict().keys() and not layer.training
        assert layer.weight is not linear.weight and layer.weight.dtype == torch.float64
        close(layer(inputs), linear(torch.cat(inputs, -1)))
    with torch.no_grad():
        layer = ConcatLinear.from_linear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 7)), SIZES)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    frozen = torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 7).double()).requires_grad_(False)
    layer = ConcatLinear.from_linear(frozen, SIZES)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    close(layer(inputs), frozen(torch.cat(inputs, -1)))
    with pytest.raises(ValueError, match="in_features is 5 \\+ 3, wanted a sum of 12"):
        ConcatLinear.from_linear(linear, SIZES[:2])


def test_weighted_is_a_mean_of_projections_with_learned_weights():
    layer, inputs = WeightedFusion(SIZES, 6).double(), vectors()
    assert not layer.logits.any()
    nn.init.normal_(layer.logits)
    weights = layer.logits.softmax(0)
    meant = sum(
        w * F.linear(x, p.weight, p.bias) for w, x, p in zip(weights, inputs, layer.project, strict=True)
    )
    close(layer(inputs), meant)
    two = layer.logits[:2].softmax(0)
    meant = sum(
        w * F.linear(x, p.weight, p.bias) for w, x, p in zip(two, inputs, layer.project, strict=False)
    )
    close(layer(inputs, present=torch.tensor([[True, True, False]]).expand(4, 3)), meant)


def test_gated_is_the_gated_multimodal_unit():
    layer, inputs = GatedFusion(SIZES, 6).double(), vectors()
    gates = layer.gates(inputs).sigmoid().chunk(3, -1)
    hidden = [torch.tanh(F.linear(x, p.weight, p.bias)) for x, p in zip(inputs, layer.project, strict=True)]
    close(layer(inputs), sum(z * h for z, h in zip(gates, hidden, strict=True)))
    broadcast = [inputs[0][:, None].expand(4, 2, 5), inputs[1][:, None], inputs[2][:, None]]
    close(layer(broadcast), layer(inputs)[:, None].expand(4, 2, 6))


def test_low_rank_is_the_published_module():
    layer, inputs = LowRankFusion(SIZES, 6, rank=2).double(), vectors()
    assert repr(layer).startswith("LowRankFusion(\n") and "rank=2" in layer.extra_repr()
    product = 1.0
    for x, factor in zip(inputs, layer.factors, strict=True):
        product = product * torch.matmul(torch.cat([x, torch.ones(4, 1)], 1), factor)
    close(layer(inputs), torch.matmul(layer.rank_weight, product.transpose(0, 1)) + layer.bias)


def test_low_rank_starts_with_outputs_of_the_size_of_its_inputs():
    layer = LowRankFusion((300, 74, 35), 64, rank=16)
    out = layer([torch.randn(500, d) for d in (300, 74, 35)])
    assert 0.5 < out.std() < 2


def test_low_rank_starts_with_what_each_modality_gives_alone():
    layer = LowRankFusion(SIZES, 6, rank=2).double()
    x, *others = vectors()
    zeros = [torch.zeros_like(t) for t in others]
    alone = torch.einsum("bi,rio,r->bo", x, layer.factors[0][:, :-1], layer.rank_weight)
    close(layer([x, *zeros]), layer.rank_weight.sum() + alone)


def transformer_layer(block, x):
    """A pre-norm Transformer layer with the block's weights, one sequence [S, E] at a time."""
    attention, heads = block.attention, block.attention.heads
    source = attention.sources["tokens"]
    normed = F.layer_norm(x, x.shape[-1:], attention.query.norm_weight, attention.query.norm_bias)
    query = F.linear(normed, attention.query.weight, attention.query.bias)
    normed = F.layer_norm(x, x.shape[-1:], source.norm_weight, source.norm_bias)
    key, value = F.linear(normed, source.weight, source.bias).chunk(2, -1)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
    x = x + F.linear(mixed, attention.project.weight, attention.project.bias)
    normed = F.layer_norm(x, x.shape[-1:], block.up.norm_weight, block.up.norm_bias)
    hidden = F.gelu(F.linear(normed, block.up.weight, block.up.bias))
    return x + F.linear(hidden, block.down.weight, block.down.bias)


def test_bottleneck_is_mbt():
    """Equations 8 and 9, sample by sample, without any padding or absence to mask."""
    layer, given = BottleneckFusion(8, 2, DIMS, num_bottlenecks=3).double(), sequences()
    out = layer(given, lengths=LENGTHS, present=PRESENT)
    assert not out[3].any()
    for row in range(3):
        tokens = {
            name: F.linear(x[row, : LENGTHS.get(name, torch.full((4,), 6))[row]], p.weight, p.bias)
            for (name, x), p, there in zip(given.items(), layer.project.values(), PRESENT[row], strict=True)
            if there
        }
        shared = layer.bottlenecks
        for blocks in layer.layers:
            made = {
                name: transformer_layer(blocks[name], torch.cat([shared, x])) for name, x in tokens.items()
            }
            shared = torch.stack([x[:3] for x in made.values()]).mean(0)
            tokens = {name: x[3:] for name, x in made.items()}
        close(out[row], torch.stack([layer.norm(x).mean(0) for x in tokens.values()]).mean(0))


def test_modalities_meet_through_the_bottleneck_only():
    layer, given = BottleneckFusion(8, 2, DIMS, depth=1).double(), sequences()
    pooled = []
    layer.norm.register_forward_hook(lambda module, args, out: pooled.append(out))
    for other in (given, {**given, "text": given["text"] + 1}):
        layer(other)
    first, second = pooled[:3], pooled[3:]  # of image, text and audio
    close(first[0], second[0])  # within one layer nothing has come through yet
    assert not torch.allclose(first[1], second[1])


def test_pairwise_lets_every_ordered_pair_interact():
    layer, given = PairwiseFusion(8, 2, DIMS).double(), sequences()
    assert layer.pairs == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    h = [F.linear(x, p.weight, p.bias) for x, p in zip(given.values(), layer.project.values(), strict=True)]
    met = [
        h[i] + attention(h[i], {"tokens": h[j]})
        for (i, j), attention in zip(layer.pairs, layer.interact, strict=True)
    ]
    pooled = torch.cat([x.mean(1) for x in met], -1)
    close(layer(given), F.linear(pooled, layer.combine.weight, layer.combine.bias))


def test_pairs_whose_query_is_absent_count_as_zeros_and_others_still_speak():
    layer, given = PairwiseFusion(8, 2, DIMS).double(), sequences()
    out = layer(given, present=PRESENT)
    close(out[3], layer.combine.bias)
    text = F.linear(given["text"][1], layer.project["text"].weight, layer.project["text"].bias)
    alone = [text + layer.interact[k].project.bias for k in (2, 3)]  # nothing to attend to
    columns = layer.combine.weight.unflatten(1, (6, 8))[:, 2:4].flatten(1)
    close(out[1], F.linear(torch.cat([x.mean(0) for x in alone]), columns, layer.combine.bias))


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_vectors_compile_and_their_gradients_are_slopes(make):
    layer = make().double()
    inputs = [x.requires_grad_() for x in vectors()]
    close(compiled(layer)(inputs, present=PRESENT), layer(inputs, present=PRESENT))
    assert torch.autograd.gradcheck(lambda *xs: layer(xs, present=PRESENT), inputs)


@pytest.mark.parametrize("make", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences_gradients_are_slopes(make):
    layer = make().double()
    inputs = [x.requires_grad_() for x in sequences().values()]

    def function(*xs):
        return layer(dict(zip(DIMS, xs, strict=True)), lengths=LENGTHS, present=PRESENT)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedFusion([], 3), "WeightedFusion: in_features is empty"),
        (lambda: WeightedFusion([2], 3, activation="tanh"), "activation is 'tanh', wanted one of none, relu"),
        (lambda: GatedFusion([], 3), "GatedFusion: in_features is empty"),
        (lambda: LowRankFusion([2], 3, rank=0), "LowRankFusion: rank is 0, wanted at least 1"),
        (lambda: BottleneckFusion(8, 2, {}), "BottleneckFusion: source_dims is empty"),
        (lambda: PairwiseFusion(8, 3, DIMS), "num_heads is 3, wanted a divisor of 8"),
        (lambda: ConcatLinear([2], 3, activation="tanh"), "activation is 'tanh', wanted one of none, relu"),
        (lambda: BottleneckFusion(8, 2, DIMS, activation="tanh"), "activation is 'tanh', wanted one of none"),
        (lambda: PairwiseFusion(8, 2, DIMS, activation="tanh"), "activation is 'tanh', wanted one of none"),
        (lambda: BottleneckFusion(8, 2, {"cam.left": 3}), "BottleneckFusion: source_dims is 'cam.left'"),
    ],
)
def test_a_wrong_description_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def fitting(layer):
    """Arguments that fit, in float32."""
    fit = {"present": PRESENT}
    if type(layer).__name__ in ("CrossModalAttention", "CrossModalBlock"):
        fit["x"] = torch.randn(4, 2, 8)
    if hasattr(layer, "in_features"):
        return fit | {"inputs": [x.float() for x in vectors()]}
    return fit | {"sources": {name: x.float() for name, x in sequences().items()}, "lengths": LENGTHS}


LAYERS = {
    **VECTORS,
    "concat": lambda: ConcatLinear(SIZES, 6),
    **SEQUENCES,
    "attention": lambda: CrossModalAttention(8, 2, DIMS),
    "block": lambda: CrossModalBlock(8, 2, DIMS),
    "resampler": lambda: PerceiverResampler(8, 2, DIMS, num_latents=2),
}
OF_ALL = {
    r"present is .*\[4, 2\], wanted .*\[4, 3\]": {"present": PRESENT[:, :2]},
    r"present is .*\[4, 4\], wanted .*\[4, 3\]": {"present": PRESENT[:, [0, 1, 2, 0]]},
    r"present is .*\[2, 3\], wanted .*\[4, 3\]": {"present": PRESENT[:2]},
    r"present is .*\[4\], wanted .*\[4, 3\]": {"present": PRESENT[:, 0]},
    "present is torch.float32.*, wanted .*bool": {"present": PRESENT.float()},
    "present is a list, wanted": {"present": PRESENT.tolist()},
}
OF_VECTORS = {
    "inputs is 2 tensors, wanted 3": lambda xs: xs[:2],
    "inputs is 4 tensors, wanted 3": lambda xs: [*xs, xs[0]],
    "inputs is a Tensor, wanted a list or tuple of tensors": lambda xs: xs[0],
    "inputs is empty, wanted at least one tensor": lambda xs: [],
    r"inputs\[1\] is a NoneType, wanted a tensor": lambda xs: [xs[0], None, xs[2]],
    r"inputs\[1\] is \[4, 2\], wanted \[..., 3\]": lambda xs: [xs[0], torch.zeros(4, 2), xs[2]],
    r"inputs\[1\] is \[\], wanted \[..., 3\]": lambda xs: [xs[0], torch.zeros(()), xs[2]],
    r"inputs\[1\] is \[3, 3\], wanted (\[4, D\]|.* broadcast with those of \[4, 5\])": lambda xs: (
        [xs[0], torch.zeros(3, 3), xs[2]]
    ),
    r"inputs\[1\] is torch.float64.*, wanted .*'s? torch.float32": lambda xs: [xs[0], xs[1].double(), xs[2]],
}
OF_SEQUENCES = {
    "sources is a list, wanted a tensor for each name": {"sources": [torch.zeros(4, 6, 5)]},
    "sources has no text, audio, wanted image, text, audio": {"sources": {"image": torch.zeros(4, 6, 5)}},
    "sources has 'face', wanted one of image, text, audio": {"face": torch.zeros(4, 6, 5)},
    "text in sources is a NoneType, wanted a tensor": {"text": None},
    r"text in sources is \[4, 6, 2\], wanted \[4, S, 3\]": {"text": torch.zeros(4, 6, 2)},
    r"text in sources is \[3, 6, 3\], wanted \[4, S, 3\]": {"text": torch.zeros(3, 6, 3)},
    r"text in sources is \[4, 3\], wanted \[4, S, 3\]": {"text": torch.zeros(4, 3)},
    "image in sources is a scalar, wanted": {"image": torch.zeros(())},
    "text in sources is torch.float64, wanted the parameters' torch.float32": {
        "text": torch.zeros(4, 6, 3).double()
    },
    "lengths is a Tensor, wanted a tensor for each name": {"lengths": torch.ones(4).int()},
    "lengths has 'imgae', wanted one of image, text, audio": {"lengths": {"imgae": torch.ones(4).int()}},
    r"text in lengths is torch.float32 \[4\], wanted int32 or int64 \[4\]": {
        "lengths": {"text": torch.ones(4)}
    },
    r"text in lengths is torch.int32 \[2\], wanted int32 or int64 \[4\]": {
        "lengths": {"text": torch.ones(2).int()}
    },
    "text in lengths is a int, wanted int32 or int64": {"lengths": {"text": 3}},
}
OF_QUERIES = {
    r"x is \[4, 2, 7\], wanted \[B, L, 8\]": {"x": torch.zeros(4, 2, 7)},
    r"x is \[4, 8\], wanted \[B, L, 8\]": {"x": torch.zeros(4, 8)},
    r"x is a NoneType, wanted \[B, L, 8\]": {"x": None},
    "x is torch.float64, wanted the parameters' torch.float32": {"x": torch.zeros(4, 2, 8).double()},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_argument_is_named_with_what_was_got_and_what_was_wanted(name):
    layer = LAYERS[name]()
    fit = fitting(layer)
    layer(**fit)
    own = "CrossModalAttention" if name == "block" else type(layer).__name__
    speak = {"concat": "(ConcatLinear|concat_linear)", "low rank": "(LowRankFusion|lowrank_fusion)"}
    speak["resampler"] = "(PerceiverResampler|CrossModalAttention)"
    wrong = list(OF_ALL.items()) + (list(OF_QUERIES.items()) if "x" in fit else [])
    if "inputs" in fit:
        wrong += [(message, {"inputs": change(fit["inputs"])}) for message, change in OF_VECTORS.items()]
    else:
        wrong += OF_SEQUENCES.items()
    for message, changed in wrong:
        if not changed.keys() <= fit.keys():  # one of the sources
            changed = {"sources": fit["sources"] | changed}
        with pytest.raises((TypeError, ValueError), match=f"^{speak.get(name, own)}: {message}"):
            layer(**fit | changed)


@pytest.mark.parametrize("make", [WeightedFusion, GatedFusion])
def test_a_source_of_all_samples_is_absent_by_sample(make):
    layer, a, b = make([8, 8], 6).double(), *torch.randn(2, 4, 4, 8, dtype=torch.float64)
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    for shared in (b[0], b[:1], b[0, 0]):
        close(layer([a, shared], present=present), layer([a, shared.expand(4, 4, 8)], present=present))
    with pytest.raises(ValueError, match="present"):
        layer([a[0, 0], b[0, 0]], present=present)
    nobody = present & torch.tensor([True, False])
    nan = torch.full((4, 8), torch.nan, dtype=torch.float64)
    layer([a, nan], present=nobody).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


FUSIONS = VECTORS | SEQUENCES
RESET = {
    **FUSIONS,
    "attention": lambda: CrossModalAttention(8, 2, DIMS, source_bias=True, qk_norm=True),
    "resampler": lambda: PerceiverResampler(8, 2, DIMS, num_latents=2, source_bias=True),
}


@pytest.mark.parametrize("make", RESET.values(), ids=RESET)
def test_a_layer_that_began_without_memory_is_filled(make):
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    for part in layer.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert [name for name, parameter in layer.named_parameters() if parameter.isnan().any()] == []


def test_a_mean_over_many_steps_stays_in_the_range_of_float16():
    steps = torch.full((2, 2000, 4), 100.0).half()
    mean = masked_mean(steps, torch.tensor([2000, 1000]))
    assert mean.dtype == torch.float16 and torch.equal(mean, torch.full((2, 4), 100.0).half())


@pytest.mark.parametrize("make", RESET.values(), ids=RESET)
def test_a_new_batch_size_compiles_once_more_and_never_again(make):
    torch._dynamo.reset()
    counter, layer = CompileCounter(), make()
    call = torch.compile(layer, backend=counter, fullgraph=True)
    for batch, steps in ((4, 6), (5, 7), (6, 8), (9, 11)):
        present = torch.ones(batch, 3).bool()
        if make in VECTORS.values():
            call([torch.randn(batch, d) for d in SIZES], present=present)
            continue
        sources = {name: torch.randn(batch, steps, d) for name, d in DIMS.items()}
        query = [torch.randn(batch, 3, 8)] * isinstance(layer, CrossModalAttention)
        call(*query, sources, lengths={"text": torch.full((batch,), 2)}, present=present)
    assert counter.frame_count == 2


class Rematerialised(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, arguments):
        return checkpoint(lambda a: self.layer(**a), arguments, use_reentrant=False)


@pytest.mark.parametrize("make", FUSIONS.values(), ids=FUSIONS)
def test_checkpointing_compile_and_fsdp2_together(make, one_rank):
    layer = make()
    torch._dynamo.reset()
    model, given = Rematerialised(deepcopy(layer)), fitting(layer)

    def step(model, call):
        out = call(model)
        out.square().mean().backward()
        return [
            out.detach(),
            *[getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()],
        ]

    meant = step(layer, lambda layer: layer(**given))
    fully_shard(model.layer, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    model.layer.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(model, lambda model: model(given)), meant, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_half_precision_reaches_parts_that_are_sharded_by_themselves(make, one_rank):
    layer = make()
    given, policy = fitting(layer), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in [m for m in layer.modules() if isinstance(m, ConcatLinear) and m is not layer]:
        fully_shard(part, mesh=one_rank, mp_policy=policy)
    fully_shard(layer, mesh=one_rank, mp_policy=policy)
    out = layer(**given)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
