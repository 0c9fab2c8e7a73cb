"""``cross_attention`` against what people do today with several streams of keys.

The peers: ``cat`` and scaled_dot_product_attention under a mask, one SDPA for each source whose outputs are
merged by their log-sum-exp (with its backward written out, since autograd's does not see the log-sum-exp),
FlexAttention compiled, with its block mask (no backward on the CPU, and no block mask for one causal stream
beside another), and SDPA itself where there is one dense source.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, forward_backward, peak_bytes
from mmfast.bench.tune import with_backends


@dataclass(frozen=True)
class Mix:
    """Sizes of one piece of work; ``absent`` is the share of samples that lack a source, or of its keys."""

    queries: int
    keys: tuple[int, ...]
    batch: int = 8
    heads: int = 12
    depth: int = 64
    absent: str = ""  # "lengths" or "streams": half of the keys
    causal: tuple[bool, ...] = ()


MIXES = {
    "text to image, audio, sensor": Mix(77, (577, 1500, 256)),
    "the same, half absent": Mix(77, (577, 1500, 256), absent="lengths"),
    "the same, half the streams": Mix(77, (577, 1500, 256), absent="streams"),
    "head dim 128, half absent": Mix(77, (577, 1500, 256), heads=6, depth=128, absent="lengths"),
    "64 latents to all": Mix(64, (577, 1500, 256), absent="lengths"),
    "image to text, half absent": Mix(577, (77,), absent="lengths"),
    "text to itself and an image": Mix(256, (256, 577), causal=(True, False)),
    "one source": Mix(77, (1500,)),
    "one long source": Mix(1024, (1024,), batch=2),
}
HALF = ("the same, half absent", "the same, half the streams")
WEIGHED = "the same, half absent: forward + backward"  # peak memory is taken too
DENSE = ("one source", "one long source")


def required(name: str, dtype: torch.dtype, backward: bool) -> dict[str, float]:
    """Peer -> how many times its speed this op must have."""
    half = dtype == torch.bfloat16
    if name in DENSE:
        return {"sdpa": 1.7 if half else 1.0}
    if name in HALF and backward:
        return dict.fromkeys(("cat", "merge"), 3.5 if half else 2.5)
    if name in HALF:
        return {"cat": 6.0, "merge": 4.0, "flex": 4.0} if half else {"cat": 3.5, "merge": 2.2, "flex": 2.2}
    return {}


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for dtype, (name, mix), backward in itertools.product(
        (torch.float32, torch.bfloat16), MIXES.items(), (False, True)
    ):
        variants = _variants(mix, device, backward)
        reference = functools.partial(_reference, mix)
        title = f"{name}: forward{' + backward' if backward else ''}"
        weigh = functools.partial(peak_bytes, held, str(dtype), device, device=device)
        made.append(
            Work(
                name=title,
                variants={n: forward_backward(v) for n, v in variants.items()} if backward else variants,
                inputs=functools.partial(_inputs, mix, backward, dtype, device),
                reference=forward_backward(reference) if backward else reference,
                dtype=dtype,
                device=device,
                flops=_pairs(mix) * 4.0 * mix.heads * mix.depth * (3.5 if backward else 1),
                required={p: r for p, r in required(name, dtype, backward).items() if p in variants},
                weigh=weigh if title == WEIGHED else None,
            )
        )
    return made


def held(dtype: str, device: str, variant: str) -> Callable[[], object]:
    """In a fresh process: makes the inputs of the work that is weighed and returns a call of ``variant``."""
    wanted = getattr(torch, dtype.removeprefix("torch."))
    work = next(w for w in works(device) if w.name == WEIGHED and w.dtype == wanted)
    args = work.inputs(0)
    return lambda: work.variants[variant](*args)


def test_cross_attention(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds; and our kernels hold less beside the inputs than any peer."""
    rounds(benchmark)
    if variant == measured.ours != "mmfast reference":
        peers = [held for name, held in measured.peak_bytes.items() if not name.startswith("mmfast")]
        assert all(measured.peak_bytes[variant] < peer for peer in peers)


class Merged(torch.autograd.Function):
    """PyTorch's attention to each source on the CPU; with the outputs' weights ``softmax_i(lse_i)``, one.

    Backward, a source's gradients are those that its attention would have with the output and the
    log-sum-exp of all sources.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, biases: Any, absent: Any, *keys_and_values: Tensor) -> Tensor:
        """Per source an additive mask and where it is absent; keys and values in turn."""
        outs, lses = [], []
        pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
        for (key, value), bias, gone in zip(pairs, biases, absent, strict=True):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, attn_mask=bias
            )
            if gone is not None:  # SDPA makes nan where a sample lacks the source
                lse, out = lse.masked_fill(gone, -torch.inf), out.masked_fill(gone[..., None], 0)
            outs.append(out)
            lses.append(lse)
        each = torch.stack(lses)  # [n, B, H, L]
        out = (torch.stack(outs) * each.softmax(0).to(query.dtype)[..., None]).sum(0)
        ctx.save_for_backward(query, out, each.logsumexp(0), *keys_and_values)
        ctx.biases = biases
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """By source."""
        query, out, lse, *keys_and_values = ctx.saved_tensors
        of_query: Any = 0.0
        grads: list[Tensor] = []
        pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
        for (key, value), bias in zip(pairs, ctx.biases, strict=True):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, lse, 0.0, False, attn_mask=bias
            )
            of_query = of_query + dq
            grads += [dk, dv]
        return of_query, None, None, *grads


def _lengths(mix: Mix, seed: int) -> list[Tensor | None]:
    """For each source the visible keys of every sample: in each mix exactly half of all."""
    if not mix.absent:
        return [None] * len(mix.keys)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(mix.batch, generator=generator)
    made: list[Tensor | None] = []
    for i, size in enumerate(mix.keys):
        if mix.absent == "streams":  # shifted from source to source, so that no sample has none
            made.append(((order + i * mix.batch // 4) % mix.batch < mix.batch // 2) * size)
        else:  # pairs of samples that have `size` keys together, each at least one
            half = torch.randint(1, size, (mix.batch // 2,), generator=generator)
            pairs = torch.cat([half, size - half])
            made.append(pairs[torch.randperm(mix.batch, generator=generator)])
    return made


def _pairs(mix: Mix) -> float:
    """Of a query and a key that it sees, in one head of all samples."""
    pairs = 0.0
    for size, causal in itertools.zip_longest(mix.keys, mix.causal, fillvalue=False):
        pairs += mix.batch * mix.queries * size * (0.5 if causal or mix.absent else 1.0)
    return pairs


def _inputs(mix: Mix, backward: bool, dtype: torch.dtype, device: str, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)

    def random(rows: int, grad: bool = backward) -> Tensor:
        x = torch.randn(mix.batch, mix.heads, rows, mix.depth, generator=generator, device=device)
        return x.to(dtype).requires_grad_(grad)

    sources = [(random(size), random(size)) for size in mix.keys]
    lengths = [None if t is None else t.to(device) for t in _lengths(mix, seed)]
    args = random(mix.queries), sources, lengths
    return (random(mix.queries, grad=False), *args) if backward else args


def _reference(mix: Mix, query: Tensor, sources: Any, lengths: Sequence[Tensor | None]) -> Any:
    return ops.reference.cross_attention(query, sources, lengths=lengths, causal=mix.causal or False)


def _variants(mix: Mix, device: str, backward: bool) -> dict[str, Call]:
    n = len(mix.keys)
    causal = list(mix.causal) or [False] * n

    def ours(query: Tensor, sources: Any, lengths: Sequence[Tensor | None]) -> Tensor:
        return ops.cross_attention(query, sources, lengths=lengths, causal=causal)

    def mask(query: Tensor, size: int, length: Tensor | None, causal: bool) -> Tensor | None:
        """bool [B or 1, 1, L or 1, S], or None where all is seen."""
        at = torch.arange(size, device=query.device)
        if causal:
            return (at <= torch.arange(mix.queries, device=query.device)[:, None] + size - mix.queries)[
                None, None
            ]
        return None if length is None else (at < length[:, None])[:, None, None]

    def cat(query: Tensor, sources: Any, lengths: Sequence[Tensor | None]) -> Tensor:
        key, value = (torch.cat(list(t), 2) for t in zip(*sources, strict=True))
        masks = [mask(query, s, length, c) for s, length, c in zip(mix.keys, lengths, causal, strict=True)]
        together = None
        if any(m is not None for m in masks):
            rows = max(m.shape[2] for m in masks if m is not None)
            batch = max(m.shape[0] for m in masks if m is not None)
            seen = query.new_ones(1, 1, 1, 1, dtype=torch.bool)
            together = torch.cat(
                [
                    (seen if m is None else m).expand(batch, 1, rows, s)
                    for m, s in zip(masks, mix.keys, strict=True)
                ],
                -1,
            )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=together)

    def merge(query: Tensor, sources: Any, lengths: Sequence[Tensor | None]) -> Tensor:
        biases = []
        for size, length, c in zip(mix.keys, lengths, causal, strict=True):
            seen, bias = mask(query, size, length, c), None
            if seen is not None:
                bias = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
                bias = bias.expand(mix.batch, mix.heads, mix.queries, -1)
            biases.append(bias)
        absent = [None if length is None else (length == 0)[:, None, None] for length in lengths]
        return Merged.apply(query, biases, absent, *itertools.chain(*sources))

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(query: Tensor, sources: Any, lengths: Sequence[Tensor | None]) -> Tensor:
        key, value = (torch.cat(list(t), 2) for t in zip(*sources, strict=True))
        if all(length is None for length in lengths):
            return compiled(query, key, value)
        source = torch.repeat_interleave(torch.arange(n), torch.tensor(mix.keys))
        place = torch.cat([torch.arange(s) for s in mix.keys])
        known = torch.stack([length for length in lengths if length is not None])  # [n, B]

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return place[k] < known[source[k], b]

        blocks = create_block_mask(seen, mix.batch, None, mix.queries, key.shape[2], device=str(query.device))
        return compiled(query, key, value, block_mask=blocks)

    variants = with_backends("cross_attention", device, ours)
    if n == 1 and not mix.absent:
        return variants | {
            "sdpa": lambda query, sources, _: F.scaled_dot_product_attention(query, *sources[0])
        }
    variants["cat"] = cat
    if device == "cpu" and n > 1:
        variants["merge"] = merge
    if device == "cpu" and not backward and not mix.causal:
        variants["flex"] = flex
    return variants
