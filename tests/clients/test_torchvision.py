"""torchvision: pyramids on our features, by its own classes."""

import pytest
import timm
import torch
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import backbones  # noqa: F401
from tests.backbones.models import FAMILIES, Small

# it runs the children of a model one after the other
SEQUENTIAL = {name: family for name, family in FAMILIES.items() if family.sequential}


@pytest.fixture(params=SEQUENTIAL.values(), ids=SEQUENTIAL)
def family(request) -> Small:
    return request.param


def test_backbone_with_pyramid(family):
    body = family.create(features_only=True, num_classes=0)
    layers = {name: str(index) for index, name in enumerate(body.return_layers)}
    model = BackboneWithFPN(body, layers, body.feature_info.channels(), 16)
    maps = model(torch.randn(2, 3, 97, 160))
    shapes = [(2, 16, *size) for _, *size in family.maps(97, 160)]
    assert [tuple(value.shape) for value in maps.values()][: len(shapes)] == shapes
    sum(value.square().mean() for value in maps.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_layers_by_name(family):
    body = family.create(features_only=True, num_classes=0).eval()
    names = list(body.return_layers)
    getter = IntermediateLayerGetter(body, {name: name for name in names})
    images = torch.randn(1, 3, 64, 96)
    for value, wanted in zip(getter(images).values(), body(images), strict=True):
        assert torch.equal(value, wanted)


def test_overlock_is_not_a_sequence():
    with pytest.raises(AssertionError, match="are not present in model"):
        timm.create_model("overlock_xt", features_only=True, feature_cls="list")
