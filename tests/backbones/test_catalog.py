"""What lists and the README say of models and weights is so."""

import re

import pytest
import timm

import backbones
from backbones import catalog
from backbones._costs import COSTS
from backbones.pretrained import weights_tables
from backbones.pretrained.stored import stored_file
from tests.support import costs

NAMES = backbones.list_models()
ROWS = [row for table in weights_tables().values() for row in table]


def row_of(name):
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_costs(name):
    counted = costs.count(name)
    assert COSTS.get(name) == counted, f"backbones/_costs.py must have {name!r}: {counted}"


def test_costs_are_of_models_that_exist():
    assert list(COSTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_model(name):
    model = catalog.describe(name)
    cfg = timm.get_pretrained_cfg(name)
    assert backbones.list_models(model.family).count(name) == 1
    assert model.description.endswith(".")
    assert (model.images.input_size, model.num_classes) == (cfg.input_size, cfg.num_classes)
    assert bool(model.weights) != bool(model.no_weights)
    if model.weights and not model.weights[0].dead_links:
        # the first row is what pretrained=True takes
        assert model.weights[0].name == f"{name}.{cfg.tag}"
        assert catalog.Images.of(model.weights[0]) == model.images


def test_every_row_belongs_to_a_model():
    assert sorted(ROWS, key=lambda row: row.name) == sorted(
        (row for name in NAMES for row in catalog.weights_of(name)), key=lambda row: row.name
    )
    assert {row.name for row in catalog.list_weights()} == {row.name for row in ROWS}


def test_what_can_be_loaded_by_name_is_in_the_table():
    loadable = {row.name for row in ROWS if not row.dead_links}
    assert set(backbones.list_models(pretrained=True)) == loadable
    assert len(loadable) == len(ROWS) - 5


@pytest.mark.parametrize(
    ("patterns", "family", "expected"),
    [
        (["shvit_s[12]"], "", ["shvit_s1", "shvit_s2"]),
        (["ravlt_t", "*_xt"], "", ["overlock_xt", "ravlt_t"]),
        ([], "tic", ["tic_base", "tic_small", "tic_tiny"]),
        (["*_tiny"], "davit", ["davit_tiny"]),
    ],
)
def test_find_models(patterns, family, expected):
    assert [model.name for model in catalog.find_models(patterns, family)] == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.in22k"], ["l2vit_base.in22k"]),
        (["overlock_xt"], ["overlock_xt.in1k", "overlock_xt.reparam_in1k"]),
        (["biformer_tiny", "shvit_s1.*"], ["biformer_tiny.in1k", "shvit_s1.in1k"]),
    ],
)
def test_list_weights(patterns, expected):
    assert [row.name for row in catalog.list_weights(patterns)] == expected


def test_find():
    model, rows = catalog.find("l2vit_base")
    assert (model.name, len(rows)) == ("l2vit_base", 3) and rows == model.weights
    model, rows = catalog.find("l2vit_base.in22k")
    assert model.name == "l2vit_base" and [row.num_classes for row in rows] == [21841]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalog.find("shvit_s9"), "no model is called 'shvit_s9': did you mean shvit_s1"),
        (lambda: catalog.find("resnet50"), "python -m backbones list shows all names"),
        (lambda: catalog.find("shvit_s1.in22k"), "'shvit_s1.in22k': known are shvit_s1.in1k"),
        (lambda: catalog.find("tic_tiny.in1k"), "tic_tiny has none"),
        (lambda: catalog.find_models(["shvit_s1", "shvit_s7*"]), "nothing matches 'shvit_s7*'"),
        (lambda: catalog.list_weights(["tic*"]), "nothing matches 'tic*'"),
        (lambda: catalog.find_models(family="resnet"), "family 'resnet' is unknown"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_why_there_are_no_weights():
    why = {model.name: model.no_weights for model in catalog.find_models() if not model.weights}
    assert {name for name in why if name.startswith("davit")} == {
        "davit_giant",
        "davit_huge",
        "davit_large",
    }
    assert why["davit_huge"] == "the authors never released them"
    assert why["maxvit_pico_rw_256"] == "only a configuration of timm's exists"
    assert why["tic_tiny"] == "this is a reconstruction, no official model exists"
    assert len(why) == 3 + 4 + 3
    # timm's own variants are of timm's code
    assert catalog.describe("maxvit_pico_rw_256").paper.code.endswith("/pytorch-image-models")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("maxvit_large_tf_384.in1k", {"in the paper": "86.40", "by timm": "86.242"}),
        ("maxvit_rmlp_base_rw_384.sw_in12k_ft_in1k", {"by timm": "87.810"}),
        ("shvit_s4.in1k", {"in the paper": "79.4", "by timm": "79.362"}),
        ("l2vit_base_384.in22k_ft_in1k", {"in the official repository": "87.0"}),
        (
            "biformer_small.in1k",
            {"in the paper": "83.8", "in a log of the official repository": "83.754"},
        ),
        ("l2vit_base.in22k", {}),
    ],
)
def test_accuracies_have_the_digits_they_were_reported_with(name, expected):
    found = catalog.top1(row_of(name))
    assert list(found.items()) == list(expected.items())


def test_links():
    assert catalog.link(row_of("ravlt_t.in1k")) == "https://huggingface.co/aldjalkdf/RAVLT"
    assert catalog.link(row_of("overlock_t.reparam_in1k")).endswith("_224_reparam.pth")
    assert catalog.link(row_of("biformer_tiny.in1k")) == ""


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of the hub and of URLs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("BACKBONES_WEIGHTS_DIR", raising=False)
    monkeypatch.delenv("BACKBONES_HUB_ORG", raising=False)
    return tmp_path


def put_into_hub_cache(caches, repo_id, name):
    """Lay a file where the hub's client would."""
    root = caches / "hub" / f"models--{repo_id.replace('/', '--')}"
    file = root / "snapshots" / ("a" * 40) / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    return file


def test_nothing_is_stored_in_empty_caches(caches):
    assert [row.name for row in ROWS if stored_file(row)] == []


def test_stored_file_of_the_hub_and_of_a_mirror(caches, monkeypatch):
    row = row_of("ravlt_t.in1k")
    file = put_into_hub_cache(caches, "aldjalkdf/RAVLT", "RAVLT_T.pth")
    assert stored_file(row) == file
    assert stored_file(row_of("ravlt_s.in1k")) is None
    monkeypatch.setenv("BACKBONES_HUB_ORG", "mirror")
    assert stored_file(row) == file
    mirrored = put_into_hub_cache(caches, "mirror/ravlt_t.in1k", "model.safetensors")
    assert stored_file(row) == mirrored


def test_stored_file_of_a_url_and_of_a_folder(caches, monkeypatch):
    row = row_of("overlock_t.in1k")
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "12345678-overlock_t_in1k_224.pth").write_bytes(b"")
    assert stored_file(row) is None  # of another URL
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(caches))
    assert stored_file(row) is None
    file = caches / "overlock_t_in1k_224.pth"
    file.write_bytes(b"")
    assert stored_file(row) == file
