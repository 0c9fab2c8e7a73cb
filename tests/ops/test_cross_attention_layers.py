"""The layers on cross_attention: by their formulas, with anything in what is hidden, and in training jobs."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from check import compiled, same_bits
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mmfast.nn import CrossModalAttention, CrossModalBlock, PerceiverResampler
from mmfast.ops.reference import AttentionStats

DIMS = {"image": 24, "sound": 10}
SIZES = {"image": 9, "sound": 21}
B, L, E, H = 4, 6, 32, 4


def example(seed=0, dtype=torch.float64):
    """A batch in which streams are whole, short and absent, and one sample has nothing."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, L, E, generator=g, dtype=dtype)
    sources = {n: torch.randn(B, SIZES[n], d, generator=g, dtype=dtype) for n, d in DIMS.items()}
    lengths = {"sound": torch.tensor([21, 5, 2, 8])}
    masks = {"image": torch.rand(B, SIZES["image"], generator=g) < 0.7}
    present = torch.tensor([[True, True], [True, True], [False, True], [False, False]])
    return x, sources, {"lengths": lengths, "masks": masks, "present": present}


def hidden(name, visible, sizes=SIZES):
    """bool [B, S, 1]: the steps of a source that nobody sees."""
    there = torch.ones(B, sizes[name], dtype=torch.bool)
    if name in visible["lengths"]:
        there &= torch.arange(sizes[name]) < visible["lengths"][name][:, None]
    if name in visible["masks"]:
        there &= visible["masks"][name]
    return ~(there & visible["present"][:, [list(sizes).index(name)]])[..., None]


def randomised(layer, seed=1):
    """With weights that leave nothing at its special first value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return layer


def results(layer, *arguments, call=None, **options):
    """The output and the gradients of every parameter and of all that is looked at or from."""
    tensors = [
        t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
    ]
    leaves = [*layer.parameters(), *(t.requires_grad_() for t in dict.fromkeys(tensors))]
    out = (call or layer)(*arguments, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def linear(layer, t):
    if layer.norm_eps is not None:
        t = F.layer_norm(t, t.shape[-1:], layer.norm_weight, layer.norm_bias, layer.norm_eps)
    return F.linear(t, layer.weight, layer.bias)


def gated(layer, t):
    return linear(layer, t) * (1 if layer.gate is None else layer.gate.tanh())


def by_hand(layer, x, sources, visible, residual):
    """What CrossModalAttention promises, with concatenation, a mask and PyTorch's attention."""
    kv_heads, depth = layer.kv_heads, layer.head_dim
    sizes = {name: source.shape[1] for name, source in sources.items()}

    def heads(t, count):  # [B, S, count D] -> [B, count, S, D]
        return t.unflatten(-1, (count, depth)).transpose(1, 2)

    query = layer.query_norm(heads(linear(layer.query, x), layer.heads))
    keys, values, bias = [], [], []
    for i, (name, project) in enumerate(layer.sources.items()):
        gone = hidden(name, visible, sizes)
        key, value = linear(project, sources[name].masked_fill(gone, 0)).chunk(2, -1)
        keys.append(layer.key_norm(heads(key, kv_heads)))
        values.append(heads(value, kv_heads))
        add = x.new_zeros(H) if layer.source_bias is None else layer.source_bias[:, i]
        add = add[:, None, None].expand(B, H, 1, sizes[name])
        bias.append(add.masked_fill(gone[:, None, None, :, 0], -torch.inf))
    out = F.scaled_dot_product_attention(
        query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=torch.cat(bias, -1), enable_gqa=True
    )
    out = torch.where(torch.cat(bias, -1).isfinite().any(-1, keepdim=True), out, 0)
    return residual + gated(layer.project, out.transpose(1, 2).flatten(2))


def block_by_hand(block, x, sources, visible, activation=F.gelu):
    x = by_hand(block.attention, x, sources, visible, x)
    return x + gated(block.down, activation(linear(block.up, x)))


def resampler_by_hand(model, sources, visible):
    latents = model.latents.expand(B, -1, -1)
    visible = {**visible, "present": F.pad(visible["present"], (0, 1), value=True)}
    for block in model.blocks:
        latents = block_by_hand(block, latents, {**sources, "latents": latents}, visible)
    return F.layer_norm(latents, (E,), model.norm.weight, model.norm.bias)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_it_is_the_attention_that_one_would_write_by_hand(kv_heads):
    layer = CrossModalAttention(
        E, H, DIMS, num_kv_heads=kv_heads, norm=True, norm_sources=True, qk_norm=True, source_bias=True,
        gate="channel", dtype=torch.float64,
    )  # fmt: skip
    randomised(layer)
    x, sources, visible = example()
    ours = results(layer, x, sources, **visible, residual=x)
    theirs = results(layer, x, sources, visible, x, call=functools.partial(by_hand, layer))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_a_block_is_the_one_that_one_would_write_by_hand(gate):
    block = CrossModalBlock(
        E, H, DIMS, gate=gate, mlp_ratio=1.5, activation="silu", num_kv_heads=2, dtype=torch.float64
    )
    assert block.up.weight.shape == (48, E)
    randomised(block)
    x, sources, visible = example()
    ours = results(block, x, sources, **visible)
    theirs = results(block, x, sources, visible, F.silu, call=functools.partial(block_by_hand, block))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_resampler_is_the_one_that_one_would_write_by_hand():
    model = randomised(
        PerceiverResampler(E, H, DIMS, num_latents=5, depth=2, qk_norm=True, dtype=torch.float64)
    )
    _, sources, visible = example()
    ours = results(model, sources, **visible)
    theirs = results(model, sources, visible, call=functools.partial(resampler_by_hand, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_statistics_are_those_of_the_attention(kv_heads):
    """The mass that each source has in the weights of PyTorch's attention, whose values are shares."""
    layer = randomised(
        CrossModalAttention(E, H, DIMS, num_kv_heads=kv_heads, source_bias=True, dtype=torch.float64)
    )
    x, sources, visible = example()
    out, stats = layer(x, sources, **visible, return_stats=True)
    assert torch.equal(out, layer(x, sources, **visible))
    query = linear(layer.query, x).unflatten(-1, (H, -1)).transpose(1, 2)
    logits = []
    for i, (name, project) in enumerate(layer.sources.items()):
        key = (
            linear(project, sources[name]).chunk(2, -1)[0].unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
        )
        key = key.repeat_interleave(H // layer.kv_heads, 1)
        own = query @ key.mT * layer.head_dim**-0.5 + layer.source_bias[:, i, None, None]
        logits.append(own.masked_fill(hidden(name, visible).mT[:, None], -torch.inf))
    lse = torch.cat(logits, -1).logsumexp(-1)
    torch.testing.assert_close(stats.lse, lse)
    mass = torch.stack([(own - lse[..., None]).exp().sum(-1) for own in logits], -1)
    torch.testing.assert_close(stats.mass[:3], mass[:3])
    assert not stats.mass.requires_grad and stats.mass[3].eq(0).all()


@pytest.mark.parametrize(
    "layer",
    [
        CrossModalAttention(E, H, DIMS, qk_norm=True, norm_sources=True),
        CrossModalBlock(E, H, DIMS, gate="scalar"),
        PerceiverResampler(E, H, DIMS, num_latents=5, depth=2, qk_norm=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_hidden_changes_no_bit_of_the_output_or_of_any_gradient(layer):
    x, sources, visible = example(dtype=torch.float32)
    looking = [] if isinstance(layer, PerceiverResampler) else [x]
    clean = results(randomised(layer), *looking, sources, **visible)
    for value in (torch.nan, torch.inf):
        spoilt = {n: t.detach().masked_fill(hidden(n, visible), value) for n, t in sources.items()}
        assert not any(t.isfinite().all() for t in spoilt.values())
        for a, b in zip(clean, results(layer, *looking, spoilt, **visible), strict=True):
            assert same_bits(a, b) and a.isfinite().all()


def test_each_query_may_see_some_sources_only():
    layer = randomised(CrossModalAttention(E, H, DIMS))
    x, sources, _ = example(dtype=torch.float32)
    present = torch.zeros(B, L, 2, dtype=torch.bool)
    present[:, 1::2, 0] = present[:, 2:, 1] = True
    out = layer(x, sources, present=present)
    for query in range(L):
        one = layer(x[:, [query]], sources, present=present[:, query])
        torch.testing.assert_close(out[:, [query]], one, rtol=1e-4, atol=1e-5)


def test_causal_sources_are_named():
    layer = CrossModalAttention(E, H, {"own": E, "image": 24}, causal=["own"])
    x, sources, _ = example(dtype=torch.float32)
    before = layer(x, {"own": x, "image": sources["image"]})
    later = x.clone()
    later[:, 3:] += 1
    after = layer(torch.cat([x[:, :3], later[:, 3:]], 1), {"own": later, "image": sources["image"]})
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 24}])
def test_a_multihead_attention_becomes_one(options):
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)).eval()
    with torch.no_grad():
        ours = CrossModalAttention.from_multihead(theirs, "image")
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    frozen = CrossModalAttention.from_multihead(copy.deepcopy(theirs).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    memory = torch.randn(B, 9, options.get("kdim", E), dtype=torch.float64)
    x, _, _ = example()
    lengths = torch.tensor([9, 1, 4, 7])
    padding = torch.arange(9) >= lengths[:, None]
    for x_ in (x, x[:, :1]):
        wanted, _ = theirs(x_, memory, memory, key_padding_mask=padding)
        got = ours(x_, {"image": memory}, lengths={"image": lengths})
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 9}]
)
def test_a_multihead_attention_that_is_something_else_is_refused(options):
    with pytest.raises(ValueError, match="from_multihead: wanted"):
        CrossModalAttention.from_multihead(nn.MultiheadAttention(E, H, **options))


def test_a_block_begins_as_the_identity_and_opens_by_training():
    block = CrossModalBlock(E, H, DIMS)
    x, sources, visible = example(dtype=torch.float32)
    out, stats = block(x, sources, **visible, return_stats=True)
    assert torch.equal(out, x)
    assert isinstance(stats, AttentionStats) and stats.mass.shape == (B, H, L, 2)
    torch.testing.assert_close(stats.mass.sum(-1)[:3], torch.ones(3, H, L))
    assert stats.mass[3].eq(0).all() and stats.mass[2, ..., 0].eq(0).all()
    out.square().sum().backward()
    assert block.attention.project.gate.grad.abs() > 0 and block.down.gate.grad.abs() > 0


def test_a_resampler_answers_every_sample_with_its_latents():
    model = randomised(PerceiverResampler(E, H, DIMS, num_latents=5, depth=2, dtype=torch.float64))
    _, sources, visible = example()
    visible["present"][2] = False  # nothing is there
    out = model(sources, **visible)
    assert out.shape == (B, 5, E) and out.isfinite().all()
    torch.testing.assert_close(out[2], out[3])
    alone = model({n: t[:1] for n, t in sources.items()}, masks={"image": visible["masks"]["image"][:1]})
    torch.testing.assert_close(out[:1], alone)
    assert not torch.equal(out[0], out[1])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="source_dims is empty"):
        CrossModalAttention(E, H, {})
    with pytest.raises(ValueError, match="num_heads is 5, wanted a divisor of 32"):
        CrossModalAttention(E, 5, DIMS)
    with pytest.raises(ValueError, match="num_kv_heads is 3, wanted a divisor of 4"):
        CrossModalAttention(E, H, DIMS, num_kv_heads=3)
    with pytest.raises(ValueError, match="causal has 'radar', wanted one of image, sound"):
        CrossModalAttention(E, H, DIMS, causal=["radar"])
    with pytest.raises(ValueError, match="names its own stream"):
        PerceiverResampler(E, H, {"latents": 3})
    layer = CrossModalAttention(E, H, DIMS)
    x, sources, _ = example(dtype=torch.float32)
    with pytest.raises(ValueError, match="sources has no sound"):
        layer(x, {"image": sources["image"]})
    with pytest.raises(ValueError, match="sources has 'radar'"):
        layer(x, {**sources, "radar": x})
    with pytest.raises(ValueError, match="lengths has 'sond', wanted one of image, sound"):
        layer(x, sources, lengths={"sond": torch.ones(B)})
    with pytest.raises(ValueError, match="sources has no image, sound"):
        PerceiverResampler(E, H, DIMS)({})
    with pytest.raises(ValueError, match="lengths has 'latents', wanted one of image, sound"):
        PerceiverResampler(E, H, DIMS)(sources, lengths={"latents": torch.ones(B)})
    with pytest.raises(ValueError, match="source_dims is 'type', wanted a name without dots"):
        CrossModalAttention(E, H, {"type": 3})
    with pytest.raises(TypeError, match="sound in sources is a NoneType, wanted a tensor"):
        layer(x, {**sources, "sound": None})


WRONG = {
    r"x is \[6, 32\], wanted \[B, L, 32\]": (ValueError, {"x": torch.ones(L, E)}),
    "sources is a list, wanted a tensor for each name": (TypeError, {"sources": [1]}),
    "lengths is a Tensor, wanted a tensor for each name": (TypeError, {"lengths": torch.ones(B)}),
    r"sound in sources is \[4, 21, 11\], wanted \[4, S, 10\]": (
        ValueError,
        {"sources": {"image": torch.ones(B, 9, 24), "sound": torch.ones(B, 21, 11)}},
    ),
    r"sound in lengths is torch.int64 \[3\], wanted int32 or int64 \[4\]": (
        ValueError,
        {"lengths": {"sound": torch.ones(3, dtype=torch.int64)}},
    ),
    r"sound in masks is torch.bool \[4, 20\], wanted bool \[4, 21\]": (
        ValueError,
        {"masks": {"sound": torch.ones(B, 20, dtype=torch.bool)}},
    ),
    r"present is torch.bool \[4, 1\], wanted bool \[4, 2\] or \[4, 6, 2\]": (
        ValueError,
        {"present": torch.ones(B, 1, dtype=torch.bool)},
    ),
    r"present is torch.int64 \[4, 2\]": (ValueError, {"present": torch.ones(B, 2, dtype=torch.int64)}),
}


@pytest.mark.parametrize(("message", "kind", "wrong"), [(m, *w) for m, w in WRONG.items()], ids=WRONG)
def test_errors_name_what_was_got_and_what_was_wanted(message, kind, wrong):
    x, sources, _ = example(dtype=torch.float32)
    with pytest.raises(kind, match=f"CrossModalAttention: {message}"):
        CrossModalAttention(E, H, DIMS)(**{"x": x, "sources": sources, **wrong})


def test_one_graph_serves_twenty_mixes_of_lengths():
    block = randomised(CrossModalBlock(E, H, DIMS, qk_norm=True))
    counter = CompileCounter()
    step = compiled(block, counter)
    for seed in range(20):
        x, sources, visible = example(seed, torch.float32)
        sound = 3 + 2 * seed  # another size too
        sources["sound"] = torch.randn(B, sound, DIMS["sound"])
        visible["lengths"]["sound"] = torch.randint(0, sound + 1, (B,))
        torch.testing.assert_close(step(x, sources, **visible), block(x, sources, **visible))
    assert counter.frame_count <= 2


class Tower(nn.Module):
    def __init__(self, rematerialise=False):
        super().__init__()
        options = {"qk_norm": True, "source_bias": True, "num_kv_heads": 2}
        self.blocks = nn.ModuleList(CrossModalBlock(E, H, DIMS, **options) for _ in range(2))
        self.rematerialise = rematerialise

    def forward(self, x, sources, visible):
        for block in self.blocks:
            call = functools.partial(block, **visible)
            x = checkpoint(call, x, sources, use_reentrant=False) if self.rematerialise else call(x, sources)
        return x


def tower(rematerialise=False):
    torch.manual_seed(0)
    return randomised(Tower(rematerialise))


def step(model):
    out = model(*example(dtype=torch.float32))
    out.square().mean().backward()
    gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    return [out.detach(), *gradients]


def test_checkpointing_compile_and_fsdp2_together(one_rank):
    meant = step(tower())
    model = tower(rematerialise=True)
    for block in model.blocks:
        fully_shard(block, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(model), meant, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_mixed_precision_casts_every_parameter(one_rank):
    meant = step(tower())
    model = tower()
    for block in model.blocks:
        fully_shard(block, mesh=one_rank, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    for ours, theirs in zip(step(model), meant, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
