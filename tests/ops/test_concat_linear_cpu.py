"""What only the C++ kernels of concat_linear promise: instruction sets, memory, and what the library may contain."""

import itertools
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from check import ROOT, cast, check, isas, python, same_bits
from test_concat_linear import ACTIVATIONS, OPTIONS, example, on

from mmfast import _native
from mmfast.ops import available, reference

pytestmark = pytest.mark.skipif(
    available("concat_linear", "cpu")["cpu"] != "ready", reason="the native CPU library is not there"
)
ISAS = isas()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_instruction_set_is_as_exact(isa, activation):
    shapes = ((3, 35, 19), (3, 1, 6), (1, 35, 33))  # widths that are no multiple of a vector
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    if activation == "relu":
        dtypes.pop()  # rounding carries a value across the corner, in one of the two and not in the other
    for options in ({}, OPTIONS["everything"] | {"gate": 37}):
        for dtype in dtypes:
            arguments = example(shapes, 37, activation=activation, **options)
            check(on("cpu"), reference.concat_linear, arguments, dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("options", [{}, {"present": True}, {"norm": True}, {"norm": True, "present": True}])
def test_whole_tiles_are_as_exact(isa, activation, options):
    """Their activation is applied in the registers, unless the last of a row's sources is absent."""
    for dtype in (torch.float32, torch.bfloat16):
        corner = activation == "relu" and dtype == torch.bfloat16  # see above
        shapes = ((5, 30, 70), (5, 1, 9), (5, 1, 6), (5, 30, 45))
        arguments = example(shapes, 130, activation=activation, grad=not corner, **options)
        check(on("cpu"), reference.concat_linear, arguments, dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_one_feature_has_no_gradient(isa, dtype):
    arguments = cast(example(((40, 1),), 1, norm=True), dtype)
    on("cpu")(**arguments).backward(torch.randn(40, 1, dtype=dtype))
    assert not arguments["inputs"][0].grad.any()


@pytest.mark.alone
def test_samples_that_lack_a_source_take_no_longer_at_the_end():
    """Rows are sorted by length where batches are made of like lengths: whoever is absent stands last."""
    inputs, weight = [torch.randn(40000, 8), torch.randn(40000, 8)], torch.randn(8, 16)
    last = torch.ones(40000, 2, dtype=torch.bool)
    last[20000:, 1] = False
    orders = (last, last[torch.randperm(40000)])
    seconds = [[], []]
    for _ in range(5):
        for present, own in zip(orders, seconds, strict=True):
            begin = time.perf_counter()
            on("cpu")(inputs=inputs, weight=weight, present=present)
            own.append(time.perf_counter() - begin)
    assert min(seconds[0]) < 10 * min(seconds[1])  # 70 times when every row looked for the first absent one


@pytest.mark.parametrize("shapes", [((60000, 3), (1, 3)), ((2, 30000, 3), (30000, 3))], ids=["one", "many"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_summed_over_many_rows_are_as_exact(norm, shapes):
    """To one row of a source that is broadcast, or to many, and to the bias."""
    check(on("cpu"), reference.concat_linear, example(shapes, 4, norm=norm), torch.float32, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS if a != "relu"]
)  # a step would cross its corner
def test_directional_derivatives_in_float32(isa, activation):
    """The gradient along a direction is the slope of the kernel's own output along it."""
    arguments = cast(example(activation=activation, **OPTIONS["everything"]), torch.float32)
    leaves = [
        *arguments["inputs"],
        *(t for t in arguments.values() if torch.is_tensor(t) and t.requires_grad),
    ]
    ways = [torch.randn_like(t) for t in leaves]
    grad = torch.randn_like(on("cpu")(**arguments))
    gradients = torch.autograd.grad(on("cpu")(**arguments), leaves, grad)
    slope = sum((g.double() * way).sum() for g, way in zip(gradients, ways, strict=True))
    size = sum((g.double() * way).abs().sum() for g, way in zip(gradients, ways, strict=True))

    def along(step):
        with torch.no_grad():
            for t, way in zip(leaves, ways, strict=True):
                t += step * way
            out = on("cpu")(**arguments).double()
            for t, way in zip(leaves, ways, strict=True):
                t -= step * way
        return (out * grad).sum()

    step = 2.0**-9
    assert abs((along(step) - along(-step)) / (2 * step) - slope) < 2e-3 * size


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_activations_hold_from_one_end_of_float32_to_the_other(isa):
    x = torch.cat(
        [torch.linspace(-120, 120, 40001), torch.logspace(-38, 38, 2000), -torch.logspace(-38, 38, 2000)]
    )
    x = torch.cat([x, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])]).unsqueeze(1)
    for activation in ("relu", "gelu", "silu"):
        for options in ({}, {"gate": torch.ones(1)}):
            arguments = {"inputs": [x], "weight": torch.ones(1, 1), "activation": activation} | options
            ours = on("cpu")(**arguments)
            meant = reference.concat_linear(**cast(arguments, torch.float64))
            fine = meant.isfinite()
            torch.testing.assert_close(ours[~fine].double(), meant[~fine], equal_nan=True)
            error = (ours.double() - meant)[fine].abs()
            assert (error <= 8 * torch.finfo(torch.float32).eps * meant[fine].abs() + 1e-6).all(), activation


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_bfloat16_through_gelu_and_back(isa):
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).unsqueeze(1).requires_grad_()
    out = on("cpu")(inputs=[x], weight=torch.ones(1, 1, dtype=x.dtype), activation="gelu")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out[x.isnan()].isnan().all() and grad[x.isnan()].isnan().all()
    finite, rounding = x.isfinite(), 2.0**-8
    t, out, grad = (v.detach()[finite].double() for v in (x, out, grad))
    below = torch.special.erfc(-t / 2**0.5) / 2
    meant, slope = t * below, below + t * torch.exp(-t * t / 2) / (2 * torch.pi) ** 0.5
    assert ((out - meant).abs() <= 1.9 * rounding * meant.abs() + 1e-9).all()
    assert ((grad - slope).abs() <= 1.1 * rounding * slope.abs() + 5e-6).all()


def test_the_environment_names_an_instruction_set():
    for isa in ISAS[:1]:
        assert python("from mmfast import _native; print(_native.isa())", MMFAST_ISA=isa).strip() == isa
    with pytest.raises(ValueError, match="instruction set 'avx1024'"):
        _native.isa("avx1024")


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_long_sums_are_as_exact(isa):
    """One chain of 5000 additions would lose ten times what the reference loses."""
    check(on("cpu"), reference.concat_linear, example(((3, 700, 4100), (3, 1, 900)), 70), torch.float32)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("depth", [1, 31, 33, 80, 150])
def test_nan_in_a_row_stays_in_it(isa, depth):
    """Where an instruction takes more of K than there is, what follows a row's end is the next row."""
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16), (7, 70, 140)):
        x = torch.randn(rows, depth, dtype=dtype, requires_grad=True)
        weight, grad = torch.randn(130, depth, dtype=dtype), torch.randn(rows, 130, dtype=dtype)
        with torch.no_grad():
            x[1::2], grad[1::2] = torch.nan, torch.nan
        out = on("cpu")(inputs=[x], weight=weight)
        for t in (out, torch.autograd.grad(out, x, grad)[0]):
            assert t[::2].isfinite().all() and t[1::2].isnan().all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("rows", [40, 140, 530])
def test_large_products_reach_the_ends_of_float32(isa, rows):
    """AMX takes float32 apart: what is infinite, or adds up to it, must come out as it does elsewhere."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, grad = (
        torch.randn(*shape, generator=generator) for shape in ((rows, 700), (150, 700), (rows, 150))
    )
    for t, (i, j) in itertools.product((x, weight, grad), ((3, 7), (33, 149), (20, 31), (39, 64))):
        t[i, j] = {3: torch.inf, 33: -torch.inf, 20: torch.nan, 39: 3e37}[i]
        t[i - 1, j] = 0
    leaves = x.requires_grad_(), weight.requires_grad_()

    def all_of(function):
        out = function(inputs=[x], weight=weight)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    for ours, meant in zip(all_of(on("cpu")), all_of(reference.concat_linear), strict=True):
        fine = meant.isfinite()
        torch.testing.assert_close(ours[~fine], meant[~fine], rtol=0, atol=0, equal_nan=True)
        assert fine.any() and not fine.all() and ours[fine].isfinite().all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_large_product_just_below_infinity_is_finite(isa):
    """The first pieces of its two elements multiply to more."""
    x, weight, element = torch.zeros(140, 140), torch.zeros(140, 140), 2.0**64 - 2.0**54
    x[2, 3] = weight[4, 3] = element
    out = on("cpu")(inputs=[x], weight=weight)
    assert out[2, 4] == torch.tensor(element).square() and out.count_nonzero() == 1


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_large_products_of_any_scale_are_as_exact(isa, scale):
    arguments = example(((140, 500), (140, 30)), 150, bias=False)
    with torch.no_grad():
        for x in arguments["inputs"]:
            x *= scale
    check(on("cpu"), reference.concat_linear, arguments, torch.float32)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 40, 140, 530])
def test_few_rows_and_many_are_as_exact(isa, dtype, rows):
    """Few rows are multiplied by a weight that is read in place, more by packed panels, one or four at a time."""
    depth = 450 if dtype == torch.float64 else 1700  # the reference's own float64 sums lose more than we may
    for options in ({}, OPTIONS["everything"] | {"gate": 150}):
        arguments = example(((rows, depth), (rows, 70)), 150, activation="gelu", seed=rows, **options)
        check(on("cpu"), reference.concat_linear, arguments, dtype)


def test_a_mean_far_from_zero_does_not_cost_the_norm_its_digits():
    arguments = example(((4, 40, 64), (4, 1, 32), (1, 40, 16)), present=True, norm=True)
    with torch.no_grad():
        for x, offset in zip(arguments["inputs"], (1000, -300, 1000), strict=True):
            x += offset
    check(on("cpu"), reference.concat_linear, arguments, torch.float32)


def test_any_number_of_threads_is_as_exact_and_repeats_its_bits():
    arguments = cast(
        example(((6, 50, 64), (6, 1, 32)), 48, **OPTIONS["everything"] | {"gate": 48}), torch.float32
    )
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs = [on("cpu")(**arguments) for _ in range(2)]
        gradients = [torch.autograd.grad(out.sum(), arguments["weight"])[0] for out in outs]
        assert same_bits(*outs) and same_bits(*gradients)
        check(on("cpu"), reference.concat_linear, arguments, torch.float32)
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 500, 700, 1200])
@pytest.mark.parametrize("columns", [40, 450, 800])
def test_threads_that_share_rows_and_columns_leave_nothing_out(rows, columns):
    arguments = cast(example(((rows, 24), (rows, 8)), columns, grad=False), torch.float32)
    check(on("cpu"), reference.concat_linear, arguments, torch.float32)
    before, outs = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        outs.append(on("cpu")(**arguments))
    torch.set_num_threads(before)
    assert all(same_bits(outs[0], out) for out in outs[1:])


class _Fused(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, n):
        arguments = cast(example(((6, 50, 64), (6, 1, 32)), 48, seed=n, grad=False), torch.float32)
        return on("cpu")(**arguments)


def test_it_runs_in_the_workers_of_a_data_loader():
    """Started afresh; of those that are forked see ``test_forked_workers.py``."""
    wanted = torch.stack([_Fused()[n] for n in range(4)])
    workers = torch.utils.data.DataLoader(
        _Fused(), batch_size=4, num_workers=1, multiprocessing_context="spawn", timeout=60
    )
    assert torch.equal(next(iter(workers)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_a_sample_has_the_same_bits_whatever_the_others_lack(activation, dtype):
    """Rows with the same sources share a tile, also with those of other samples."""
    arguments = example(((9, 7, 40), (9, 7, 24), (9, 1, 8)), 70, activation=activation, grad=False)
    arguments = cast(arguments, dtype)
    present = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    whole = on("cpu")(**arguments, present=present)
    for b in range(9):
        inputs = [x[b : b + 1] for x in arguments["inputs"]]
        alone = on("cpu")(**arguments | {"inputs": inputs}, present=present[b : b + 1])
        assert same_bits(whole[b : b + 1], alone)


# The concatenation of 128, 640 and 640 features is 34 MiB, a pooled source of 640 at the output's size would be 15.
# Printed are the peaks beyond what has to be held: the output, what came before gate and activation with its gradient,
# and the gradients of all that is given.
PEAK = """
import torch
from mmfast.ops import backend, concat_linear
torch.set_num_threads(2)
pooled, norm, present, gated, activation = VARIANT
def mib(what): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what)) / 1024
def size(*ts): return sum(t.numel() * t.element_size() for t in ts) / 2**20
def leaf(*shape): return torch.randn(*shape, dtype=torch.DTYPE, requires_grad=True)
def step(rows):
    xs = [leaf(rows, t, d) for t, d in zip((196, *(1, 1) * pooled, *(196, 196) * (not pooled)), (128, 640, 640))]
    floats = {"weight": leaf(768, 1408), "bias": leaf(768)}
    if norm: floats |= {"norm_weight": leaf(1408), "norm_bias": leaf(1408)}
    if gated: floats |= {"gate": leaf(768), "residual": leaf(rows, 196, 768)}
    visible = torch.rand(rows, 3) > 0.3 if present else None
    grad = torch.randn(rows, 196, 768, dtype=torch.DTYPE)
    before = mib("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    with backend("BACKEND"):
        out = concat_linear(
            xs, present=visible, norm_eps=1e-5 if norm else None, activation=activation, **floats
        )
    saved = size(out) * (gated or activation != "none")
    forward = mib("VmHWM") - before - size(out) - saved
    gradients = torch.autograd.grad(out, [*xs, *floats.values()], grad)
    # the residual's is the gradient that was given
    made = [g for g in gradients if g.data_ptr() != grad.data_ptr()]
    return forward, mib("VmHWM") - before - size(out) - 2 * saved - size(*made)
step(2)
print(*step(ROWS))
"""
ROWS = {"float32": 32, "bfloat16": 64}
VARIANTS = {
    "dense": (False, False, False, False, "none"),
    "norm": (False, True, False, False, "none"),
    "present": (False, False, True, False, "none"),
    "gate and residual": (False, False, False, True, "none"),
    "pooled": (True, False, False, False, "none"),
    "everything, pooled": (True, True, True, True, "gelu"),
}


def beyond_what_is_held(backend, variant, dtype):
    """In the forward and in the whole step, in MiB."""
    code = PEAK.replace("BACKEND", backend).replace("VARIANT", str(VARIANTS[variant]))
    code = code.replace("DTYPE", dtype).replace("ROWS", str(ROWS[dtype]))
    return map(float, python(code).split())


@pytest.mark.alone
@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_concatenation_is_made_and_no_pooled_source_at_the_outputs_size(variant, dtype):
    """What the threads pack and sum was up to 8 MiB; a pooled source would be 15, the concatenation 34."""
    forward, step = beyond_what_is_held("cpu", variant, dtype)
    assert max(forward, step) < 10, (forward, step)


@pytest.mark.alone
@pytest.mark.parametrize("variant", ["dense", "pooled"])
def test_a_peer_that_concatenates_is_seen_to(variant):
    forward, step = beyond_what_is_held("reference", variant, "bfloat16")
    assert min(forward, step) > 20, (forward, step)


def test_files_for_wide_instruction_sets_leak_no_symbol():
    """An inline function compiled for AVX-512 could be the copy that the linker keeps for every processor."""
    objects = sorted((ROOT / "build" / sys.implementation.cache_tag).glob("CMakeFiles/simd_*.dir/**/*.o"))
    if not (objects and shutil.which("nm")):
        pytest.skip("installed without its build folder, or no nm")
    for path in objects:
        lines = subprocess.run(
            ["nm", "-C", path], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        found = [(line.split()[-2], line.split()[-1]) for line in lines if len(line.split()) >= 2]
        assert not [name for kind, name in found if kind in "WwVvu"], path
        public = [name for kind, name in found if kind in "TBDR"]
        assert len(public) == 1 and public[0].startswith("mmfast_"), (path, public)


def test_simd_files_include_no_torch_header():
    allowed = re.compile(r'#include (<immintrin\.h>|<cstdint>|"[a-z_]+\.h")$')
    for path in (ROOT / "csrc/cpu/simd").iterdir():
        for line in path.read_text().splitlines():
            assert not line.startswith("#include") or allowed.match(line), (path, line)


def test_an_argument_type_that_would_be_read_wrongly_does_not_compile(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    include = Path(torch.__file__).parent / "include"
    for kind, fine in (("double", True), ("float", False), ("int", False)):
        (tmp_path / "op.cpp").write_text(
            f'#include "{ROOT}/csrc/cpu/box.h"\n'
            f"static torch::stable::Tensor f(torch::stable::Tensor x, {kind}) {{ return x; }}\n"
            'STABLE_TORCH_LIBRARY_IMPL(mmfast_test, CPU, m) { mmfast::bind<&f>(m, "f"); }\n'
        )
        command = [compiler, "-std=c++20", "-fsyntax-only", f"-isystem{include}", str(tmp_path / "op.cpp")]
        done = subprocess.run(
            [*command, "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"], capture_output=True, text=True
        )
        assert (done.returncode == 0) == fine, done.stderr[-2000:]
        assert fine or "take Tensor, int64_t, double" in done.stderr
