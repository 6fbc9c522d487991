"""Features at sizes of detectors, odd and small ones, of all families by both of timm's ways."""

import pytest
import torch
from torch import nn

import backbones
from tests.backbones.models import FAMILIES, SMALLEST
from tests.support import golden

SIZES = [(800, 1216), (333, 500), (64, 64)]


@torch.no_grad()
def check_features(model: nn.Module, features: nn.Module) -> None:
    """Both ways give the same finite maps, of the sizes that `feature_info` says."""
    weights = model.state_dict()
    names = {name.replace(".", "_", 1): name for name in weights}
    values = {
        # timm takes some models apart and joins others
        key: weights.get(key.removeprefix("model."), weights.get(names.get(key, "")))
        for key in features.state_dict()
    }
    features.load_state_dict(values)
    info = features.feature_info
    for height, width in SIZES:
        x = golden.image((1, 3, height, width)).float()
        maps = features(x)
        expected = [
            (1, channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(info.channels(), info.reduction(), strict=True)
        ]
        assert [tuple(value.shape) for value in maps] == expected
        assert all(value.isfinite().all() for value in maps)
        others = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_small_models(name):
    family = FAMILIES[name]
    # as many regions as detectors have: with fewer, regions of large images are slow
    args = {"n_win": 16} if name == "biformer" else {}
    torch.manual_seed(0)
    check_features(family.create(**args).eval(), family.create(**args, features_only=True).eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_features_of_real_models(name):
    assert SMALLEST.keys() == FAMILIES.keys()
    torch.manual_seed(0)
    model = backbones.create_model(SMALLEST[name]).eval()
    check_features(model, backbones.create_model(SMALLEST[name], features_only=True).eval())
