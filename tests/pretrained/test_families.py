import pytest
import timm
from torch import nn

from backbones.pretrained import (
    FAMILIES,
    WeightsError,
    davit,
    find_weights,
    maxvit,
    shvit,
    weights_tables,
)
from backbones.pretrained.families import family_of


def test_tables_of_all_families():
    assert weights_tables() == {name: family.WEIGHTS for name, family in FAMILIES.items()}
    names = [row.name for table in weights_tables().values() for row in table]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["shvit_s2.in1k", "shvit_s2"])
def test_find_weights(name):
    assert find_weights(name) is shvit.WEIGHTS[1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("shvit_s9.in1k", "did you mean"),
        ("zzz", "known: biformer, davit, l2vit, maxvit, overlock, ravlt, shvit, tic"),
    ],
)
def test_unknown_weights(name, hint):
    with pytest.raises(WeightsError, match=f"'{name}'.*{hint}"):
        find_weights(name)


def test_family_is_found_from_the_class():
    model = timm.create_model("shvit_s1", device="meta")
    assert family_of(model) is shvit
    subclass = type("Mine", (type(model),), {"__module__": "elsewhere"})
    assert family_of(subclass.__new__(subclass)) is shvit
    assert family_of(timm.create_model("davit_tiny", device="meta")) is davit
    # timm spells the module of its class otherwise
    for name in ("maxvit_pico_rw_256", "test_maxvit"):
        assert family_of(timm.create_model(name, device="meta")) is maxvit


def test_model_of_no_family():
    with pytest.raises(WeightsError, match="Sequential is of no family"):
        family_of(nn.Sequential())
