import pytest
import torch
import torch.nn.functional as F
from parts import CONFIG, make, make_batch, poison
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mmfast.data.modality import Audio, Image, Text
from mmfast.models import AudioTransformer, ImageResNet, TextTransformer
from mmfast.models.image import GroupNorm, Pointwise
from mmfast.models.transformer import attention

CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_group_norm_is_torchs_in_either_layout_and_keeps_it(layout):
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    grad = torch.randn_like(x)
    ours, theirs = GroupNorm(4, 8).double(), nn.GroupNorm(4, 8).double()
    out, expected = ours(x), theirs(x.contiguous())
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out, [x, *ours.parameters()], grad),
        torch.autograd.grad(expected, [x, *theirs.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels", [8, 12, 16])
@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_a_pointwise_convolution_is_torchs(channels, size, layout):
    layer = Pointwise(channels, 16, 1, stride=2, bias=False)
    x = torch.randn(5, channels, size, size).to(memory_format=layout).requires_grad_()
    expected = F.conv2d(x.detach().double(), layer.weight.double(), stride=2)
    out = layer(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    visited = torch.zeros(size, size, dtype=torch.bool)
    visited[::2, ::2] = True
    assert torch.equal(x.grad.ne(0).any(dim=1), visited.expand(5, size, size))


@pytest.mark.parametrize("stem", ["small", "large"])
def test_the_image_encoder_keeps_channels_last_from_end_to_end(stem):
    encoder = ImageResNet(width=16, depths=(1, 1), groups=4, stem=stem).build(Image(size=24), 0)
    seen = []
    for name, module in encoder.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out)))
    x = torch.randn(2, 3, 24, 24).to(memory_format=CHANNELS_LAST)
    sequence, lengths = encoder(x, torch.tensor([1, 0]))
    for name, out in seen:
        assert out.is_contiguous(memory_format=CHANNELS_LAST), name
    assert sequence.is_contiguous()  # [B, H' W', D] is a view of it
    steps = (24 // (4 if stem == "large" else 1) // 2) ** 2
    assert sequence.shape == (2, steps, 32) and lengths.tolist() == [steps, 0]


def test_a_batch_through_the_model_stays_channels_last():
    model, layouts = make(), []
    model.encoders["image"].stem.register_forward_hook(lambda m, args, out: layouts.append(args[0].stride()))
    batch = make_batch()
    model(batch)
    assert layouts == [batch["image"].stride()] and layouts[0][1] == 1


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 20, 21])
def test_audio_lengths_are_those_of_the_convolutions(frames):
    modality = Audio(n_mels=8, max_seconds=0.2)
    encoder = AudioTransformer(dim=8, layers=1, heads=2).build(modality, 0)
    sequence, lengths = encoder(torch.randn(2, 8, frames), torch.tensor([frames, 0]))
    assert sequence.shape == (2, -(-frames // 4), 8)
    assert lengths.tolist() == [-(-frames // 4), 0]


def test_loudness_does_not_reach_the_audio_encoders_output():
    encoder = AudioTransformer(dim=8, layers=1, heads=2).build(Audio(n_mels=8, max_seconds=0.2), 0).double()
    x, lengths = torch.randn(2, 8, 21, dtype=torch.float64), torch.tensor([21, 9])
    quiet, loud = encoder(x - 3, lengths)[0], encoder(x + 3, lengths)[0]  # log of a scaled spectrum
    torch.testing.assert_close(quiet, loud, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attention_is_torchs(dtype):
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=dtype).unbind()
    visible = (torch.arange(7) < torch.tensor([[3], [7]]))[:, None, None]
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=visible)
    out = attention(query, key, value, visible)
    assert (out - expected).abs().max() < 8 * torch.finfo(dtype).eps


def test_silence_is_finite():
    encoder = AudioTransformer(dim=8, layers=1, heads=2).build(Audio(n_mels=8, max_seconds=0.2), 0)
    x = torch.full((2, 8, 21), -13.8, requires_grad=True)
    out = encoder(x, torch.tensor([21, 0]))[0]
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_the_order_of_words_matters():
    encoder = TextTransformer(dim=8, layers=1, heads=2).build(Text(max_tokens=6), 11)
    one = encoder(torch.tensor([[3, 4, 5, 0, 0, 0]]), torch.tensor([3]))[0][:, :3].mean(dim=1)
    other = encoder(torch.tensor([[5, 4, 3, 0, 0, 0]]), torch.tensor([3]))[0][:, :3].mean(dim=1)
    assert not torch.allclose(one, other, atol=1e-4)


def test_sharded_in_parts_with_bf16_policy_it_answers_as_the_bf16_model(one_rank):
    model = make()
    expected = model(make_batch())["label"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.encoders.values(), model.fusion, *model.heads.values(), model):
        fully_shard(part, mesh=one_rank, mp_policy=policy)
    logits = model(poison(make_batch()))["label"]
    torch.testing.assert_close(logits.float(), expected, rtol=0.02, atol=0.02)
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad.to_local()
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any(), name
    assert list(model.state_dict()) == list(make(CONFIG).state_dict())
