"""The pictures of attention: what they show, and the program."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from backbones import visualize
from backbones.attention_maps import (
    attention_calls,
    concentration_panels,
    context_panels,
    routing_panels,
)
from backbones.layers import BiLevelRoutingAttention, ContextMixing
from tests.backbones.models import FAMILIES, VARIANTS, deterministic
from tests.support import golden
from tests.support.process import ROOT

SIZE = (97, 160)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A photograph of noise, 160 wide and 97 high."""
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = 40 * golden.normal("pixels", (*SIZE, 3)) + 128
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@torch.no_grad()
def test_routing_shows_what_the_layers_choose():
    model = deterministic(FAMILIES["biformer"].create(topks=(1, 4, 16, None)))
    x, point = golden.image((1, 3, *SIZE)), (150, 20)
    *routed, full = routing_panels(model, x, point)
    calls = attention_calls(model, x, BiLevelRoutingAttention)
    assert [call.stride for call in calls] == sorted(call.stride for call in calls)
    for stage, panel in enumerate(routed):
        chosen = torch.zeros_like(panel.heat).flatten()
        of_stage = [call for call in calls if call.stage == stage]
        for call in of_stage:
            rows, cols, height, width = 7, 7, *(-(-side // 7) for side in call.x.shape[1:3])
            row, col = point[1] // call.stride // height, point[0] // call.stride // width
            assert (panel.query, panel.cell) == (
                (row, col),
                (height * call.stride, width * call.stride),
            )
            chosen[call.layer.route(call.x)[0, row * cols + col]] += 1
        assert panel.heat.shape == (rows, cols)
        torch.testing.assert_close(panel.heat.flatten(), chosen / len(of_stage))
        assert (panel.heat.sum() - of_stage[0].layer.topk).abs() < 1e-5
    assert full.heat.shape == (4, 5)
    assert full.query == (20 // 32, 150 // 32)
    torch.testing.assert_close(full.heat.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
def test_pixels_that_patches_leave_out_are_those_of_the_last_region(name):
    model = deterministic(VARIANTS[name].create(topks=(1, 4, 16, None)))
    panels = routing_panels(model, golden.image((1, 3, *SIZE)), (SIZE[1] - 1, SIZE[0] - 1))
    sizes = [tuple(panel.heat.shape) for panel in panels]
    assert sizes[-1] == (3, 5)
    for panel, (rows, cols) in zip(panels, sizes, strict=True):
        assert 0 <= panel.query[0] < rows and 0 <= panel.query[1] < cols
    assert panels[-1].query == (2, 4)


@torch.no_grad()
def test_the_last_stage_shows_the_attention_of_the_point():
    model = deterministic(FAMILIES["biformer"].create(topks=(1, 4, 16, None)))
    x = golden.image((1, 3, *SIZE))
    attention = model.stages[-1].blocks[-1].attn
    seen = []
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    panel = routing_panels(model, x, (100, 70))[-1]
    q, k, _ = attention.qkv(seen[0][0]).flatten(0, 1).chunk(3, -1)
    heads = [part.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for part in (q, k)]
    weights = (heads[0] @ heads[1].mT * heads[0].shape[-1] ** -0.5).softmax(-1).mean(0)
    expected = weights[70 // 32 * 5 + 100 // 32].unflatten(0, (4, 5))
    torch.testing.assert_close(panel.heat.double(), expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_concentration_shows_multiples_of_the_average_weight():
    model = deterministic(FAMILIES["ravlt"].create())
    panels = concentration_panels(model, golden.image((1, 3, *SIZE)))
    sizes = [(25, 40), (13, 20), (7, 10), (4, 5)]
    assert [tuple(panel.heat.shape) for panel in panels] == sizes
    assert all(abs(panel.heat.mean() - 1) < 1e-5 for panel in panels)
    assert ["linear" in panel.title for panel in panels] == [True, True, False, False]


@torch.no_grad()
def test_weights_are_those_of_the_formula():
    model = deterministic(FAMILIES["ravlt"].create())
    for stage, size in [(0, (3, 4)), (3, (2, 3))]:
        layer = model.stages[stage].blocks[0].attn
        x = golden.image((2, *size, layer.dim))
        weights = layer.token_weights(x)
        assert weights.shape == (2, layer.num_heads, *size)
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones_like(weights[..., 0, 0]))
    layer = model.stages[0].blocks[0].attn
    q, k = layer.qkvg(x := golden.image((1, 3, 4, layer.dim))).flatten(1, 2).chunk(4, -1)[:2]
    phi = [torch.where(t > 0, t + 1, t.exp())[0] for t in (q, k)]
    expected = (phi[1] @ phi[0].mean(0) * layer.dim**-0.5).softmax(0)
    torch.testing.assert_close(layer.token_weights(x)[0, 0].flatten(), expected)


@torch.no_grad()
def test_kernels_are_those_that_mix():
    model = deterministic(FAMILIES["overlock"].create()).double()
    x, point = golden.image((1, 3, 225, 260)), (3, 223)
    overview, *panels = context_panels(model, x, point)
    assert (overview.heat.shape, overview.cell, overview.query) == ((8, 9, 3), (32, 32), None)
    assert [tuple(panel.heat.shape) for panel in panels] == [(15, 17)] * 2 + [(8, 9)] * 2
    assert [panel.query for panel in panels] == [(13, 0)] * 2 + [(6, 0)] * 2
    assert all((panel.heat.sum() - 1).abs() < 1e-5 for panel in panels)
    call = next(call for call in attention_calls(model, x, ContextMixing) if call.stage == 3)
    context, value = call.others
    # every head mixes the same values here, so the mean of its kernels mixes the mean of heads
    value = torch.ones_like(value[..., :1]).cumsum(1).cumsum(2).expand_as(value)
    mixed = call.layer(call.x, context, value)[0, 6, 0].unflatten(0, (2, -1)).mean(1)
    for half, panel in zip(mixed, panels[2:], strict=True):
        expected = (panel.heat * value[0, ..., 0]).sum()
        torch.testing.assert_close(half, expected.double(), rtol=1e-5, atol=0)


def test_the_context_of_a_small_image_is_not_drawn():
    model = deterministic(FAMILIES["overlock"].create())
    with pytest.raises(ValueError, match="12x16 is smaller than its kernels: draw an image of 193"):
        context_panels(model, golden.image((1, 3, 192, 256)), (0, 0))


@pytest.mark.parametrize(
    "program, model",
    [
        ("routing", "biformer_tiny"),
        ("routing", "biformer_stl"),
        ("context", "overlock_xt"),
        ("concentration", "ravlt_t"),
    ],
)
def test_the_program_writes_a_picture(program, model, picture, tmp_path, capsys):
    output = tmp_path / "out.png"
    arguments = [program, str(picture), "--model", model, "-o", str(output), "--untrained"]
    size = "193" if program == "context" else "67"
    assert visualize.main([*arguments, "--size", size]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert image.width > 3 * image.height > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_every_point_has_a_row(picture, tmp_path):
    output, points = tmp_path / "out.png", ["--at", "0.1", "0.2", "--at", "1", "1"]
    arguments = ["routing", str(picture), "-o", str(output), "--untrained", "--size", "64"]
    assert visualize.main([*arguments, *points]) == 0
    with Image.open(output) as two:
        assert visualize.main(arguments) == 0
        with Image.open(output) as one:
            assert two.width == one.width and two.height > 1.6 * one.height


def test_official_weights_are_taken_from_a_file(picture, tmp_path, capsys):
    model = timm.create_model("ravlt_t")
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    output = tmp_path / "out.png"
    arguments = ["concentration", str(picture), "-o", str(output), "--size", "64"]
    assert visualize.main([*arguments, "--checkpoint", str(tmp_path / "mine.pth")]) == 0
    assert output.stat().st_size > 10_000


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "davit_tiny"], "routing draws BiFormer models, not davit_tiny"),
        (["--model", "biformer_tin"], "did you mean"),
        (["--at", "1.5", "0"], "--at 1.5 0.0 must be from 0 to 1"),
        (["--click"], "--click needs a screen: give the point with --at X Y"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(change, message, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    output = tmp_path / "out.png"
    arguments = ["routing", str(picture), "-o", str(output), "--untrained", "--size", "64"]
    assert visualize.main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not output.exists()


def test_weights_that_are_gone_are_said_to_be(picture, tmp_path, capsys):
    assert visualize.main(["routing", str(picture), "-o", str(tmp_path / "out.png")]) == 2
    assert "--checkpoint FILE, or --untrained" in capsys.readouterr().err


def test_no_image(tmp_path):
    command = [sys.executable, "-m", "backbones.visualize", "routing", "no.png", "-o", "out.png"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "error: cannot read no.png as an image" in run.stderr


def test_a_click_is_a_pixel(picture, monkeypatch):
    import matplotlib.pyplot as plt

    image = visualize.load_image(picture, None)
    monkeypatch.setattr(plt, "get_backend", lambda: "qtagg")
    monkeypatch.setattr(plt, "ginput", lambda n, timeout: [(12.7, 33.2)])
    assert visualize.click(image) == (12, 33)
    monkeypatch.setattr(plt, "ginput", lambda n, timeout: [])
    with pytest.raises(ValueError, match="nothing was clicked"):
        visualize.click(image)
