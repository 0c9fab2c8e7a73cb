"""Every fusion that a configuration can name, on features of its own: what the whole model asks of it."""

import pytest
import torch
from jsonargparse import ArgumentParser
from parts import CONFIG, make, make_batch

from mmfast.errors import UserError
from mmfast.models import (
    Attention,
    Bottleneck,
    Concat,
    FusionConfig,
    Gated,
    LowRank,
    ModelConfig,
    Pairwise,
    Weighted,
)

FUSIONS = {
    "Concat": Concat(dim=16),
    "Attention": Attention(dim=16, heads=2, queries=3),
    "Weighted": Weighted(dim=16),
    "Gated": Gated(dim=16),
    "LowRank": LowRank(dim=16, rank=3),
    "Bottleneck": Bottleneck(dim=16, heads=2, bottlenecks=3, layers=2),
    "Pairwise": Pairwise(dim=16, heads=2),
}
DIMS = {"image": 7, "text": 12, "audio": 5}
every_fusion = pytest.mark.parametrize("config", FUSIONS.values(), ids=FUSIONS.keys())


def build(config, dims=DIMS, dtype=torch.float32):
    torch.manual_seed(0)
    return config.build(dims).to(dtype)


def features(rows=6, dims=DIMS, dtype=torch.float32, poison=0.0, seed=0):
    """Sequences, lengths and presence; row 3 has nothing. Whatever is not there holds ``poison``."""
    g = torch.Generator().manual_seed(seed)
    present = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]).bool()[:rows]
    made = {}
    for i, (name, width) in enumerate(dims.items()):
        steps = 3 + i
        lengths = torch.randint(1, steps + 1, (rows,), generator=g) * present[:, i]
        x = torch.randn(rows, steps, width, generator=g, dtype=dtype)
        hidden = (torch.arange(steps) >= lengths[:, None])[..., None]
        made[name] = x.masked_fill(hidden, poison).requires_grad_(), lengths
    return made, present[:, : len(dims)]


def outcome(fusion, given, present, call=None):
    """The fused vector, and the gradients of every parameter and every sequence."""
    out = (fusion if call is None else call)(given, present)
    fused = out[0] if isinstance(out, tuple) else out
    names, leaves = zip(*fusion.named_parameters(), strict=True)
    weights = torch.linspace(-1, 1, fused.shape[1], dtype=fused.dtype)
    sequences = [sequence for sequence, _ in given.values()]
    grads = torch.autograd.grad((fused.sin() * weights).sum(), [*leaves, *sequences])
    return {"fused": fused.detach(), **dict(zip([*names, *given], grads, strict=True))}


@every_fusion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_padding_and_absence_reach_no_bit(config, dtype):
    fusion = build(config, dtype=dtype)
    clean, *others = (
        outcome(fusion, *features(dtype=dtype, poison=poison)) for poison in (0.0, torch.nan, torch.inf)
    )
    assert clean["fused"].shape == (6, 16) and clean["fused"].dtype == dtype
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert all(torch.equal(value, other[name]) for other in others), name


@every_fusion
def test_gradients_flow_to_every_parameter_and_every_modality(config):
    for name, value in outcome(build(config), *features()).items():
        assert value.any(), name


@every_fusion
def test_zero_rows(config):
    results = outcome(build(config), *features(rows=0))
    assert results.pop("fused").shape == (0, 16)
    assert not any(grad.any() for grad in results.values())


@every_fusion
def test_rows_know_nothing_of_each_other(config):
    fusion, (given, present) = build(config, dtype=torch.float64), features(dtype=torch.float64)
    whole = outcome(fusion, given, present)["fused"]
    for row in range(6):
        one = {name: (x[row : row + 1], lengths[row : row + 1]) for name, (x, lengths) in given.items()}
        alone = fusion(one, present[row : row + 1])
        alone = alone[0] if isinstance(alone, tuple) else alone
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-12, atol=1e-12)


@every_fusion
@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_modalities(config, count):
    dims = dict(list(DIMS.items())[:count])
    results = outcome(build(config, dims), *features(dims=dims))
    for name, value in results.items():
        alone = name.endswith("logits") and count == 1  # a single weight is 1 whatever its logit
        assert value.isfinite().all() and (value.any() or alone), name


@every_fusion
def test_compiles_as_one_graph(config):
    torch._dynamo.reset()
    fusion = build(config)
    call = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    for poison in (0.0, torch.nan):
        given, present = features(poison=poison)
        torch.testing.assert_close(
            outcome(fusion, given, present, call), outcome(fusion, given, present), rtol=1e-4, atol=1e-5
        )


@every_fusion
def test_every_parameter_can_be_sharded(config):
    for name, parameter in build(config).named_parameters():
        assert parameter.dim() > 0 and parameter.is_contiguous(), name


@pytest.mark.parametrize("name", FUSIONS)
def test_yaml_and_the_command_line_select_it_by_name(tmp_path, name):
    file = tmp_path / "config.yaml"
    file.write_text(
        "model:\n  encoders: {words: {class_path: TextTransformer}}\n"
        f"  fusion: {{class_path: {name}, init_args: {{dim: 64}}}}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=ModelConfig)
    for arguments in (["--config", str(file)], ["--config", str(file), f"--model.fusion={name}"]):
        fusion = parser.instantiate(parser.parse_args(arguments)).model.fusion
        assert type(fusion) is type(FUSIONS[name]) and isinstance(fusion, FusionConfig)


@every_fusion
def test_a_model_is_made_of_it(config):
    logits = make(ModelConfig(encoders=CONFIG.encoders, fusion=config))(make_batch())["label"]
    assert logits.shape == (5, 4) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Weighted(activation="tanh"), "Weighted.activation: got 'tanh'"),
        (lambda: Gated(dim=0), "Gated.dim: got 0"),
        (lambda: LowRank(rank=0), "LowRank.rank: got 0"),
        (lambda: Bottleneck(bottlenecks=0), "Bottleneck.bottlenecks: got 0"),
        (lambda: Bottleneck(dim=30, heads=4), "Bottleneck.heads: got 4"),
        (lambda: Pairwise(dim=30, heads=4), "Pairwise.heads: got 4"),
        (lambda: Pairwise(activation="tanh"), "Pairwise.activation: got 'tanh'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(build, named):
    with pytest.raises(UserError, match=named):
        build()
