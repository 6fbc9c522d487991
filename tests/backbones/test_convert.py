"""`python -m backbones convert`, on files under official names with made-up values."""

import json
import re
import resource

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import backbones
from backbones import _export
from backbones.__main__ import main
from backbones._export import fit, write_config
from backbones.convert import convert
from backbones.pretrained import WeightsError, convert_state_dict, find_weights, read_state_dict
from backbones.pretrained import card as cards
from backbones.pretrained import davit as davit_names
from tests.pretrained.forge import Command, pth
from tests.support import golden

# official file -> golden manifest, model (None: told from the file's name), wrapper, model.tag
FILES = {
    "biformer_tiny_best.pth": ("biformer_tiny", None, "model", "biformer_tiny.in1k"),
    "davit.pth": ("davit_tiny", "davit_tiny.msft_in1k", "state_dict", "davit_tiny.msft_in1k"),
    "L2ViT-Tiny-checkpoint-best-ema.pth": ("l2vit_tiny", None, "model_ema", "l2vit_tiny.in1k"),
    "model.safetensors": (
        *("maxvit_rmlp_pico_rw_256", "maxvit_rmlp_pico_rw_256.sw_in1k"),
        *("", "maxvit_rmlp_pico_rw_256.sw_in1k"),
    ),
    "overlock_xt_in1k_224.pth": ("overlock_xt", None, "", "overlock_xt.in1k"),
    "overlock_xt_in1k_224_reparam.pth": (
        *("overlock_xt_reparam", None, "", "overlock_xt.reparam_in1k"),
    ),
    "RAVLT_T.pth": ("RAVLT_T", None, "model", "ravlt_t.in1k"),
    "shvit_s1.pth": ("shvit_s1", None, "model", "shvit_s1.in1k"),
    "tic.pth": ("tic_tiny_reconstruction", "tic_tiny", "", "tic_tiny"),
}


def forged(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict under the names of a golden file."""
    recorded = golden.load(name)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for key, shape in recorded["manifest"].items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
        else:
            value = torch.rand(*shape, generator=generator) if shape else torch.tensor(0.5)
            weights[key] = (value + 0.5).to(dtype)
    return weights


def save(path, state_dict: dict[str, Tensor], wrapper: str = "model"):
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save({wrapper: state_dict, "epoch": 3} if wrapper else state_dict, path)
    return path


def expected(weights: dict[str, Tensor], name: str, **kwargs) -> dict[str, Tensor]:
    return convert_state_dict(weights, timm.create_model(name, device="meta", **kwargs))


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def shvit() -> dict[str, Tensor]:
    return forged("shvit_s1")


@pytest.fixture
def records(tmp_path):
    return tmp_path / "checksums.json"


@pytest.mark.parametrize("file", FILES)
def test_official_files_become_folders(file, tmp_path, records):
    golden_name, model, wrapper, name = FILES[file]
    weights = forged(golden_name)
    source = save(tmp_path / file, weights, wrapper)
    report = convert(source, tmp_path / "out", model, checksums=records)
    assert report.name == name
    assert (report.ema, report.both) == (wrapper == "model_ema", False)
    assert sorted(path.name for path in report.folder.iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    assert sorted(p.name for p in tmp_path.iterdir() if p != records) == [*sorted([file, "out"])]

    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert type(loaded).__module__.startswith("backbones.")
    assert_equal(loaded.state_dict(), expected(weights, name))
    cfg, config = loaded.pretrained_cfg, json.loads((tmp_path / "out/config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert (config["architecture"], config["num_classes"]) == (name.partition(".")[0], 1000)
    assert cfg.get("tag", "") == name.partition(".")[2]
    if model != "tic_tiny":
        row = find_weights(name)
        assert cfg["license"] == report.license == row.license
        assert (cfg["crop_pct"], tuple(cfg["mean"])) == (row.crop_pct, row.mean)
        recorded = json.loads(records.read_text())
        assert recorded == {
            f"converted:{name}": {"sha256": report.sha256, "size": report.size},
        }
    else:
        assert cfg["license"] == cards.UNKNOWN_LICENSE and not records.exists()


def test_what_becomes_of_every_tensor_is_reported(tmp_path, records, shvit):
    def report(name: str, weights: dict[str, Tensor], model: str | None = None):
        source = save(tmp_path / f"{name}.pth", weights)
        return convert(source, tmp_path / name, model, checksums=tmp_path / f"{name}.json")

    plain = report("shvit_s1", shvit)
    assert (plain.read, plain.written, plain.renamed) == (471, 471, 440)
    assert (plain.computed, plain.left_out) == ((), ())

    angles = report("RAVLT_T", forged("RAVLT_T"))
    assert set(angles.left_out) == {f"layers.{i}.RoPE.angle" for i in range(4)}
    assert "left out" in str(angles) and "4  layers.*.RoPE.angle (4)" in str(angles)
    assert "Left out: `layers.*.RoPE.angle (4)`" in (angles.folder / "README.md").read_text()

    two = {k.replace("head.", "head_dist."): v + 1 for k, v in shvit.items() if "head." in k}
    heads = report("distilled", {**shvit, **two}, "shvit_s1")
    assert set(heads.computed) == {"head.bn.weight", "head.l.weight", "head.l.bias"}
    assert set(heads.left_out) == {"head_dist.bn.num_batches_tracked"}


def test_the_report_is_lines_with_aligned_numbers(tmp_path, records, shvit):
    text = str(convert(save(tmp_path / "shvit_s1.pth", shvit), tmp_path / "o", checksums=records))
    rows = dict(line.split(None, 1) for line in text.splitlines() if line.split()[0] != "its")
    assert rows["model"] == "shvit_s1.in1k"
    ends = [line.index(n) + len(n) for line in text.splitlines() for n in (" 471", " 440", "1,000")
            if n in line and "sha" not in line]  # fmt: skip
    assert len(set(ends)) == 1 and len(ends) == 4


def test_the_same_input_gives_the_same_bytes(tmp_path, records, shvit):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    folders = [convert(source, tmp_path / name, checksums=records).folder for name in "ab"]
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_example_of_the_card_runs(tmp_path, records, shvit, monkeypatch):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    folder = convert(source, tmp_path / "shvit_s1.in1k", checksums=records).folder
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1], names)
    assert names["output"].shape == (1, 1000)
    assert torch.equal(names["model"].head.l.weight, shvit["head.l.weight"])
    assert str(tmp_path) not in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_other_classes_stay(dtype, tmp_path, records, shvit):
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in shvit.items()}
    weights |= {"head.l.weight": weights["head.l.weight"][:7], "head.l.bias": torch.ones(7)}
    source = save(tmp_path / "mine.pth", weights)
    report = convert(source, tmp_path / "out", "shvit_s1", license="CC0-1.0", checksums=records)
    assert (report.num_classes, report.license) == (7, "cc0-1.0")
    written = load_file(tmp_path / "out/model.safetensors")
    assert_equal(written, {k: written[k] for k in written})
    assert {k: written[k].dtype for k in ("head.l.weight", "head.l.bias")} == {
        "head.l.weight": dtype,
        "head.l.bias": torch.float32,
    }
    for model in (
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
        backbones.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
    ):
        assert model.num_classes == 7
        assert torch.equal(model.head.l.weight, weights["head.l.weight"].float())
    assert not records.exists()
    text = (tmp_path / "out/README.md").read_text()
    assert cards.license_of(text) == "cc0-1.0" and "none of the official" in text


def test_the_copy_is_chosen_and_told(tmp_path, records, shvit):
    ema = {k: v + 1 if v.is_floating_point() else v for k, v in shvit.items()}
    both = tmp_path / "shvit_s1.pth"
    torch.save({"model": shvit, "model_ema": ema}, both)
    for flag, name in ((False, "plain"), (True, "averaged")):
        report = convert(both, tmp_path / name, "shvit_s1", ema=flag, checksums=records)
        assert (report.ema, report.both) == (flag, True)
        taken = "the moving average of" if flag else "the plain weights"
        assert taken in str(report) and taken in (tmp_path / name / "README.md").read_text()
        written = load_file(report.folder / "model.safetensors")
        assert_equal(
            {k: written[k] for k in sorted(written)},
            dict(sorted(expected(ema if flag else shvit, "shvit_s1").items())),
        )
    only = save(tmp_path / "only.pth", ema, "model_ema")
    assert convert(only, tmp_path / "o", "shvit_s1", ema=True, checksums=records).ema
    with pytest.raises(WeightsError, match="moving average only"):
        convert(only, tmp_path / "p", "shvit_s1", checksums=records)
    assert not (tmp_path / "p").exists()


def test_an_auxiliary_head_is_kept_for_who_wants_it(tmp_path):
    weights = forged("overlock_xt")
    fitted = fit(weights, "overlock_xt", find_weights("overlock_xt"))
    assert_equal(fitted.tensors, expected(weights, "overlock_xt", aux_head=True))
    write_config(fitted, None, "mit", tmp_path)
    # without being asked for it is not there: see overlock_xt_in1k_224.pth above
    full = backbones.create_model(f"local-dir:{tmp_path}", device="meta", aux_head=True)
    assert list(full.state_dict()) == list(fitted.tensors)


def test_towers_have_no_classifier(monkeypatch):
    narrow = {"embed_dims": (32, 64, 64, 96), "num_heads": (1, 2, 2, 3)}
    tower = davit_names.to_official(
        golden.fill_model(timm.create_model("davit_base_fl", device="meta", **narrow))
    )
    tower = {k: v.float() for k, v in tower.items()}
    tower |= {f"language_model.layers.{i}.weight": torch.zeros(2) for i in range(3)}
    real = _export.create_model
    monkeypatch.setattr(_export, "create_model", lambda name, **k: real(name, **narrow, **k))
    fitted = fit(tower, "davit_base_fl", find_weights("davit_base_fl"))
    assert fitted.model_args == {"num_classes": 0}
    assert fitted.computed == ("head.norm.weight", "head.norm.bias")
    assert set(fitted.left_out) == {f"language_model.layers.{i}.weight" for i in range(3)}


@pytest.mark.parametrize(
    ("name", "model", "pyramid"),
    [
        ("det_biformer_small", "biformer_small", "det"),
        ("det_ravlt_t", "ravlt_t", "det"),
        ("l2vit_det_tiny", "l2vit_tiny", "det"),
        ("overlock_xt_det", "overlock_xt", "det"),
        ("overlock_xt_seg", "overlock_xt", "seg"),
    ],
)
def test_backbones_of_detectors_have_no_classifier(name, model, pyramid, tmp_path):
    recorded = golden.load(name)
    weights = forged(name if "manifest" in recorded else model)
    extra = recorded.get("manifest_extra", {})
    weights |= {key: torch.ones(*shape) for key, shape in extra.items()}
    for key in recorded.get("manifest_missing", ()):
        del weights[key]
    fitted = fit(weights, model, None)
    assert (fitted.model_args["num_classes"], fitted.model_args["pyramid"]) == (0, pyramid)
    assert_equal(fitted.tensors, expected(weights, model, **fitted.model_args))
    # who has the folder builds the same
    write_config(fitted, None, "mit", tmp_path)
    again = backbones.create_model(f"local-dir:{tmp_path}", device="meta")
    assert set(again.state_dict()) == {k for k in fitted.tensors if not k.startswith("aux_")}


@pytest.mark.parametrize(
    ("change", "model", "error", "message"),
    [
        ("", "shvit_s2", WeightsError, r"shvit_s2 from .*do not fit the model: .* is \("),
        ("", "tic_tiny", WeightsError, r"missing stem.*and \d+ more; left over patch_embed"),
        ("", "shvit_s9", ValueError, "no model is called 'shvit_s9'"),
        ("", "shvit_s1.in22k", ValueError, r"known are shvit_s1\.in1k"),
        ("", None, ValueError, "name the model with --model"),
        ("classes", "shvit_s1.in1k", WeightsError, "have 7 classes, shvit_s1.in1k has 1000"),
        ("lost", "shvit_s1", WeightsError, "missing head.l.weight"),
        ("extra", "shvit_s1", WeightsError, r"left over stages\.0\.blocks\.9\.x"),
        ("nan", "shvit_s1", WeightsError, "NaN"),
        ("fused", "shvit_s1", WeightsError, "fused model"),
    ],
)
def test_what_does_not_fit_leaves_nothing(change, model, error, message, tmp_path, records, shvit):
    weights = dict(shvit)
    if change == "classes":
        weights |= {"head.l.weight": torch.ones(7, 320), "head.l.bias": torch.ones(7)}
    elif change == "lost":
        del weights["head.l.weight"]
    elif change == "extra":
        weights["blocks1.9.x"] = torch.ones(1)
    elif change == "nan":
        weights["head.l.bias"] = torch.full((1000,), torch.nan)
    elif change == "fused":
        weights = timm.create_model("shvit_s1").fuse().state_dict()
    source = save(tmp_path / "mine.pth", weights)
    with pytest.raises(error, match=message) as caught:
        convert(source, tmp_path / "out", model, checksums=records)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pth"]


def test_damaged_and_hostile_files_are_refused(tmp_path, records, shvit):
    data = save(tmp_path / "good.pth", shvit).read_bytes()
    canary = tmp_path / "canary"
    files = {
        "short.pth": data[: len(data) // 2],
        "flipped.pth": data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
        "hostile.pth": pth({"model": Command(f"touch {canary}")}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="cannot read"):
            convert(tmp_path / name, tmp_path / "out", "shvit_s1", checksums=records)
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_an_occupied_folder_stays_as_it_is(tmp_path, records, shvit):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "plain").write_text("mine")
    for name in ("full", "plain"):
        with pytest.raises(ValueError, match="is not empty"):
            convert(source, tmp_path / name, checksums=records)
    with pytest.raises(ValueError, match="is no folder"):
        convert(source, tmp_path / "a/b", checksums=records)
    assert (tmp_path / "full/file").read_text() == (tmp_path / "plain").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", checksums=records)
    assert read_state_dict(tmp_path / "empty/model.safetensors")


def test_a_disk_that_writes_something_else_is_noticed(tmp_path, records, shvit, monkeypatch):
    source = save(tmp_path / "shvit_s1.pth", shvit)

    def write(tensors, path, metadata=None):
        save_file({**tensors, "head.l.bias": torch.zeros(1000)}, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", write)
    with pytest.raises(WeightsError, match=r"head\.l\.bias is another when it is read back"):
        convert(source, tmp_path / "out", checksums=records)
    assert [path.name for path in tmp_path.iterdir()] == ["shvit_s1.pth"]


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("overlock_xt", "overlock_xt.reparam_in1k", "not the re-parameterised form"),
        ("overlock_xt_reparam", "overlock_xt.in1k", "of the re-parameterised form"),
    ],
)
def test_the_other_form_is_not_taken_for_the_official_one(name, model, message):
    with pytest.raises(WeightsError, match=message):
        fit(forged(name), model.partition(".")[0], find_weights(model))


@pytest.fixture
def small_files():
    """Nothing larger than 10 MB can be written, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing(tmp_path, shvit, capsys, request):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    request.getfixturevalue("small_files")
    command = ["convert", str(source), str(tmp_path / "out")]
    assert main([*command, "--checksums", str(tmp_path / "c.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "free space there or choose another folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["shvit_s1.pth"]


def test_the_command_takes_every_option(tmp_path, shvit, capsys):
    source = save(tmp_path / "mine.pth", shvit, "model_ema")
    options = ["--model", "shvit_s1", "--ema", "--license", "mit", "--checksums", "c.json"]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    rows = capsys.readouterr().out
    for words in ("model          shvit_s1", "there are, a moving average", "licence        mit"):
        assert words in rows
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_known_hashes_are_compared(tmp_path, records, shvit):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    first = convert(source, tmp_path / "a", checksums=records)
    assert "converted:shvit_s1.in1k" in first.recorded
    other = {**shvit, "head.l.bias": torch.zeros(1000)}
    with pytest.raises(WeightsError, match="has changed") as caught:
        convert(save(source, other), tmp_path / "b", checksums=records)
    assert len(set(re.findall(r"[0-9a-f]{64}", str(caught.value)))) == 2
    assert first.sha256 in str(caught.value)
    assert not (tmp_path / "b").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a", "checksums.json", "shvit_s1.pth")
    ]


def test_checksums_that_cannot_be_written_are_no_failure(tmp_path, shvit):
    source = save(tmp_path / "shvit_s1.pth", shvit)
    report = convert(source, tmp_path / "out", checksums=tmp_path / "nowhere/checksums.json")
    assert report.recorded.startswith("nothing: ") and "cannot be written" in report.recorded
    assert (tmp_path / "out/model.safetensors").exists()
