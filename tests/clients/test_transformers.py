"""transformers: our models as backbones of DETR, and as classifiers from converted folders."""

import pytest
import timm
import torch

import backbones
from backbones.convert import convert
from tests.backbones.models import SMALLEST

transformers = pytest.importorskip("transformers", reason="pip install transformers")

CONVERTED = {
    **SMALLEST,
    # with tables that follow from the arguments, in no state dict, as RAVLT has
    "maxvit_rmlp": "maxvit_rmlp_pico_rw_256",
}
quick_and_slow = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("shvit_s1", "overlock_xt") else pytest.mark.slow)
        for name in CONVERTED.values()
    ],
)


def detr(name: str, level: int) -> torch.nn.Module:
    backbone = transformers.TimmBackboneConfig(backbone=name, out_indices=[level])
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.DetrConfig(
        backbone_config=backbone, num_labels=3, **sizes, **layers, **heads
    )
    return transformers.DetrForObjectDetection(config)


@quick_and_slow
@torch.no_grad()
def test_features_are_timms(name):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[-2, -1], num_channels=4)
    model = transformers.AutoBackbone.from_config(config).eval()
    features = timm.create_model(name, features_only=True, in_chans=4).eval()
    weights = model.state_dict()
    features.load_state_dict({k.removeprefix("_backbone."): v for k, v in weights.items()})
    images = torch.randn(1, 4, 64, 96)
    expected = features(images)[-2:]
    for value, wanted in zip(model(images).feature_maps, expected, strict=True):
        assert torch.equal(value, wanted)
    assert model.channels == features.feature_info.channels()[-2:]


@quick_and_slow
def test_detr_trains_and_comes_back(name, tmp_path):
    last = len(backbones.create_model(name, device="meta").feature_info) - 1
    model = detr(name, last)
    images = torch.randn(2, 3, 64, 96)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
    model(pixel_values=images, labels=[label, label]).loss.backward()
    for key, parameter in model.named_parameters():
        # DETR freezes what lies below the second stage in networks that it knows
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key

    model.save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = model.eval()(pixel_values=images), again.eval()(pixel_values=images)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)


@quick_and_slow
@torch.no_grad()
def test_converted_folders_classify(name, tmp_path):
    args = {"aux_head": False} if name.startswith("overlock") else {}
    model = timm.create_model(name, num_classes=7, in_chans=4, **args).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    convert(tmp_path / "weights.pth", tmp_path / "folder", name)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    assert wrapped.config.num_labels == 7
    images = torch.randn(1, 4, 64, 96)
    assert torch.equal(wrapped.eval()(images).logits, model(images))

    features = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    last = features(images).last_hidden_state
    torch.testing.assert_close(last, model.forward_features(images))
    # its own folders too
    wrapped.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again.eval()(images).logits, model(images))
