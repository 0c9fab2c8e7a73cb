"""The ten promises of docs/architecture.md for contrastive_loss, on every backend that is there, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from check import backends, cast, check, compiled, dtypes, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, contrastive_loss, native_calls, reference

BACKENDS = backends("contrastive_loss")
KERNELS = [name for name in BACKENDS if name != "reference"]
KINDS = ["softmax", "sigmoid"]
SCALARS = ("logit_scale", "logit_bias")


def example(
    pairs=21, features=24, *, problems=3, kind="softmax", bias=True, present=False, seed=0, grad=True
):
    """Arguments in float64 for several losses: of one alone, a rounding error may be next to nothing by luck."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(problems, *shape, generator=generator, dtype=torch.float64)

    arguments = {"a": randn(pairs, features), "b": randn(pairs, features), "logit_scale": 0.5 + randn().abs()}
    arguments["logit_bias"] = randn() - 1 if bias else None
    for name, t in arguments.items():
        # a softmax does not change with its bias, so what the definition gives for it is rounding alone
        if t is not None and not (name == "logit_bias" and kind == "softmax"):
            t.requires_grad_(grad)
    arguments["kind"] = kind
    if present:
        arguments["present"] = torch.rand(problems, pairs, generator=generator) > 0.4
    return arguments


def each(function):
    """The losses of several problems, in the inputs' dtype."""

    def op(a, b, logit_scale, logit_bias=None, kind="softmax", present=None):
        optional = [[None] * len(a) if t is None else t for t in (logit_bias, present)]
        return torch.stack([
            function(*one[:3], one[3], kind=kind, present=one[4])[0].to(a.dtype)
            for one in zip(a, b, logit_scale, *optional, strict=True)
        ])  # fmt: skip

    return op


def on(name):
    def op(*args, **options):
        with backend(name):
            return contrastive_loss(*args, **options)

    return op


def ours(name):
    return each(on(name))


MEANT = each(reference.contrastive_loss)
OPTIONS = {
    "plain": {"bias": False},
    "bias": {},
    "present": {"present": True},
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_as_exact_as_promised(name, kind, options):
    for dtype in dtypes(name):
        check(ours(name), MEANT, example(kind=kind, **options), dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [-1.3, 0.0])
def test_the_scale_may_be_negative_or_0(name, kind, scale):
    arguments = example(kind=kind, present=True)
    arguments["logit_scale"] = torch.full((3,), scale, dtype=torch.float64, requires_grad=True)
    for dtype in dtypes(name):
        check(ours(name), MEANT, arguments, dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_as_exact(name, kind):
    check(compiled(ours(name)), MEANT, example(kind=kind, present=True), torch.float32)


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: each(contrastive_loss)(**a).log(), backend="inductor")
    check(function, lambda **a: MEANT(**a).log(), example(present=True), torch.float32)


@st.composite
def any_problem(draw):
    """Any number of pairs and features, present or not, in any layout."""
    pairs, features = draw(st.sampled_from([0, 1, 2, 5, 17, 66])), draw(st.sampled_from([0, 1, 7, 16, 65]))
    arguments = example(
        pairs,
        features,
        kind=draw(st.sampled_from(KINDS)),
        bias=draw(st.booleans()),
        present=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    for name in ("a", "b"):
        how = draw(st.sampled_from(["dense", "sliced", "stepped", "transposed"]))
        arguments[name] = laid_out(arguments[name], how)
    return arguments


def laid_out(x, how):
    """The same values in another layout. Only "transposed" has no dense last dimension."""
    x = x.detach()
    if how == "sliced":  # columns of something wider
        x = torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    elif how == "stepped":  # every second row
        x = torch.stack([x, x], -2).flatten(1, 2)[:, ::2]
    elif how == "transposed":
        x = x.mT.contiguous().mT
    return x.requires_grad_()


@pytest.mark.parametrize("name", KERNELS)
def test_any_shape_presence_and_layout(name):
    @settings(max_examples=40 if name == "cpu" else 8)
    @given(any_problem())
    def every(arguments):
        check(ours(name), MEANT, arguments, torch.float32)

    every()


@pytest.mark.parametrize("name", KERNELS)
def test_rows_may_share_their_memory(name):
    """Of equal rows a gradient is next to 0, and so would be what it may be off by: the bits of a copy are wanted."""
    a, b = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    shared = a[:1].expand(9, -1).requires_grad_()
    copied = shared.detach().clone().requires_grad_()
    results = [on(name)(x, b, torch.ones(()))[0] for x in (shared, copied)]
    assert same_bits(*results)
    assert same_bits(*(torch.autograd.grad(*pair)[0] for pair in zip(results, (shared, copied), strict=True)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_absent_reaches_no_bit(name, kind):
    present = torch.tensor([1, 0, 0, 1, 1] * 4).bool()
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        new = cast(example(20, kind=kind, problems=2), torch.float32) | {"present": present.expand(2, -1)}
        with torch.no_grad():
            new["a"][:, ~present] = poison
            new["b"][:, ~present] = -poison
        results.append(run(ours(name), new))
    for other in results[1:]:
        for key, value in results[0].items():
            assert same_bits(value, other[key]), key
    for key in ("a", "b"):
        assert results[0][f"gradient of ['{key}']"][:, ~present].count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_absent_might_as_well_not_be_there(name, kind):
    a = cast(example(problems=1, kind=kind, grad=False), torch.float32)
    (x,), (y,), (scale,), (bias,) = a["a"], a["b"], a["logit_scale"], a["logit_bias"]
    present = torch.arange(len(x)) % 3 != 1
    some, count = on(name)(x, y, scale, bias, kind=kind, present=present)
    alone, number = on(name)(x[present], y[present], scale, bias, kind=kind)
    assert count == number == present.sum() and count.dtype == number.dtype == torch.int64
    assert torch.allclose(some, alone, rtol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_visible_propagates_nan(name, kind):
    arguments = cast(example(kind=kind), torch.float32)
    with torch.no_grad():
        arguments["b"][1, 2] = float("nan")
    results = run(ours(name), arguments)
    assert results["out"].isnan().tolist() == [False, True, False]
    wanted = run(MEANT, arguments)
    for key, value in results.items():
        assert torch.equal(value.isnan(), wanted[key].isnan()) or "bias" in key, key


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_and_none_present_lose_nothing(name, kind):
    for pairs in (0, 7):
        arguments = cast(example(pairs, problems=1, kind=kind), torch.float32)
        arguments["present"] = torch.zeros(1, pairs, dtype=torch.bool)
        results = run(ours(name), arguments)
        assert all((value == 0).all() for value in results.values())
        leaves = [arguments[key].requires_grad_() for key in ("a", "b", *SCALARS)]
        loss, count = on(name)(*(t[0] for t in leaves), kind=kind, present=arguments["present"][0])
        assert count == 0
        for gradient in torch.autograd.grad(loss / count, leaves):  # the loss is handed 1 / 0
            assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_gradient_reaches_no_absent_pair(name, kind):
    arguments = cast(example(20, kind=kind, problems=1, present=True), torch.float32)
    leaves = [arguments[key] for key in ("a", "b")]
    out = ours(name)(**arguments)
    for gradient in torch.autograd.grad(out, leaves, torch.full_like(out, torch.inf)):
        absent = ~arguments["present"]
        assert gradient[absent].count_nonzero() == 0 and not gradient[~absent].isfinite().any()


@pytest.mark.parametrize("name", [name for name in KERNELS if torch.float64 in dtypes(name)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(name, kind):
    a = example(5, 3, kind=kind, problems=1)
    (x,), (y,), (scale,), (bias,) = (a[key].detach() for key in ("a", "b", *SCALARS))
    tensors = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
    present = torch.tensor([True, True, False, True, True])
    for seen in (None, present):
        assert torch.autograd.gradcheck(lambda *t, s=seen: on(name)(*t, kind=kind, present=s)[0], tensors)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(name, kind):
    """All utilities, on the forward and the backward op; gradients live above the ops, so none are asked of them."""
    for options in OPTIONS.values():
        a = cast(example(problems=1, kind=kind, grad=False, **options), torch.float32)
        present = a["present"][0] if "present" in a else None
        bias = None if a["logit_bias"] is None else a["logit_bias"][0]
        forward = a["a"][0], a["b"][0], a["logit_scale"][0], bias, kind, present
        torch.library.opcheck(getattr(torch.ops.mmfast.contrastive_loss, name), forward)
        loss, *lse = getattr(torch.ops.mmfast.contrastive_loss, name)(*forward)
        for needs in ([True, True, True, bias is not None], [False, True, False, False]):
            backward = torch.ones_like(loss), *forward, lse[0] if lse else None, needs
            torch.library.opcheck(getattr(torch.ops.mmfast.contrastive_loss_backward, name), backward)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_partial_requires_grad(name, kind):
    arguments = cast(example(problems=1, kind=kind, present=True), torch.float32)
    full = run(ours(name), arguments)
    keys = [key for key, t in arguments.items() if torch.is_tensor(t) and t.requires_grad]
    for wanted in keys:
        partial = cast(arguments, torch.float32)
        for key in keys:
            partial[key].requires_grad_(key == wanted)
        got = run(ours(name), partial)
        assert list(got) == ["out", f"gradient of ['{wanted}']"]
        assert all(torch.equal(value, full[key]) for key, value in got.items()), wanted


@pytest.mark.parametrize("name", KERNELS)
def test_the_forced_backend_really_runs(name):
    names = [f"{op}.{name}" for op in ("contrastive_loss", "contrastive_loss_backward")]
    before = [native_calls(op) for op in names]
    run(ours(name), cast(example(problems=1), torch.float32))
    assert [native_calls(op) for op in names] == [n + 1 for n in before]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(name, kind):
    arguments = example(150 if name == "cpu" else 40, kind=kind, present=True, problems=1)
    first, second = (run(ours(name), cast(arguments, torch.float32)) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example(problems=1), torch.float32)
    (gradient,) = torch.autograd.grad(ours(name)(**arguments).sum(), arguments["a"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
def test_both_sides_may_be_one_tensor(name):
    def with_itself(function):
        return lambda a, **others: function(a, a, **others)

    arguments = example()
    del arguments["b"], arguments["logit_bias"]
    for function in (ours(name), compiled(ours(name))):
        check(with_itself(function), with_itself(MEANT), arguments, torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_the_features_and_not_the_scale(name):
    dtype = torch.float16 if name == "triton" else torch.bfloat16
    a = cast(example(problems=1), torch.float32)
    args = [a[key][0] for key in ("a", "b", *SCALARS)]
    with torch.autocast("cpu", dtype):
        loss, _ = on(name)(*args)
        assert torch.equal(loss, compiled(on(name))(*args)[0])
    plain, _ = on(name)(*(t.to(dtype) for t in args[:2]), *args[2:])
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    loss.backward()
    assert a["a"].grad.dtype == torch.float32
    if torch.float64 in dtypes(name):
        with torch.autocast("cpu", dtype):
            assert on(name)(*(t.double() for t in args))[0].dtype == torch.float64


@pytest.mark.parametrize("name", KERNELS)
def test_a_softmax_does_not_change_with_its_bias(name):
    arguments = cast(example(), torch.float32)
    arguments["logit_bias"].requires_grad_()
    results, without = (run(ours(name), a) for a in (arguments, arguments | {"logit_bias": None}))
    assert (results.pop("gradient of ['logit_bias']") == 0).all()
    assert all(torch.equal(value, without[key]) for key, value in results.items())


@pytest.mark.parametrize("name", KERNELS)
def test_a_scalar_in_a_list_is_one_too(name):
    a = cast(example(problems=1), torch.float32)
    flat = [a["a"][0], a["b"][0], a["logit_scale"], a["logit_bias"].requires_grad_()]
    loss, _ = on(name)(*flat)
    assert loss.shape == ()
    gradients = torch.autograd.grad(loss, [a["logit_scale"], a["logit_bias"]])
    assert [g.shape for g in gradients] == [(1,), (1,)]
    assert gradients[1].item() == 0


def test_twenty_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    loss = torch.compile(on("cpu" if "cpu" in KERNELS else KERNELS[0]), fullgraph=True, backend=counter)
    for pairs in range(2, 22):
        a = cast(example(pairs, problems=1, present=True), torch.float32)
        loss(*(a[key][0] for key in ("a", "b", *SCALARS)), present=a["present"][0])[0].backward()
    assert counter.frame_count <= 2


def test_the_reference_is_what_people_write_today():
    arguments = example(problems=1)
    (a,), (b,), (scale,), (bias,) = (arguments[key] for key in ("a", "b", *SCALARS))
    logits, target = scale * a @ b.T + bias, torch.arange(len(a))
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    siglip = -F.logsigmoid((2 * torch.eye(len(a)) - 1) * logits).sum() / len(a)
    for kind, meant in (("softmax", clip), ("sigmoid", siglip)):
        loss, count = reference.contrastive_loss(a, b, scale, bias, kind=kind)
        torch.testing.assert_close(loss / count, meant)


def test_a_group_is_refused():
    x = torch.zeros(3, 4)
    with pytest.raises(NotImplementedError, match="group is of type object, wanted None"):
        contrastive_loss(x, x, torch.ones(()), group=object())


ERRORS = {
    "kind is 'tanh', wanted one of softmax, sigmoid": {"kind": "tanh"},
    "a's dtype is torch.int64, wanted float32, bfloat16, float16 or float64": {"a": torch.zeros(3, 4).long()},
    "a is [3], wanted [N, E]": {"a": torch.zeros(3)},
    "b is torch.float64 on cpu, wanted a's torch.float32 on cpu": {"b": torch.zeros(3, 4).double()},
    "b is [4, 4], wanted [3, 4] as a has it": {"b": torch.zeros(4, 4)},
    "logit_scale is a float, wanted a tensor of one element": {"logit_scale": 1.0},
    "logit_scale is torch.float64 on cpu, wanted a's torch.float32 or torch.float32 on cpu": {
        "logit_scale": torch.ones((), dtype=torch.float64)
    },
    "logit_scale is [2], wanted [] or [1]": {"logit_scale": torch.ones(2)},
    "logit_bias is [1, 1], wanted [] or [1]": {"logit_bias": torch.ones(1, 1)},
    "present is a list, wanted a tensor": {"present": [True, True, False]},
    "present is torch.float32 on cpu, wanted torch.bool on cpu": {"present": torch.ones(3)},
    "present is [4], wanted [3], one for each pair": {"present": torch.ones(4).bool()},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(message):
    arguments = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "logit_scale": torch.ones(())}
    with pytest.raises(TypeError if "wanted a tensor" in message else ValueError) as error:
        contrastive_loss(**(arguments | ERRORS[message]))
    assert str(error.value) == f"contrastive_loss: {message}"
