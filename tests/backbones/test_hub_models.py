"""`timm.create_model(..., pretrained=True)` by official names, against the stand-in hub."""

import pytest
from safetensors.torch import save

from tests.faults.client import digest
from tests.faults.hub import narrow_weights
from tests.faults.lab import NARROW, judge, shared_lab

HEAD = ("head.", "patch_embed.0.")


@pytest.fixture(scope="module")
def plain() -> dict:
    return narrow_weights()


@pytest.fixture(scope="module")
def answers(plain) -> dict:
    calls = {
        "default tag": {"name": "shvit_s1", "num_classes": 3},
        "tag": {"name": "shvit_s1.in1k", "num_classes": 3},
        "headless": {"name": "shvit_s1", "num_classes": 0},
        "classes": {"name": "shvit_s1"},
        "wrong size": {"name": "shvit_s2"},
        "broken": {"name": "shvit_s3"},
        "absent": {"name": "shvit_s4"},
    }
    lab = shared_lab()
    lab.hub.add("timm/shvit_s1.in1k", {"model.safetensors": save(plain)})
    wide = plain | {"head.bn.bias": plain["head.bn.bias"][:-1].clone()}
    lab.hub.add("timm/shvit_s2.in1k", {"model.safetensors": save(wide)})
    lab.hub.add("timm/shvit_s3.in1k", {"model.safetensors": b"\x01" * 100})
    return lab.online.run(
        {name: {"do": "timm", "arguments": {**NARROW, **args}} for name, args in calls.items()}
    )


@pytest.mark.parametrize("name", ["default tag", "tag"])
def test_official_names(answers, plain, name):
    assert judge(answers[name], (), digest(plain)) == ""
    assert answers[name]["class"] == "backbones.shvit"
    assert "hf-hub:timm/shvit_s1.in1k/model.safetensors" in answers[name]["lines"][0]


def test_without_a_classifier(answers, plain):
    assert judge(answers["headless"], (), body=digest(plain, HEAD)) == ""
    assert answers["headless"]["classes"] == 0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("classes", ("shvit_s1.in1k", "weights have 3 classes, the model 1000", "num_classes=3")),
        ("wrong size", ("shvit_s2 from hf-hub:timm/shvit_s2.in1k", r"head.bn.bias is \(71,\)")),
        ("broken", ("shvit_s3.in1k", "safetensors")),
        ("absent", ("shvit_s4.in1k", "HF_TOKEN")),
    ],
)
def test_failures_are_one_clear_line(answers, case, words):
    assert judge(answers[case], words) == ""
