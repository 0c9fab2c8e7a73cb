"""What only the Triton launchers promise; the op's own promises are in test_concat_linear.py."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.importorskip("triton")
from check import Sizes

from mmfast.kernels import _launch, concat_linear_backward
from mmfast.kernels import concat_linear as kernels
from mmfast.kernels.concat_linear import UNTUNED
from mmfast.ops import backend, concat_linear, reference

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, parts and chunks from a small tensor."""
    names = {name for table in (UNTUNED, concat_linear_backward.UNTUNED) for name in table[80]}
    entry = {"triton": {name: dict(SMALL) for name in names}}
    monkeypatch.setattr(_launch, "measured", lambda op, device: entry)
    monkeypatch.setattr(concat_linear_backward, "_CHUNK", 16)


def both(shapes, width, seen=None, far=0, **options):
    """Output and gradients by Triton, by the reference in the same dtype, and in float64.

    The sources' means are ``far`` away from each other and, but for the first, from 0.
    """
    generator = torch.Generator().manual_seed(0)
    depth, lead = sum(s[-1] for s in shapes), torch.broadcast_shapes(*(s[:-1] for s in shapes))
    leaves = [torch.randn(s, generator=generator) for s in (*shapes, (width, depth), (width,))]
    for i in range(len(shapes)):
        leaves[i] += i * far
    if options.get("norm_eps"):
        leaves += [torch.randn(depth, generator=generator), torch.randn(depth, generator=generator)]
    columns = width // 2 if options.get("activation") == "swiglu" else width
    grad = torch.randn(*lead, columns, generator=generator)
    results = []
    for op, dtype in ((concat_linear, torch.float32), (reference.concat_linear, torch.float32),
                      (reference.concat_linear, torch.float64)):  # fmt: skip
        cast = [t.to(DEVICE, dtype).requires_grad_() for t in leaves]
        inputs, (weight, bias, *norm) = cast[: len(shapes)], cast[len(shapes) :]
        named = dict(zip(("norm_weight", "norm_bias"), norm, strict=False))
        present = None if seen is None else seen.to(DEVICE)
        with backend("triton"):
            out = op(inputs, weight, bias, present=present, **named, **options)
        results.append([out, *torch.autograd.grad(out, cast, grad.to(DEVICE, dtype))])
    return results


def assert_close(results):
    for i, (got, same, exact) in enumerate(zip(*results, strict=True)):
        error, allowed = (got - exact).abs().max(), 2 * (same - exact).abs().max()
        assert error <= allowed + 8 * torch.finfo(got.dtype).eps * exact.abs().max(), f"result {i}"


@pytest.mark.parametrize(
    ("per_sample", "norm_eps"),
    ((3, None), (70, None), (70, 1e-5)),
    ids=("samples share a chunk", "a sample is a chunk", "norm"),
)
def test_tiles_parts_and_chunks_add_up(small_tiles, per_sample, norm_eps):
    samples = 1100 // per_sample
    seen = torch.arange(3 * samples).view(samples, 3) % 5 > 1
    shapes = [(samples, per_sample, 17), (samples, 1, 18), (samples, per_sample, 5)]
    assert_close(both(shapes, 18, seen, norm_eps=norm_eps, activation="gelu"))


# the pooled sources' own rows: along inner, outer and all dimensions; two that broadcast alike, and nothing else
BROADCASTS = {
    "inner": ([(3, 19, 17), (3, 1, 18)], 0),
    "outer": ([(3, 19, 17), (19, 18)], 0),
    "inner, outer and all": ([(3, 19, 17), (3, 1, 18), (1, 19, 5), (7,)], 0),
    "alike": ([(3, 1, 18), (3, 19, 17), (3, 1, 9)], 0),
    "pooled only": ([(3, 1, 18), (1, 19, 17)], 0),
    "between others": ([(3, 5, 4, 6), (1, 5, 1, 7), (3, 1, 4, 8)], 0),
    "far from 0 and apart": ([(3, 19, 17), (3, 1, 18), (1, 19, 5)], 1000),
    "one feature": ([(3, 19, 17), (3, 1, 1), (1, 19, 1)], 1000),
}


@pytest.mark.parametrize("absence", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize(("shapes", "far"), BROADCASTS.values(), ids=BROADCASTS)
def test_pooled_sources_under_a_norm(small_tiles, shapes, far, absence):
    """With absence, an own row that several samples share is absent from some of them, or from all."""
    seen = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool() if absence else None
    seen = seen[:, : len(shapes)] if absence else None
    for activation in ("gelu", "swiglu"):
        assert_close(both(shapes, 20, seen, far, norm_eps=1e-5, activation=activation))


def test_a_pooled_source_in_half_precision_keeps_its_range():
    """Centred it would leave float16's, and so would the sums of its gradient before they are scaled."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    assert_close(in_half([draw(3, 19, 17), draw(3, 1, 18) * 2e4, draw(20, 35) / 6, 8 * draw(35)]))


def test_a_feature_that_stands_out_and_is_scaled_keeps_its_range():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    pooled, scale = torch.zeros(3, 1, 4096), torch.ones(4104)
    pooled[..., 7], scale[15] = 100, 1100
    results = in_half([draw(3, 4, 8), pooled, draw(5, 4104) / 64, scale])
    assert_close([out[:1] for out in results])  # the gradients leave it for the reference too


def in_half(leaves):
    results = []
    for op, dtype in ((concat_linear, torch.float16), (reference.concat_linear, torch.float16),
                      (reference.concat_linear, torch.float64)):  # fmt: skip
        cast = [t.half().to(DEVICE, dtype).requires_grad_() for t in leaves]
        with backend("triton"):
            out = op(cast[:2], cast[2], norm_eps=1e-5, norm_weight=cast[3])
        results.append([out, *torch.autograd.grad(out.float().square().mean(), cast)])
    return results


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("absence", [False, True], ids=["all present", "some absent"])
def test_a_pooled_source_is_nowhere_at_the_output_s_size(norm_eps, absence):
    """It has 8 times fewer rows; what is made besides is no wider than the full source or the output."""
    inputs = [torch.randn(shape, device=DEVICE) for shape in ((8, 8, 4), (8, 1, 512), (1, 8, 512))]
    weight = torch.randn(4, 1028, device=DEVICE)
    norm = torch.randn(2, 1028, device=DEVICE) if norm_eps else (None, None)
    seen = torch.arange(24, device=DEVICE).view(8, 3) % 5 > 1 if absence else None
    options = (seen, norm_eps, *norm, "gelu")
    with Sizes() as made:
        out, preact, *moments = kernels.concat_linear(inputs, weight, None, *options, None, None, True)
        needs = [True] * 4 + [False] + [norm_eps is not None] * 2 + [False]
        kernels.concat_linear_backward(
            out, inputs, weight, *options, None, preact, *(moments or [None] * 2), needs
        )
    assert max(made.sizes) < 64 * 512 * 4 / 2


@pytest.mark.skipif(DEVICE == "cuda", reason="products are counted in the interpreter")
def test_a_pooled_source_is_multiplied_at_its_own_size_under_a_norm_too(small_tiles, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot, work = InterpreterBuilder.create_dot, []

    def count(self, a, b, *more):
        work.append(a.data.size * b.data.shape[1])
        return create_dot(self, a, b, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    counts = {}
    for norm_eps in (None, 1e-5):
        work.clear()
        both([(16, 16, 16), (16, 1, 256)], 16, norm_eps=norm_eps)
        counts[norm_eps] = sum(work)
    again = 16 * 256 * 16  # the backward projects it again
    away = 256 * 16 * 16  # what centring left out of the weight's gradient
    assert counts[1e-5] <= counts[None] + again + away


@pytest.fixture
def described(small_tiles, monkeypatch):
    """Small tiles through tensor descriptors where that can be; whether they were, launch by launch."""
    entry = _launch.measured("concat_linear", None)
    entry["triton"] = {name: _launch.described(sizes) for name, sizes in entry["triton"].items()}
    used = []

    def spy(options, *given):
        use_descriptors(options, *given)
        used.append(options["DESCRIPTORS"])

    use_descriptors = _launch.use_descriptors
    for module in ("concat_linear", "concat_linear_backward"):
        monkeypatch.setattr(f"mmfast.kernels.{module}.use_descriptors", spy)
    return used


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([(3, 19, 24), (3, 1, 16), (3, 19, 8)], True),
        ([(57, 40), (57, 4)], True),
        ([(1100, 40)], True),
        ([(3, 19, 24), (3, 1, 15), (3, 19, 8)], False),
        ([(57, 40), (1, 8)], False),
    ],
    ids=["a pooled source", "flat", "two chunks", "rows of 15", "one row for all"],
)
def test_tiles_through_descriptors_are_the_same(described, activation, shapes, wanted):
    assert_close(both(shapes, 40, activation=activation))
    assert set(described) == {True} if wanted else False in described, described


def test_absent_rows_and_normed_ones_take_no_descriptor(described):
    shapes = [(3, 19, 24), (3, 19, 8)]
    assert_close(both(shapes, 40, torch.tensor([[True, False], [True, True], [False, True]])))
    assert set(described) == {False}
    assert_close(both(shapes, 40, norm_eps=1e-5))
    assert described.count(True) == 2, "the gradients before the norm's"


def test_rows_in_steps_that_differ_take_no_descriptor(described):
    x = torch.randn(3, 19, 48, device=DEVICE)[:, ::2, :24]
    weight = torch.randn(40, 24, device=DEVICE)
    with backend("triton"):
        out = concat_linear([x, x.transpose(0, 1).contiguous().transpose(0, 1)], torch.cat([weight] * 2, 1))
    assert described == [False]
    torch.testing.assert_close(out, 2 * x @ weight.T, rtol=1e-4, atol=1e-4)


def test_more_than_three_leading_dimensions_are_copied_and_right():
    shapes = [(2, 3, 1, 4, 1, 6), (2, 1, 2, 1, 2, 5), (2, 3, 2, 4, 2, 3)]
    assert_close(both(shapes, 4, activation="silu"))
    assert_close(both(shapes, 4, norm_eps=1e-5))


def test_neighbouring_dimensions_that_all_step_through_alike_are_one():
    x, pooled = torch.empty(4, 5, 6, 8), torch.empty(4, 1, 1, 3)
    sizes, strides = _launch.collapse((4, 5, 6), [x, pooled])
    assert sizes == (1, 4, 30) and strides == [(0, 240, 8), (0, 3, 0)]
    assert _launch.collapse((4, 5, 6), [x])[0] == (1, 1, 120)
    assert _launch.collapse((2, 3, 4, 5), [torch.empty(2, 1, 4, 1, 7), torch.empty(1, 3, 1, 5, 7)]) is None


@pytest.mark.parametrize(("setting", "wanted"), (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")))
def test_float32_products_follow_pytorch(setting, wanted):
    x, before = torch.empty(1), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert _launch.configuration("concat_linear", "forward", x, x.dtype, UNTUNED)["PRECISION"] == wanted
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_rows_that_32_bits_cannot_count_to_the_end_of_a_part_are_refused():
    row, weight = torch.zeros(1, 3, device=DEVICE), torch.zeros(4, 6, device=DEVICE)
    assert _launch.lead_of("concat_linear", [row.expand(2**30 - 1, 3), row]) == (2**30 - 1,)
    with (
        backend("triton"),
        pytest.raises(ValueError, match=r"got 1073741824 rows, wanted fewer than 2\*\*30"),
    ):
        concat_linear([row.expand(2**30, 3), row], weight)


def test_float64_is_refused_by_name():
    x, weight = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), torch.zeros(4, 3, dtype=torch.float64)
    with (
        backend("triton"),
        pytest.raises(TypeError, match="got float64, wanted float32, bfloat16 or float16"),
    ):
        concat_linear([x], weight.to(DEVICE))
