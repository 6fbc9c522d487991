"""Our models under timm's registry, and timm's own back again."""

import os
import subprocess
import sys

import pytest
import timm
import timm.models

import backbones


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_import_replaces_quietly_and_can_be_undone():
    out = python("""
import json, logging, timm, timm.models
logging.basicConfig(level=logging.INFO, format="%(message)s")
FAMILIES = ["davit*", "maxvit*", "shvit*"]
def state():
    names = timm.list_models(FAMILIES, include_tags=True)
    cfgs = {n: timm.get_pretrained_cfg(n).to_dict() for n in names}
    # timm's module of MaxViT has another name, and it has none of the others
    modules = set(timm.list_modules()) - {"biformer", "l2vit", "maxvit", "overlock", "ravlt", "tic"}
    return names, cfgs, timm.list_models(FAMILIES, pretrained=True), modules
before = state()
import backbones
assert state() == before
model = timm.create_model("shvit_s1.in1k", device="meta")
assert type(model) is backbones.SHViT
assert model.pretrained_cfg["hf_hub_id"] == "timm/shvit_s1.in1k"
assert type(timm.models.shvit.shvit_s1(device="meta")) is not backbones.SHViT
names = [n for family in ("davit", "maxvit", "shvit") for n in backbones.list_models(family)]
assert backbones.restore_timm_models() == names
assert backbones.list_models("ravlt") == ["ravlt_b", "ravlt_l", "ravlt_s", "ravlt_t"]
assert type(timm.create_model("shvit_s1.in1k", device="meta")).__module__ == "timm.models.shvit"
assert state() == before
assert backbones.restore_timm_models() == []
""")
    (line,) = (line for line in out.splitlines() if "replaced" in line)
    families = ("davit", "maxvit", "shvit")
    names = ", ".join(name for family in families for name in backbones.list_models(family))
    assert line == (f"backbones replaced timm's {names}; backbones.restore_timm_models() undoes it")


def test_environment_variable_keeps_timms_models():
    code = (
        "import backbones, timm; print(type(timm.create_model('shvit_s1', device='meta'))"
        ".__module__, *backbones.list_models())"
    )
    module, *names = python(code, BACKBONES_KEEP_TIMM="1").split()
    assert module == "timm.models.shvit"
    ours = ("biformer", "l2vit", "overlock", "ravlt", "tic")
    assert names == [name for family in ours for name in backbones.list_models(family)]
    assert python(code, BACKBONES_KEEP_TIMM="0").startswith("backbones.shvit")


def test_tags_of_ours_join_those_of_timm():
    from timm.models import PretrainedCfg, generate_default_cfgs

    from backbones._registry import _adopt_tags

    cfgs = generate_default_cfgs(
        {"davit_tiny.ours": {"url": "https://x.y/z"}, "davit_tiny.msft_in1k": {"url": "https://n"}}
    )
    _adopt_tags("davit_tiny", cfgs)
    theirs = timm.models.get_arch_pretrained_cfgs("davit_tiny")
    assert next(iter(cfgs["davit_tiny"].tags)) == next(iter(theirs)).partition(".")[2]
    assert set(cfgs["davit_tiny"].tags) == {n.partition(".")[2] for n in theirs} | {"ours"}
    assert cfgs["davit_tiny"].cfgs["msft_in1k"] == theirs["davit_tiny.msft_in1k"]
    assert cfgs["davit_tiny"].cfgs["ours"] == PretrainedCfg(url="https://x.y/z")


def test_names():
    names = [f"shvit_s{i}" for i in range(1, 5)]
    assert backbones.list_models("shvit") == names
    assert set(names) <= set(backbones.list_models())
    assert backbones.list_models("shvit", pretrained=True) == [f"{name}.in1k" for name in names]
    assert set(names) <= set(timm.list_models(module="shvit"))
    with pytest.raises(ValueError, match=r"family 'resnet' is unknown: choose from .*shvit"):
        backbones.list_models("resnet")


@pytest.mark.parametrize(
    "name, message",
    [
        ("shvit_s9", "model 'shvit_s9' is unknown: did you mean .*shvit_s1"),
        ("qqqqqqqqqqqq", r"model 'qqqqqqqqqqqq' is unknown: see list_models\(\)"),
        ("shvit_s1.in22k", "pretrained tag 'in22k' of shvit_s1 is unknown: in1k"),
    ],
)
def test_unknown_names_suggest_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        backbones.create_model(name)


def test_unknown_tag_through_timm():
    with pytest.raises(ValueError, match="tag 'in22k' of shvit_s1 is unknown: use in1k"):
        timm.create_model("shvit_s1.in22k")
