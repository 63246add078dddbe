"""The model: what decides its weights, how it embeds, what is saved and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from namr.data import images
from namr.errors import ConfigError, ManifestError, ModelMismatch, ShapeError
from namr.model import backbones, model
from namr.model.model import BatchNormPolicy, ModelConfig, NamrModel, SearchDefaults


def config(**changes: object) -> ModelConfig:
    tiny = ModelConfig(
        backbone="test_resnet", weights="none", embedding_dim=8, structure_hidden_dim=16, image_size_px=32
    )
    return replace(tiny, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> NamrModel:
    return model.build(config(), seed=0).eval()


def pixels(n: int, *, size_px: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size_px, size_px), dtype=np.uint8)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_shapes_and_types(tiny: NamrModel) -> None:
    with torch.no_grad():
        batch = torch.from_numpy(pixels(3))
        features = tiny.features(batch)
        found = tiny(batch)
    assert features.shape == (3, backbones.num_features(tiny.backbone))
    assert found.embedding.shape == found.structure.shape == (3, 8)
    assert found.embedding.dtype == found.structure.dtype == torch.float32


def test_the_order_of_channels_in_memory_changes_features_by_rounding_alone() -> None:
    """Channels last is what fast convolutions want; what is saved and told of a model knows nothing of it."""
    fast, plain = (model.build(config(), seed=0).eval() for _ in range(2))
    plain.backbone.to(memory_format=torch.contiguous_format)
    convolutions = [module for module in fast.backbone.modules() if isinstance(module, nn.Conv2d)]
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in convolutions)
    batch = torch.from_numpy(pixels(4))
    with torch.no_grad():
        torch.testing.assert_close(
            fast.features(batch),
            plain.backbone(images.normalise(batch, plain.preprocessing)),
            rtol=1e-5,
            atol=1e-6,
        )
    assert model.digest(fast) == model.digest(plain)


def test_range_zero_is_the_control_with_s_exactly_one_and_nothing_to_learn() -> None:
    control = model.build(config(structure_range=0.0), seed=0)
    found = control(torch.from_numpy(pixels(4)))
    assert torch.equal(found.structure, torch.ones(4, 8))
    assert [name for name, _ in control.heads.named_parameters()] == ["sample.weight", "sample.bias"]
    assert all(parameter.requires_grad for parameter in control.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_stay_in_float32_under_autocast(tiny: NamrModel, dtype: torch.dtype) -> None:
    batch = torch.from_numpy(pixels(4))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        features = tiny.features(batch)
        found = tiny.heads(features)
    assert features.dtype == dtype and found.embedding.dtype == torch.float32
    with torch.no_grad():
        expected = tiny.heads(features.float())
    assert torch.equal(found.embedding, expected.embedding)
    assert torch.equal(found.structure, expected.structure)


def test_the_seed_decides_the_weights_and_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (model.build(config(), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(2), expected)
    assert model.digest(first) == model.digest(again) != model.digest(other)


def batchnorms(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if hasattr(each, "running_mean")]


@pytest.mark.parametrize("policy", ["frozen", "local"])
def test_the_batchnorm_policy_survives_train_and_lets_the_structure_head_learn(
    policy: BatchNormPolicy,
) -> None:
    one = model.build(config(), seed=0)
    model.set_batchnorm_policy(one, policy)
    for mode in (False, True, True):
        nn.ModuleList([one]).train(mode)  # as DistributedDataParallel hands it down
    before = state(one)
    one(torch.from_numpy(pixels(8)))
    moved = {name for name, tensor in one.state_dict().items() if not torch.equal(tensor, before[name])}
    of_backbone = {name for name in moved if name.startswith("backbone.")}
    assert bool(of_backbone) == (policy == "local")
    assert {"heads.structure.1.running_mean", "heads.structure.3.running_var"} <= moved
    assert len(batchnorms(one.backbone)) > 0 and one.heads.training and one.training


def test_the_structure_heads_batchnorm_can_be_frozen_too() -> None:
    one = model.build(config(), seed=0)
    model.set_batchnorm_policy(one, "frozen", of_structure="frozen")
    one.train()
    before = state(one)
    one(torch.from_numpy(pixels(8)))
    assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())
    model.set_batchnorm_policy(one, "frozen")
    assert all(module.training for module in batchnorms(one.heads))


def test_frozen_batchnorms_still_learn_scale_and_shift() -> None:
    one = model.build(config(), seed=0)
    model.set_batchnorm_policy(one, "frozen")
    one(torch.from_numpy(pixels(4))).embedding.sum().backward()
    weights = [each.weight for each in batchnorms(one.backbone)]
    assert all(isinstance(weight, nn.Parameter) and weight.grad is not None for weight in weights)


def test_the_policy_can_be_changed_back() -> None:
    one = model.build(config(), seed=0).train()
    model.set_batchnorm_policy(one, "frozen")
    model.set_batchnorm_policy(one, "local")
    assert all(each.training for each in batchnorms(one.backbone))


def test_sync_converts_the_backbone_only_keeps_its_weights_and_asks_for_a_gpu() -> None:
    one = model.build(config(), seed=0)
    expected = model.digest(one)
    model.set_batchnorm_policy(one, "sync")
    assert all(isinstance(each, nn.SyncBatchNorm) for each in batchnorms(one.backbone))
    assert not any(isinstance(each, nn.SyncBatchNorm) for each in one.heads.modules())
    assert model.digest(one) == expected
    with pytest.raises(ConfigError, match="batchnorm is 'sync', which needs a GPU"):
        one.train()(torch.from_numpy(pixels(4)))


def test_an_unknown_policy_is_refused(tiny: NamrModel) -> None:
    with pytest.raises(ConfigError, match="expected frozen, sync or local"):
        model.set_batchnorm_policy(tiny, "always")  # type: ignore[arg-type]


def test_folding_the_scale_makes_the_mean_distance_one() -> None:
    one = model.build(config(), seed=0).eval()
    x, s = model.embed(one, pixels(12), batch_size=4, device="cpu")
    mean = float(torch.pdist(torch.from_numpy(x)).mean())
    model.fold_scale(one, mean)
    folded, same = model.embed(one, pixels(12), batch_size=4, device="cpu")
    np.testing.assert_allclose(folded, x / mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, s)
    assert abs(float(torch.pdist(torch.from_numpy(folded)).mean()) - 1) < 1e-4


@pytest.mark.parametrize("distance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_collapsed_model_is_not_folded(distance: float) -> None:
    with pytest.raises(ConfigError, match="collapsed"):
        model.fold_scale(model.build(config(), seed=0), distance)


def test_an_image_embeds_the_same_whatever_lies_beside_it(tiny: NamrModel) -> None:
    """Bit for bit: the batch has one size, and its padding is not seen."""
    x, s = model.embed(tiny, pixels(11), batch_size=4, device="cpu")
    assert x.dtype == s.dtype == np.float32 and x.shape == s.shape == (11, 8)
    for row in (0, 5, 10):
        alone = model.embed(tiny, pixels(11)[row : row + 1], batch_size=4, device="cpu")
        assert np.array_equal(alone[0][0], x[row]) and np.array_equal(alone[1][0], s[row])
    empty = model.embed(tiny, pixels(0), batch_size=4, device="cpu")
    assert empty[0].shape == empty[1].shape == (0, 8)


def test_embedding_uses_stored_statistics_and_leaves_the_mode_as_it_was() -> None:
    one = model.build(config(), seed=0).train()
    before = state(one)
    model.embed(one, pixels(3), batch_size=2, device="cpu")
    assert one.training and all(torch.equal(before[name], t) for name, t in one.state_dict().items())


def test_embedding_refuses_other_shapes(tiny: NamrModel) -> None:
    with pytest.raises(ShapeError, match=r"float64 .*expected uint8 \(n, 3, H, W\)"):
        model.embed(tiny, np.zeros((2, 3, 32, 32)), batch_size=2, device="cpu")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        model.embed(tiny, pixels(1), batch_size=0, device="cpu")


def test_a_saved_model_comes_back_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    one = model.build(config(fit="crop"), seed=4)
    one(torch.from_numpy(pixels(8)))  # statistics that are no longer fresh
    one.search = SearchDefaults(metric="cosine", structure_side="both")
    model.save(one, tmp_path, extra={"job": "lr = 1e-4"})
    back = model.load(tmp_path)
    assert (back.config, back.preprocessing, back.search) == (one.config, one.preprocessing, one.search)
    assert not back.training and model.digest(back) == model.digest(one) == model.describe(tmp_path).digest
    assert model.describe(tmp_path).extra == {"job": "lr = 1e-4"}
    expected = model.embed(one, pixels(4), batch_size=4, device="cpu")
    assert np.array_equal(model.embed(back, pixels(4), batch_size=4, device="cpu"), expected)


def test_the_digest_is_the_embedding_space_and_nothing_else() -> None:
    one = model.build(config(), seed=0)
    digest = model.digest(one)
    one.search = SearchDefaults(metric="cosine")
    one.config = replace(one.config, weights="timm")
    assert model.digest(one) == digest
    with torch.no_grad():
        one.heads.sample.bias[0] += 1e-6
    assert model.digest(one) != digest
    one = model.build(config(), seed=0)
    one.preprocessing = replace(one.preprocessing, fit="crop")
    assert model.digest(one) != digest


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / model.DESCRIPTION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a namr-model manifest"),
        ({"format_version": 2}, "format version 2, and this namr reads 1"),
        ({"config": {"backbone": 3}}, "damaged: config.backbone: .*string"),
        ({"config": {"backbone": "test_resnet", "structure_range": 7}}, "damaged: .*structure_range"),
        ({"preprocessing": None}, "damaged"),
        ({"digest": "0" * 64}, "describes another model"),
        ({"weights_sha256": "0" * 64}, "damaged: its SHA-256 is"),
    ],
)
def test_a_description_that_is_not_right_is_refused(
    changes: dict[str, object], message: str, tiny: NamrModel, tmp_path: Path
) -> None:
    model.save(tiny, tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ManifestError, match=message):
        model.load(tmp_path)


def test_a_model_json_of_before_keeps_its_pixels_and_its_digest(tmp_path: Path) -> None:
    """From before it was a manifest, and before the draft's factor was told: 3, and no part of the digest."""
    one = model.build(config(), seed=0)
    assert one.preprocessing.draft_factor != 3
    digest_of_today = model.digest(one)
    one.preprocessing = replace(one.preprocessing, draft_factor=3)
    told = {name: value for name, value in asdict(one.preprocessing).items() if name != "draft_factor"}
    built = {name: value for name, value in asdict(one.config).items() if name != "weights"}
    assert model.digest(one) == model._digest(json.dumps([built, told], sort_keys=True), one)
    assert model.digest(one) != digest_of_today
    model.save(one, tmp_path)
    body = {
        "format": "namr-model",
        "format_version": 1,
        "config": {
            "backbone": "test_resnet", "weights": "none", "embedding_dim": 8, "structure_hidden_dim": 16,
            "structure_range": 0.5, "image_size_px": 32, "fit": "squash",
        },
        "preprocessing": {
            "size_px": 32, "mean": list(one.preprocessing.mean), "std": list(one.preprocessing.std),
            "interpolation": one.preprocessing.interpolation, "fit": "squash",
        },
        "search": {"metric": "l2", "structure_side": "none"},
        "digest": model.digest(one),
        "weights_sha256": model.describe(tmp_path).weights_sha256,
        "extra": {},
    }  # fmt: skip
    (tmp_path / model.DESCRIPTION_FILE).write_text(json.dumps(body, indent=1))
    loaded = model.load(tmp_path)
    assert loaded.preprocessing == one.preprocessing
    assert model.digest(loaded) == model.digest(one)


def test_a_range_of_0_that_was_no_float_still_loads_under_its_digest(tmp_path: Path) -> None:
    one = model.build(config(structure_range=0), seed=0)
    model.save(one, tmp_path)
    stored = json.loads((tmp_path / model.DESCRIPTION_FILE).read_text())["config"]
    rewrite(tmp_path, config=stored | {"structure_range": 0})
    assert model.digest(model.load(tmp_path)) == model.describe(tmp_path).digest == model.digest(one)


def test_the_digest_of_a_backbone_is_all_that_features_depend_on() -> None:
    one = model.build(config(), seed=0)
    digest = model.backbone_digest(one)
    with torch.no_grad():
        one.heads.sample.bias[0] += 1
    assert model.backbone_digest(one) == digest != model.backbone_digest(model.build(config(), seed=1))
    one.preprocessing = replace(one.preprocessing, fit="crop")
    assert model.backbone_digest(one) != digest


def test_missing_and_damaged_files_are_told_apart(tiny: NamrModel, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"model\.json is missing, so there is no model here"):
        model.load(tmp_path)
    model.save(tiny, tmp_path)
    weights = tmp_path / model.WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ManifestError, match="damaged: its SHA-256"):
        model.load(tmp_path)
    weights.unlink()
    with pytest.raises(ManifestError, match=r"model\.safetensors is missing"):
        model.load(tmp_path)
    (tmp_path / model.DESCRIPTION_FILE).write_text("{")
    with pytest.raises(ManifestError, match=r"model\.json is damaged"):
        model.describe(tmp_path)
    (tmp_path / model.DESCRIPTION_FILE).write_text("[]")
    with pytest.raises(ManifestError, match=r"model\.json is damaged"):
        model.describe(tmp_path)


def test_weights_of_another_architecture_are_a_mismatch_that_names_keys(
    tiny: NamrModel, tmp_path: Path
) -> None:
    model.save(tiny, tmp_path)
    rewrite(
        tmp_path,
        config=json.loads((tmp_path / model.DESCRIPTION_FILE).read_text())["config"] | {"embedding_dim": 9},
    )
    with pytest.raises(ModelMismatch, match=r"heads\.sample\.weight \(8, \d+\) where \(9, \d+\) is expected"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "imagenet"}, "expected timm, none or the URI"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"structure_range": 1.0}, r"structure_range is 1\.0"),
    ],
)
def test_a_wrong_config_names_its_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
