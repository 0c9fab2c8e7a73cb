"""Which backend runs: chosen from the table, or forced, and never a silent fallback."""

import itertools
import os

import pytest
import torch
from check import compiled, python
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mmfast.ops._backend as _backend
from mmfast import _native
from mmfast.ops import (
    available,
    backend,
    concat_linear,
    contrastive_loss,
    group_norm,
    lowrank_fusion,
    native_calls,
    weighted_fusion,
)

X, W = [torch.ones(2, 3), torch.ones(2, 1)], torch.ones(4, 4)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'tpu', wanted one of cpu, triton, cuda, reference"):
        with backend("tpu"):
            pass


def test_an_impossible_choice_is_an_error_with_the_reason():
    with (
        backend("cuda"),
        pytest.raises(ValueError, match="'cuda' cannot run concat_linear on cpu tensors: it is for"),
    ):
        concat_linear(X, W)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with backend("triton"), pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        concat_linear(X, W)


@pytest.mark.skipif("mmfast_cuda" in _native.missing, reason="the native CUDA library is not there")
def test_cuda_kernels_need_a_gpu_that_they_are_compiled_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, state in (((7, 5), "needs compute capability 8.0: this GPU has 7.5"), ((8, 0), "ready")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert available("cross_attention", "cuda")["cuda"] == state


def test_forcing_ends_with_the_block_even_after_an_error():
    def choose():
        return _backend.choose("concat_linear", torch.device("cpu"))

    before = choose()
    with pytest.raises(KeyError), backend("cpu" if before == "reference" else "reference"):
        raise KeyError
    assert choose() == before


def test_without_vector_instructions_nothing_is_measured():
    code = """
import torch
from mmfast import _native
from mmfast.ops._backend import available, choose
print(_native.cpu, available("concat_linear", "cpu")["cpu"], choose("concat_linear", torch.device("cpu")))
"""
    plain = python(code, MMFAST_ISA="plain").split()
    assert plain in (["True", "ready", "reference"], ["False", "not", "built", "reference"])


def test_a_compiled_graph_follows_the_forced_backend():
    if available("concat_linear", "cpu")["cpu"] != "ready":
        pytest.skip("the native CPU library is not there")
    function = compiled(lambda x, w: concat_linear(x, w))
    calls = [native_calls("concat_linear.cpu")]
    for name in ("cpu", "reference", "cpu"):
        with backend(name):
            function(X, W)
        calls.append(native_calls("concat_linear.cpu"))
    assert [b - a for a, b in itertools.pairwise(calls)] == [1, 0, 1]


def test_every_backend_says_what_it_is():
    for device in ("cpu", "cuda"):
        states = available("concat_linear", device)
        assert list(states) == ["cpu", "triton", "cuda", "reference"] and all(states.values())
    if not torch.cuda.is_available():
        assert available("concat_linear", "cuda")["triton"].startswith("compiled, not run")


def test_a_device_that_nobody_measured_gets_the_reference(monkeypatch):
    monkeypatch.setattr(_backend, "TABLE", {})
    _backend._from_table.cache_clear()
    assert _backend.choose("concat_linear", torch.device("cpu")) == "reference"
    _backend._from_table.cache_clear()


def test_a_gpu_is_asked_once_and_the_current_one_every_time():
    asked = []
    ask = _backend.by_device(lambda device: asked.append(device) or len(asked))
    numbered, current = torch.device("cuda", 1), torch.device("cuda")
    assert [ask(numbered), ask(numbered), ask(current), ask(current)] == [1, 1, 2, 3]


def test_without_the_native_library_the_op_still_runs():
    code = """
import pathlib, torch
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: not self.name.startswith("libmmfast") and exists(self)
from mmfast.ops import available, concat_linear
print(available("concat_linear", "cpu")["cpu"], concat_linear([torch.ones(2, 3)], torch.ones(4, 3))[0].tolist())
"""
    assert python(code).strip() == "not built [3.0, 3.0, 3.0, 3.0]"


@pytest.mark.parametrize("to", [0, 1, 2], ids=["input", "weight", "bias"])
def test_a_penalty_on_a_gradient_is_refused_wherever_it_is_to_arrive(to):
    if available("concat_linear", "cpu")["cpu"] != "ready":
        pytest.skip("the native CPU library is not there")
    given = [torch.randn(shape, requires_grad=True) for shape in ((2, 3), (4, 3), (4,))]
    with backend("cpu"):
        y = concat_linear(given[:1], given[1], given[2], activation="gelu").sum()
    (slope,) = torch.autograd.grad(y, given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y + slope.square().sum(), given[to])


def test_a_graph_of_the_backward_keeps_what_a_checkpoint_makes_anew():
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = checkpoint(lambda x: concat_linear([x], w, activation="silu"), x, use_reentrant=False)
    got = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(F.silu(x @ w.T).sum(), (x, w)))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_transforms_and_tangents_take_the_reference(how):
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    run = compiled if how == "compiled" else lambda function: function

    def ours(x):
        return concat_linear([x], w, activation="silu").sum()

    def plain(x):
        return F.silu(x @ w.T).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.vmap):
        torch.testing.assert_close(run(lambda x, of=transform: of(ours)(x))(x), transform(plain)(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        got, wanted = (forward_ad.unpack_dual(f(dual)).tangent for f in (ours, plain))
        torch.testing.assert_close(got, wanted)
        if available("concat_linear", "cpu")["cpu"] == "ready":
            with backend("cpu"), pytest.raises(ValueError, match="or forward-mode AD"):
                ours(dual)


def test_meta_tensors_have_shapes():
    out = concat_linear([torch.empty(4, 8, device="meta")], torch.empty(5, 8, device="meta"))
    assert out.is_meta and out.shape == (4, 5)


def test_the_reference_keeps_its_dtype_under_autocast():
    x = torch.randn(2, 4, 3)
    with backend("reference"), torch.autocast("cpu", torch.bfloat16):
        for out in (
            concat_linear([x], torch.ones(4, 3)),
            weighted_fusion([x, x], torch.zeros(2)),
            group_norm(x, 2, torch.ones(4), torch.zeros(4)),
        ):
            assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: concat_linear(X, None), "concat_linear: weight is a NoneType, wanted a tensor"),
        (lambda: concat_linear(X, W, gate=0.5), "concat_linear: gate is a float, wanted a tensor or None"),
        (lambda: concat_linear(X, W, [0.0] * 4), "concat_linear: bias is a list, wanted a tensor or None"),
        (lambda: weighted_fusion(X, None), "weighted_fusion: logits is a NoneType, wanted a tensor"),
        (lambda: contrastive_loss(X[0], None, W[0, :1]), "contrastive_loss: b is a NoneType"),
        (lambda: contrastive_loss(X[0], X[0], 1.0), "contrastive_loss: logit_scale is a float"),
        (lambda: group_norm(X[0], 1, 1.0), "group_norm: weight is a float, wanted a tensor or None"),
        (lambda: lowrank_fusion(X, X, 1.0), "lowrank_fusion: rank_weight is a float, wanted a tensor"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_no_tensor_is_named(call, says, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=says):
        call()
