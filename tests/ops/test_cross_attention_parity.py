"""cross_attention against the attentions that PyTorch has, each given the same visibility in its own words."""

import pytest
import torch
import torch.nn.functional as F
from check import cast, check
from test_cross_attention import BACKENDS, OPTIONS, all_of, example, example_for, on
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


def runs_of(name):
    """Under how many of the upstream gradients; the interpreter takes its time."""
    return 1 if name == "triton" else None


def sdpa(query, sources, causal=False, scale=None):
    """One source; the causal mask ends in the lower right corner, as ours does."""
    ((key, value),) = sources
    mask = causal_lower_right(query.shape[2], key.shape[2]) if causal else None
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(6, 21), (70, 130), (130, 130)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("kv_heads", "scale"), [(4, None), (2, 0.7)])
def test_one_source_of_any_length_is_scaled_dot_product_attention(
    name, queries, keys, causal, kv_heads, scale
):
    grouped = {} if kv_heads == 4 else {"kv_heads": kv_heads}
    arguments = example_for(name, queries=queries, sizes=(keys,), causal=causal, **grouped)
    for dtype in (torch.float32, torch.bfloat16) if name == "cpu" else (torch.float32,):
        check(on(name), sdpa, {**arguments, "scale": scale}, dtype, upstreams=4, runs=runs_of(name))


@pytest.mark.parametrize("name", BACKENDS)
def test_more_queries_than_keys_leave_the_first_ones_nothing_to_see(name):
    """Query l sees key s where s <= l + S - L: of 9 queries over 4 keys, the first 5 see none, and get 0."""
    arguments = cast(example(queries=9, sizes=(4,), causal=True), torch.float32)
    out = on(name)(**arguments)
    assert (out[:, :, :5] == 0).all()
    rest = {**arguments, "query": arguments["query"][:, :, 5:]}
    torch.testing.assert_close(out[:, :, 5:], sdpa(**rest))


def per_source(query, sources, lengths, causal):
    """SDPA for each source, merged by the log-sum-exp of its logits; every query sees something of each."""
    outs, lses = [], []
    for (key, value), length in zip(sources, lengths, strict=True):
        batch, queries, size = query.shape[0], query.shape[2], key.shape[2]
        seen = torch.ones(batch, 1, queries, size, dtype=torch.bool)
        if length is not None:
            seen = seen & (torch.arange(size) < length[:, None, None, None])
        if causal:
            seen = seen & torch.ones(queries, size, dtype=torch.bool).tril(size - queries)
        logits = (query @ key.mT) * query.shape[-1] ** -0.5
        outs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen))
        lses.append(logits.masked_fill(~seen, -torch.inf).logsumexp(-1))
    lse = torch.stack(lses, -1)  # [B, H, L, n]
    mass = lse.softmax(-1)
    out = sum(out * share[..., None] for out, share in zip(outs, mass.unbind(-1), strict=True))
    return torch.cat([out, lse.logsumexp(-1, keepdim=True), mass.detach()], -1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_sources_are_one_attention_each_merged_by_log_sum_exp(name, causal):
    """Output, lse and mass, and the gradients through all of them that have one."""
    arguments = example_for(name, queries=20, sizes=(33, 20, 70), causal=causal)
    arguments["lengths"] = [None, torch.tensor([20, 4]), torch.tensor([61, 64])]
    check(all_of(on(name)), per_source, arguments, torch.float32, upstreams=4, runs=runs_of(name))


def flex(query, sources, lengths=None, masks=None, present=None, causal=False, source_bias=None):
    """FlexAttention over concatenated sources, with the same visibility as a block mask: output and lse."""
    batch, heads, queries, _ = query.shape
    n, sizes = len(sources), [key.shape[2] for key, _ in sources]
    source = torch.arange(n).repeat_interleave(torch.tensor(sizes))  # [sum S_i]
    place = torch.cat([torch.arange(size) for size in sizes])  # [sum S_i] in its own source
    ends = torch.tensor(sizes).repeat(batch, 1)  # [B, n]
    kept = torch.ones(batch, sum(sizes), dtype=torch.bool)
    last = torch.tensor(sizes)  # [n] the last key of a source that query 0 sees
    for i in range(n):
        if lengths is not None and lengths[i] is not None:
            ends[:, i] = lengths[i]
        if masks is not None and masks[i] is not None:
            kept[:, source == i] = masks[i]
        if causal is True or (causal and causal[i]):
            last[i] -= queries
    present = torch.ones(batch, n, dtype=torch.bool) if present is None else present
    present = (present[:, None] if present.dim() == 2 else present).expand(batch, queries, n)
    bias = (query.new_zeros(n) if source_bias is None else source_bias).expand(batch, heads, n)

    def seen(b, h, q, k):
        i, s = source[k], place[k]
        return (s < ends[b, i]) & kept[b, k] & present[b, q, i] & (s <= q + last[i])

    def biased(score, b, h, q, k):
        return score + bias[b, h, source[k]]

    key, value = (torch.cat(one, 2) for one in zip(*sources, strict=True))
    blocks = create_block_mask(seen, batch, None, queries, key.shape[2], device="cpu")
    grouped = key.shape[1] != heads
    return with_lse(
        *flex_attention(
            query, key, value, biased, blocks, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
        )
    )


def with_lse(out, stats):
    """[B, H, L, Dv + 1]; a query that sees nothing has an lse of -inf, which no difference could be taken of."""
    return torch.cat([out, torch.where(stats.lse == -torch.inf, 0, stats.lse)[..., None].to(out.dtype)], -1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_visibility_is_a_block_mask_of_flex_attention(name, options):
    """Outputs and lse only: FlexAttention has no backward on the CPU."""

    def ours(**arguments):
        return with_lse(*on(name)(**arguments, return_stats=True))

    for dtype in (torch.float32, torch.float64) if name == "cpu" else (torch.float32,):
        check(ours, flex, example_for(name, queries=40, sizes=(50, 1, 140), grad=False, **options), dtype)
