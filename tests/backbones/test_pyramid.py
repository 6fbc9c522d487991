"""Norms of the features (`pyramid="det"`), as official backbones of detectors have them."""

import json

import pytest
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from torch import nn

import backbones
from backbones.pretrained import FAMILIES as CONVERSIONS
from backbones.pretrained import WeightsError, convert_state_dict
from tests.backbones.models import FAMILIES, Small, deterministic, relative_error
from tests.support import golden

# eps of the norms; those of OverLoCK are partly in line, see its own tests
EPS = {"biformer": 1e-6, "davit": 1e-5, "l2vit": 1e-5, "ravlt": 1e-6, "tic": 1e-6}
WITHOUT = ("maxvit", "shvit")


@pytest.fixture(scope="module", params=EPS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name) -> Small:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def pyramid(family) -> nn.Module:
    """The family's pyramid with deterministic weights; tests must not change it."""
    return deterministic(family.create(pyramid="det"))


def test_every_family_is_here():
    assert {*EPS, *WITHOUT, "overlock"} == set(FAMILIES)


@torch.no_grad()
def test_norms_are_of_the_features_only(name, family, pyramid):
    plain = deterministic(family.create())
    body = {k: v for k, v in pyramid.state_dict().items() if not k.startswith("feature_norms.")}
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in body.items())
    x = golden.image((1, 3, 64, 97))
    raw = plain.forward_intermediates(x, intermediates_only=True)
    last, maps = pyramid.forward_intermediates(x, norm=True)
    for index, (value, wanted) in enumerate(zip(maps, raw, strict=True)):
        norm = [
            golden.fill(f"feature_norms.{index}.{n}", value.shape[1:2]) for n in ("weight", "bias")
        ]
        normed = F.layer_norm(wanted.permute(0, 2, 3, 1), value.shape[1:2], *norm, eps=EPS[name])
        assert relative_error(value, normed.permute(0, 3, 1, 2)) < 1e-12
    assert torch.equal(last, raw[-1])


@torch.no_grad()
def test_weights_of_a_classifier_start_a_pyramid(family):
    trained = deterministic(family.create())
    pyramid = family.create(pyramid="det").double()
    weights = convert_state_dict(trained.state_dict(), pyramid)
    assert list(weights) == list(pyramid.state_dict())
    for norm in pyramid.feature_norms:
        assert (norm.weight == 1).all() and not norm.bias.any()
    assert pyramid.num_classes == 0 and isinstance(pyramid.get_classifier(), nn.Identity)
    assert pyramid.head_hidden_size == pyramid.num_features == family.widths[-1]
    assert pyramid(torch.zeros(1, 3, 64, 64).double()).shape == (1, family.widths[-1])


def test_official_names_there_and_back(name, pyramid):
    module = CONVERSIONS[name]
    official = module.to_official(pyramid.state_dict())
    detector = {f"backbone.{k}": v for k, v in official.items()}
    detector["neck.fpn.weight"] = torch.zeros(1)
    converted = convert_state_dict({"state_dict": detector}, pyramid)
    assert list(converted) == list(pyramid.state_dict())
    assert all(torch.equal(converted[k], v) for k, v in pyramid.state_dict().items())


def test_a_classifier_takes_no_pyramid_without_its_norm(name, family, pyramid):
    message = r"missing head\." if name in ("davit", "ravlt") else "create the model with pyramid="
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(pyramid.state_dict(), family.create(num_classes=0))


@torch.no_grad()
def test_pruning_keeps_the_norms_of_the_chosen_features(family, pyramid):
    x = golden.image((1, 3, 64, 64))
    expected = pyramid.forward_intermediates(x, intermediates_only=True)
    pruned = deterministic(family.create(pyramid="det"))
    getter = FeatureGetterNet(pruned, out_indices=(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(getter(x), expected[1:3], strict=True))
    assert [isinstance(n, nn.Identity) for n in pruned.feature_norms] == [True, False, False]
    assert getter.feature_info.module_name() == ["feature_norms.1", "feature_norms.2"]


def test_scripts_and_trains_all_its_parameters(family):
    model = family.create(pyramid="det", features_only=True, out_indices=(1, 2, 3))
    maps = model(torch.randn(2, 3, 64, 64))
    sum(value.square().sum() for value in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    scripted, x = torch.jit.script(model), torch.randn(1, 3, 65, 97)
    assert all(torch.equal(a, b) for a, b in zip(scripted(x), model(x), strict=True))


@pytest.mark.parametrize("feature_cls", ["list", "hook", "fx"])
def test_what_cannot_see_the_norms_fails(family, feature_cls):
    with pytest.raises((AssertionError, NotImplementedError, ValueError), match=r"present|missing"):
        features = family.create(pyramid="det", features_only=True, feature_cls=feature_cls)
        features(torch.zeros(1, 3, 64, 64))


def test_saved_pyramid_comes_back_from_a_folder(family, tmp_path):
    model = family.create(pyramid="det")
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["pyramid"] == "det"
    again = backbones.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_unknown_pyramids_are_named(family):
    with pytest.raises(ValueError, match="pyramid='seg' is none of"):
        family.create(pyramid="seg")


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_official_norms_have_no_option(name):
    with pytest.raises(TypeError, match="pyramid"):
        FAMILIES[name].create(pyramid="det")
