"""What only the C++ kernels of contrastive_loss promise: instruction sets, threads, extremes, and memory."""

import pytest
import torch
import torch.nn.functional as F
from check import cast, check, isas, python, same_bits
from test_contrastive_loss import KINDS, MEANT, example, on, ours

from mmfast.ops import available, reference

pytestmark = pytest.mark.skipif(
    available("contrastive_loss", "cpu")["cpu"] != "ready", reason="the native CPU library is not there"
)
ISAS = isas()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_is_as_exact(isa, kind):
    """Pairs and features that fill no tile, blocks of which there are several, and what is absent between."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(ours("cpu"), MEANT, example(250, 70, kind=kind, present=True, problems=1), dtype)
    check(ours("cpu"), MEANT, example(140, 64, kind=kind, problems=2), torch.float32)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_directional_derivatives_in_float32(isa, kind):
    """The gradient along a direction is the slope of the kernel's own loss along it."""
    arguments = cast(example(40, kind=kind), torch.float32)
    names = [name for name, t in arguments.items() if torch.is_tensor(t) and t.requires_grad]
    leaves = [arguments[name] for name in names]
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(t.shape, generator=generator) for t in leaves]
    gradients = torch.autograd.grad(ours("cpu")(**arguments).sum(), leaves)
    slope = sum((g.double() * way).sum() for g, way in zip(gradients, ways, strict=True))
    size = sum((g.double() * way).abs().sum() for g, way in zip(gradients, ways, strict=True))

    def along(step):
        moved = [t.detach() + step * way for t, way in zip(leaves, ways, strict=True)]
        return ours("cpu")(**arguments | dict(zip(names, moved, strict=True))).double().sum()

    step = 2.0**-8
    assert abs((along(step) - along(-step)) / (2 * step) - slope) < 2e-3 * size


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 3e4])
def test_logits_may_be_of_any_size(isa, kind, scale):
    """Where a pair is told from all others to the last digit, its weight is 1 and its slope 0."""
    arguments = example(70, 16, kind=kind)
    with torch.no_grad():
        arguments["logit_scale"].fill_(scale)
        arguments["a"] += arguments["b"]
    check(ours("cpu"), MEANT, arguments, torch.float32)


def both_sides_alike():
    x = F.normalize(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    return {"a": x, "b": x, "logit_scale": torch.tensor(20.0)}


def one_other_is_near():
    """The largest logit but the own one is so far below it that a maximum may just lag: in half of the rows and
    columns it comes first.
    """
    one = torch.eye(128)
    return {"a": one, "b": one + one.roll(64, 0) / 2, "logit_scale": torch.tensor(16.5)}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [both_sides_alike, one_other_is_near])
def test_pairs_told_from_all_others_keep_their_small_slopes(isa, kind, problem):
    """An own pair's slope is its weight less 1: of a weight near 1 all digits count, in bfloat16 too."""
    arguments = {name: t[None].double().requires_grad_() for name, t in problem().items()}
    for dtype in (torch.bfloat16, torch.float32):
        check(ours("cpu"), MEANT, arguments | {"kind": kind}, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_is_as_exact_and_repeats_its_bits(kind):
    arguments = cast(example(300, 33, kind=kind, present=True, problems=1), torch.float32)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs = [ours("cpu")(**arguments) for _ in range(2)]
        gradients = [torch.autograd.grad(out.sum(), arguments["a"])[0] for out in outs]
        assert same_bits(*outs) and same_bits(*gradients)
        check(ours("cpu"), MEANT, arguments, torch.float32)
    torch.set_num_threads(before)


def test_the_loss_of_half_precision_features_is_not_rounded_to_it():
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(2, 500, 32, generator=torch.Generator().manual_seed(0)) / 4).to(dtype)
        loss, _ = on("cpu")(a, b, torch.tensor(10.0))
        exact, _ = reference.contrastive_loss(a.double(), b.double(), torch.tensor(10.0))
        assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 1e-5


PEAK = """
import torch
from mmfast.ops import backend, contrastive_loss
def now(name): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
torch.set_num_threads(2)
def step(pairs):
    a, b = torch.randn(2, pairs, 256, dtype=torch.DTYPE).unbind(0)
    a.requires_grad_(), b.requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    with backend("BACKEND"): contrastive_loss(a, b, torch.ones(()))[0].backward()
    return now("VmHWM") - before
step(64)
print(step(PAIRS))
"""


def peak(name, dtype="float32", pairs=4096):
    code = PEAK.replace("BACKEND", name).replace("DTYPE", dtype).replace("PAIRS", str(pairs))
    return float(python(code))


@pytest.mark.alone
@pytest.mark.parametrize("dtype, pairs, sums", [("float32", 4096, 8), ("bfloat16", 16384, 24)])
def test_the_matrix_is_never_there(dtype, pairs, sums):
    """[4096, 4096] in float32 is 64 MiB; what a thread works with is below 3 MiB.

    The sums are the gradients, and for bfloat16 half as much again: a third byte of each.
    """
    assert peak("cpu", dtype, pairs) < sums + 10


@pytest.mark.alone
def test_a_peer_that_makes_it_is_seen_to():
    assert peak("reference") > 128
