"""`timm.create_model(..., pretrained=True)` and hub names, against the stand-in hub."""

import json

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support import golden
from tests.support.hub_server import Hub
from tests.support.process import ROOT, python

CLIENT = """
import json, logging, sys
import timm, torch
import backbones
from tests.support import golden

lines = []
class Lines(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
logging.getLogger("backbones.pretrained").addHandler(Lines())
logging.getLogger("backbones.pretrained").setLevel(logging.INFO)

def attempt(name, **kwargs):
    lines.clear()
    try:
        model = timm.create_model(name, pretrained=True, **kwargs).eval()
        with torch.no_grad():
            out = model(golden.image((1, 3, 64, 64)).float())
        return {"class": type(model).__module__, "sum": float(out.double().sum()),
                "shape": list(out.shape), "line": lines[-1]}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}

calls = json.loads(sys.argv[1])
print(json.dumps({key: attempt(**call) for key, call in calls.items()}))
"""


def run(hub: Hub, home, calls: dict) -> dict:
    result = python(
        *("-c", CLIENT, json.dumps(calls)),
        cwd=ROOT,
        environment={"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def weights(**shapes: list[int]) -> dict[str, Tensor]:
    """SHViT-S1 under timm's names."""
    reference = golden.load("shvit_s1")
    names = reference["name_map_to_timm"]
    manifest = {names[k]: shape for k, shape in reference["manifest"].items()} | shapes
    return {
        k: v.float() if v.is_floating_point() else v for k, v in golden.state_dict(manifest).items()
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    config = {"architecture": "shvit_s1", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    config["pretrained_cfg"] |= {"classifier": "head.l", "first_conv": "patch_embed.0.c"}
    three = weights(**{"head.l.weight": [3, 320], "head.l.bias": [3]})
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "server") as hub:
        hub.add("timm/shvit_s1.in1k", {"model.safetensors": save(weights())})
        hub.add("acme/three", {"model.safetensors": save(three), "config.json": _json(config)})
        hub.add("timm/shvit_s2.in1k", {"model.safetensors": save(weights())})
        hub.add("timm/shvit_s3.in1k", {"model.safetensors": b"\x01" * 100})
        return run(
            hub,
            folder / "home",
            {
                "default tag": {"name": "shvit_s1"},
                "tag": {"name": "shvit_s1.in1k"},
                "headless": {"name": "shvit_s1", "num_classes": 0},
                "hub name": {"name": "hf-hub:acme/three"},
                "hub name, other head": {"name": "hf-hub:acme/three", "num_classes": 0},
                "wrong size": {"name": "shvit_s2"},
                "broken": {"name": "shvit_s3"},
                "absent": {"name": "shvit_s4"},
            },
        )


def _json(value: dict) -> bytes:
    return json.dumps(value).encode()


def test_default_tag_and_tag(answers):
    first = answers["default tag"]
    assert first["class"] == "backbones.shvit"
    assert first["shape"] == [1, 1000]
    assert "hf-hub:timm/shvit_s1.in1k/model.safetensors" in first["line"]
    assert answers["tag"]["sum"] == first["sum"]


def test_equals_the_same_weights_loaded_by_hand(answers):
    import timm

    model = timm.create_model("shvit_s1").eval()
    model.load_state_dict(weights())
    with torch.no_grad():
        x = golden.image((1, 3, 64, 64)).float()
        logits, pooled = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    assert answers["default tag"]["sum"] == pytest.approx(float(logits.double().sum()), rel=1e-5)
    assert answers["headless"]["shape"] == [1, 320]
    assert answers["headless"]["sum"] == pytest.approx(float(pooled.double().sum()), rel=1e-5)


def test_repository_names(answers):
    assert answers["hub name"]["class"] == "backbones.shvit"
    assert answers["hub name"]["shape"] == [1, 3]
    assert answers["hub name, other head"]["shape"] == [1, 320]


@pytest.mark.parametrize(
    "case, words",
    [
        ("wrong size", ["shvit_s2 from hf-hub:timm/shvit_s2.in1k", "head.bn.bias is (320,)"]),
        ("broken", ["shvit_s3.in1k", "safetensors"]),
        ("absent", ["shvit_s4.in1k", "HF_TOKEN"]),
    ],
)
def test_failures_are_one_clear_line(answers, case, words):
    answer = answers[case]
    assert answer["error"] == "WeightsError"
    assert "\n" not in answer["message"]
    assert all(word in answer["message"] for word in words), answer["message"]
