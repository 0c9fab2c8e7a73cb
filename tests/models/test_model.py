import pytest
import torch
import torch.nn.functional as F
from parts import ATTENTION, CONFIG, CONFIGS, Data, gradients, make, make_batch, poison

from mmfast.models import FusionModel
from mmfast.models.model import drop_modalities

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


@every_config
@every_dtype
def test_logits_of_every_head_in_the_models_dtype(config, dtype):
    logits = make(config, dtype=dtype)(make_batch(dtype=dtype))
    assert [name for name in logits if not name.startswith("share/")] == ["label"]
    assert logits["label"].shape == (5, 4) and logits["label"].dtype == dtype
    assert logits["label"].isfinite().all()  # row 4 has nothing present


@every_config
@every_dtype
def test_padding_and_absence_cannot_reach_the_output_or_a_gradient(config, dtype):
    model, batch = make(config, dtype=dtype), make_batch(dtype=dtype)
    logits, grads = gradients(model, batch)
    poisoned_logits, poisoned_grads = gradients(model, poison(batch))
    assert torch.equal(logits, poisoned_logits)
    for name, grad in grads.items():
        assert torch.equal(grad, poisoned_grads[name]), name


def test_poison_does_poison_where_it_is_visible():
    batch = make_batch()
    visible = {"present": torch.ones_like(batch["present"]), "lengths": batch["lengths"] + 1}
    logits = make()({**poison(batch), "text": batch["text"], **visible})["label"]
    assert logits.isnan().all(dim=1).tolist() == [True] * 5


@every_config
def test_more_padding_changes_nothing(config):
    model, batch = make(config, dtype=torch.float64), make_batch(dtype=torch.float64)
    longest = batch["lengths"].amax(dim=0).tolist()
    cut = {**batch, "text": batch["text"][:, : longest[1]], "audio": batch["audio"][:, :, : longest[2]]}
    torch.testing.assert_close(model(cut), model(batch), rtol=1e-12, atol=1e-12)


@every_config
def test_rows_know_nothing_of_each_other(config):
    model, batch = make(config, dtype=torch.float64), make_batch(dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = model({name: t[order] for name, t in batch.items()})["label"]
    torch.testing.assert_close(shuffled, model(batch)["label"][order], rtol=1e-12, atol=1e-12)


@every_config
def test_a_sample_alone_gets_the_answer_it_gets_in_a_batch(config):
    model, batch = make(config, dtype=torch.float64), make_batch(dtype=torch.float64)
    together = model(batch)["label"]
    for row in range(5):
        alone = model({name: t[row : row + 1] for name, t in batch.items()})["label"]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


@every_config
@every_dtype
def test_zero_rows_forward_and_backward(config, dtype):
    model, batch = make(config, dtype=dtype), make_batch(dtype=dtype)
    logits, grads = gradients(model, {name: t[:0] for name, t in batch.items()})
    assert logits.shape == (0, 4)
    for name, grad in grads.items():
        assert grad is not None and not grad.any(), name


@every_config
def test_a_batch_in_which_nobody_has_a_modality_is_finite(config):
    model, batch = make(config), make_batch()
    batch["present"][:] = False
    batch["lengths"][:] = 0
    logits, grads = gradients(model, poison(batch))
    assert logits.isfinite().all() and all(g.isfinite().all() for g in grads.values())


@every_config
def test_gradients_flow_to_every_parameter(config):
    _, grads = gradients(make(config), make_batch())
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all() and grad.any(), name


@every_config
def test_the_same_seed_makes_the_same_weights(config):
    first, second, other = make(config, seed=3), make(config, seed=3), make(config, seed=4)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c) or a.unique().numel() == 1, name  # norms and zero biases are constants


@every_config
def test_every_parameter_can_be_sharded(config):
    for name, parameter in make(config).named_parameters():
        assert parameter.dim() > 0 and parameter.is_contiguous(), name


@every_config
def test_compiles_as_one_graph_and_never_again(config):
    torch._dynamo.reset()
    model = make(config)
    expected = [gradients(model, make_batch(seed=seed)) for seed in range(5)]
    model.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (logits, grads) in enumerate(expected):
            batch = make_batch(seed=seed)
            got_logits, got_grads = gradients(model, poison(batch) if seed % 2 else batch)
            torch.testing.assert_close(got_logits, logits)
            torch.testing.assert_close(got_grads, grads)


def test_names_of_the_state_dict_are_stable():
    names = make().state_dict().keys()
    block = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias"]
    shortcut = ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    image = ["stem.weight", "norm.weight", "norm.bias"]
    image += [f"blocks.0.{n}" for n in block] + [f"blocks.1.{n}" for n in block + shortcut]
    pair = ("weight", "bias")
    layer = [f"{m}.{p}" for m in ("norm1", "qkv", "project", "norm2", "up", "down") for p in pair]
    transformer = ["positions", *(f"layers.0.{n}" for n in layer), "norm.weight", "norm.bias"]
    audio = [f"conv{i}.{p}" for i in (1, 2) for p in pair]
    wanted = [f"encoders.image.{n}" for n in image]
    wanted += ["encoders.text.embedding.weight", *(f"encoders.text.transformer.{n}" for n in transformer)]
    wanted += [f"encoders.audio.{n}" for n in audio] + [
        f"encoders.audio.transformer.{n}" for n in transformer
    ]
    wanted += ["fusion.project.weight", "fusion.project.bias", "heads.label.weight", "heads.label.bias"]
    assert list(names) == wanted


def test_a_subset_of_modalities_reads_its_own_columns():
    data = Data()
    config = type(CONFIG)(encoders={name: CONFIG.encoders[name] for name in ("audio", "text")}, dropout=0.0)
    model, batch = make(config, data), make_batch()
    logits = model(batch)["label"]
    swapped = Data(modalities={name: data.modalities[name] for name in ("text", "audio", "image")})
    order = [1, 2, 0]
    moved = {**batch, "present": batch["present"][:, order], "lengths": batch["lengths"][:, order]}
    assert torch.equal(make(config, swapped)(moved)["label"], logits)
    changed = {**batch, "present": batch["present"].clone(), "image": batch["image"] + 1}
    changed["present"][:, 0] ^= True
    assert torch.equal(model(changed)["label"], logits)


def test_attention_tells_the_share_of_each_modality_outside_of_training():
    model, batch = make(ATTENTION, dtype=torch.float64), make_batch(dtype=torch.float64)
    logits = model.train()(batch)
    assert list(logits) == ["label"]
    torch.testing.assert_close(model.eval()(batch)["label"], logits["label"], rtol=1e-12, atol=1e-12)
    output = make(ATTENTION).eval()(make_batch())
    shares = torch.stack([output[f"share/{name}"] for name in ATTENTION.encoders], dim=1)  # [B, n]
    present = make_batch()["present"]
    assert torch.equal(shares > 0, present)
    torch.testing.assert_close(shares.sum(dim=1), present.any(dim=1).float())
    assert not shares.requires_grad


def test_shares_are_means_over_queries_heads_and_layers():
    model, batch = make(ATTENTION).eval(), make_batch()
    made = []
    for block in model.fusion.blocks:
        block.register_forward_hook(lambda _, args, result: made.append(result))
    output = model(batch)
    masses = torch.stack([stats.mass for _, stats in made])  # [layers, B, H, queries, n]
    assert len(made) == 2 and not torch.allclose(*masses)
    shares = torch.stack([output[f"share/{name}"] for name in ATTENTION.encoders], dim=1)
    torch.testing.assert_close(shares, masses.mean(dim=(0, 2, 3)))
    fused = model.fusion.norm(made[-1][0]).mean(dim=1)
    torch.testing.assert_close(output["label"], model.heads["label"](fused))


def test_any_encoder_fusion_and_head_fit_in():
    class Sum(torch.nn.Module):
        def forward(self, features, present):
            sums = [sequence.sum(dim=1) for sequence, _ in features.values()]
            return torch.stack(sums, dim=1).mul(present[..., None]).sum(dim=1)

    class Same(torch.nn.Module):
        def forward(self, x, lengths):
            return x.transpose(1, 2), lengths

    model = FusionModel(
        {"a": Same(), "b": Same()}, Sum(), {"x": torch.nn.Identity(), "y": torch.nn.Identity()}
    )
    batch = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 5), "lengths": torch.full((2, 2), 4)}
    out = model({**batch, "present": torch.tensor([[True, True], [False, True]])})
    assert out["x"].tolist() == out["y"].tolist() == [[9.0] * 3, [5.0] * 3]


def test_modality_dropout_never_drops_the_last_one():
    torch.manual_seed(0)
    present = torch.rand(20_000, 3) < 0.6
    kept = drop_modalities(present, 0.4)
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(dim=1), present.any(dim=1))
    alone = present.sum(dim=1) == 1
    assert torch.equal(kept[alone], present[alone])
    full = present.all(dim=1)
    # with three there: each is dropped with 0.4, less a third of the times that all three would go
    assert abs((~kept[full]).float().mean().item() - (0.4 - 0.4**3 / 3)) < 0.01


def test_modality_dropout_is_for_training_only_and_follows_torchs_seed():
    config = type(CONFIG)(encoders=CONFIG.encoders, fusion=CONFIG.fusion, dropout=0.3, modality_dropout=0.5)
    model, batch = make(config), make_batch()
    torch.manual_seed(1)
    first = model(batch)["label"]
    second = model(batch)["label"]
    torch.manual_seed(1)
    assert torch.equal(model(batch)["label"], first) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(batch)["label"], make()(batch)["label"])


@every_config
def test_learns_a_toy_problem_in_which_every_modality_is_needed(config):
    """The class is the parity of a bright image, a word and a loud end: no two modalities know it."""
    data = Data(num_classes=2)
    torch.manual_seed(0)
    bits = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    batch = make_batch(len(bits), data=data)
    batch["present"][:] = True
    batch["lengths"] = torch.tensor([[1, 3, 20]]).repeat(len(bits), 1)
    batch["image"] = 0.3 * batch["image"] + bits[:, 0, None, None, None]
    batch["text"][:, 1] = 3 + bits[:, 1]
    batch["audio"][:, :, 10:] += 6.0 * bits[:, 2, None, None]
    batch["label"] = bits.sum(dim=1) % 2
    model = make(config, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(batch)["label"], batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(batch)["label"].argmax(dim=1) == batch["label"]).float().mean() > 0.95
