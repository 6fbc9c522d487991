"""BiFormer against the official code (golden files): models, layers, pyramid, choices, cost."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import backbones
from backbones.layers import BiLevelRoutingAttention, LepeAttention, RoutingBlock
from backbones.layers.pointwise import PointwiseConv2d, replace_linear
from backbones.ops import use_reference
from backbones.pretrained import biformer, convert_state_dict
from tests.backbones.models import (
    VARIANTS,
    deterministic,
    gradients,
    relative_error,
    worst_gradient,
)
from tests.support import costs, golden

# parameters, and GMACs as fvcore counts them for the official code
MODELS = {
    "biformer_tiny": (13_142_760, "2.228"),
    "biformer_small": (25_536_232, "4.487"),
    "biformer_base": (56_804_968, "9.795"),
    "biformer_stl": (28_372_552, "4.590"),
    "biformer_stl_nchw": (28_372_552, "4.593"),
}
CASES = [
    *(("biformer_tiny", case) for case in range(3)),
    ("biformer_small", 0),
    ("biformer_stl", 0),
    *(("biformer_stl_nchw", case) for case in range(2)),
]
SMALL = {name: VARIANTS[name] for name in ("biformer", "biformer_stl", "biformer_stl_nchw")}
PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 2e-5)]


def watch_choices(model: nn.Module) -> list[Tensor]:
    """A list that a forward pass fills with what each routing attention chooses."""
    choices: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention):
            module.register_forward_pre_hook(lambda m, args: choices.append(m.route(*args)))
    return choices


def check_choices(choices: list[Tensor], recorded: list[dict]) -> None:
    """Compare the regions that the first rows chose, unless some were equally good."""
    assert len(choices) == len(recorded)
    compared = 0
    for chosen, expected in zip(choices, recorded, strict=True):
        assert list(chosen.shape) == [*expected["shape"][:2], expected["k"]]
        if expected["exact_ties"] == 0:
            first = chosen[0, : len(expected["idx_first_rows"])].sort(dim=-1).values
            assert first.tolist() == expected["idx_first_rows"]
            compared += 1
    assert compared >= len(recorded) // 2


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name, index", CASES)
@torch.no_grad()
def test_equals_the_official_code(name, index, dtype, tolerance):
    recorded = golden.load(name)
    case = recorded["cases"][index]
    model = timm.create_model(name).to(dtype).eval()
    weights = golden.official_weights(recorded, case.get("weight_scale"))
    model.load_state_dict(convert_state_dict({"model": weights}, model))
    choices = watch_choices(model)
    x = golden.image(case["input_shape"]).to(dtype)
    logits = torch.tensor(case["logits"], dtype=torch.float64).reshape(1, -1)
    last, maps = model.forward_intermediates(x)
    values = [model.forward_stem(model.image_input(x)), *maps, last]
    for value, summary in zip(values, case["features"].values(), strict=True):
        golden.check_summary(value, summary, tolerance)
    assert relative_error(model.forward_head(last).double(), logits) < tolerance
    check_choices(choices, case["routing"])


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_equals_the_official_detection_pyramid(dtype, tolerance):
    recorded = golden.load("det_biformer_small")
    weights, (case,) = golden.official_weights(recorded), recorded["cases"]
    model = timm.create_model(
        "biformer_small",
        pretrained=True,
        features_only=True,
        n_win=16,
        pyramid="det",
        pretrained_cfg_overlay={"state_dict": {"state_dict": weights}},
        dtype=dtype,
    ).eval()
    assert recorded["params"] == sum(v.numel() for v in model.parameters())
    maps = model(golden.image(case["input_shape"]).to(dtype))
    for value, summary in zip(maps, case["outputs"], strict=True):
        golden.check_summary(value, summary, tolerance)


def uncounted(name: str) -> int:
    """What fvcore adds: 5 operations per number of a LayerNorm, 2 of a BatchNorm, 1 of means."""
    model, count = timm.create_model(name, device="meta").eval(), 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal count
        if isinstance(module, BiLevelRoutingAttention):
            # queries and keys are averaged by a pooling in one version only
            factor = 2 * module.floor_regions
        else:
            factor = 2 if isinstance(module, nn.BatchNorm2d) else 2 * 5
        count += factor * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, RoutingBlock, BiLevelRoutingAttention)):
            module.register_forward_hook(add)
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    return count


@pytest.mark.parametrize("name", MODELS)
def test_costs(name):
    parameters, giga_macs = MODELS[name]
    model = timm.create_model(name, device="meta")
    assert type(model) is backbones.BiFormer
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{(costs.macs(name) + uncounted(name)) / 1e9:.3f}" == giga_macs


def test_every_model_is_here():
    assert set(backbones.list_models("biformer")) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_configuration(name):
    cfg = timm.create_model(name, device="meta").pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406) and cfg["std"] == (0.229, 0.224, 0.225)
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.875, "bicubic")
    assert cfg["first_conv"] == ("stem.conv" if "stl" in name else "stem.conv1.conv")


# official name of a part -> ours, of attention alone too
PARTS = {
    **biformer._OURS,
    **{"qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj"},
}


def make_layer(name: str) -> nn.Module:
    """The layer of a case of the official modules, on maps as the case has them."""

    def route(dim: int, **kwargs) -> BiLevelRoutingAttention:
        return BiLevelRoutingAttention(dim, kwargs.pop("num_heads", 1), **kwargs)

    def attend(dim: int, **kwargs) -> LepeAttention:
        return LepeAttention(dim, 8, **kwargs)

    def later(dim: int, **kwargs) -> BiLevelRoutingAttention:
        return route(dim, floor_regions=True, **kwargs)

    if name == "stl_nchw_block":
        block = RoutingBlock(32, later, 4, position_encoding=False)
        replace_linear(block)
        return block
    layers = {
        "biformer_block": lambda: RoutingBlock(32, route, 3),
        "biformer_block_full": lambda: RoutingBlock(32, attend, 3),
        "attn_lepe": lambda: attend(32),
        "attn_lepe_nchw": lambda: attend(32, lepe_on_values=True),
        "bra_nchw": lambda: later(16, num_heads=2, channels_first=True),
        "bra_nchw_ragged": lambda: later(16, num_heads=2, channels_first=True),
        "bra_legacy_autopad_emptyregions": lambda: route(16, num_heads=2, topk=16),
    }
    return layers.get(name, lambda: route(16, num_heads=2))()


LAYERS = [
    case
    for case in golden.load("modules")["cases"]
    if case["id"].startswith(("bra_", "attn_", "biformer_", "stl_"))
]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case["id"])
def test_layers_equal_the_official_ones(case, dtype, tolerance):
    name, layer = case["id"], make_layer(case["id"])
    expected = {
        k.removeprefix(f"{name}."): v
        for k, v in load_file(golden.GOLDEN / "modules.safetensors").items()
        if k.startswith(f"{name}.")
    }
    names = {}
    for theirs in case["manifest"]:
        part, _, leaf = theirs.rpartition(".")
        names[f"{PARTS.get(part, part)}.{leaf}"] = theirs
    weights = golden.state_dict(case["manifest"])
    shapes = {k: v.shape for k, v in layer.state_dict().items()}
    layer.to(dtype).load_state_dict({k: weights[v].reshape(shapes[k]) for k, v in names.items()})
    x = torch.from_numpy(golden.normal(f"module/{name}/x", case["input_shape"])).to(dtype)
    x.requires_grad_()
    # blocks, and attention over all tokens, take channels last only
    turned = case["layout"] == "NCHW" and not getattr(layer, "channels_first", False)
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if turned else layer(x)
    cotangent = golden.normal(f"module/{name}/cotangent", case["out_shape"])
    parameters = dict(layer.named_parameters())
    assert len(expected) == len(parameters) + 2
    grads = torch.autograd.grad(
        out, [x, *parameters.values()], torch.from_numpy(cotangent).to(dtype)
    )
    keys = ["out", "dx", *(f"grad.{names[parameter]}" for parameter in parameters)]
    for key, value in zip(keys, [out.detach(), *grads], strict=True):
        value = golden.kept(value.double(), expected[key])
        assert relative_error(value, expected[key]) < tolerance, key


@torch.no_grad()
def test_attention_stands_alone():
    last = deterministic(BiLevelRoutingAttention(32, 4, n_win=3, topk=2))
    first = BiLevelRoutingAttention(32, 4, n_win=3, topk=2, channels_first=True).double()
    first.load_state_dict(last.state_dict())
    x = golden.image((2, 11, 14, 32))
    turned = x.permute(0, 3, 1, 2)
    assert relative_error(first(turned).permute(0, 2, 3, 1), last(x)) < 1e-14
    assert last.grid(11, 14) == ((3, 3), (4, 5))
    regions = last.route(x)
    assert regions.shape == (2, 9, 2) and regions.dtype == torch.int64
    assert torch.equal(first.route(turned), regions)

    # a change of what a region did not choose, beyond the reach of the enhancement
    row, col = divmod(next(r for r in (8, 5, 7) if r not in regions[0, 0]), 3)
    other = x.clone()
    other[0, 4 * row + 2 : 4 * row + 4, 5 * col + 2 : 5 * col + 5] *= 1.001
    assert torch.equal(last.route(other), regions)
    change = (last(other) - last(x)).abs().amax(-1)[0]
    assert change[:4, :5].max() == 0 < change.max()


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (6, 7), (13, 8), (14, 21)])
def test_floored_regions_cover_the_map(height, width):
    layer = BiLevelRoutingAttention(8, 1, floor_regions=True)
    for side, count, size in zip((height, width), *layer.grid(height, width), strict=True):
        assert size == max(1, side // 7)
        assert count == max(7, -(-side // size))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_fuse_is_exact(name):
    def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
        last, maps = model.forward_intermediates(x)
        return [*maps, last, model.forward_head(last, pre_logits=True), model.forward_head(last)]

    for dtype, tolerance in [(torch.float64, 1e-11), (torch.float32, 2e-5)]:
        model = deterministic(SMALL[name].create(), dtype)
        images = [golden.image((2, 3, *size)).to(dtype) for size in [(224, 112), (97, 65)]]
        expected = [outputs(model, x) for x in images]
        assert model.fuse() is model
        model.fuse()
        for x, wanted in zip(images, expected, strict=True):
            for value, wanted_value in zip(outputs(model, x), wanted, strict=True):
                assert relative_error(value, wanted_value) < tolerance
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    left = [
        n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.bias is not None
    ]
    # the local enhancement of the input reads what the norm gives
    enhanced = [1, 3] if name != "biformer_stl_nchw" else []
    assert left == [f"stages.{stage}.blocks.0.norm1" for stage in enhanced]


@torch.no_grad()
def test_a_fused_model_scripts_and_is_saved_whole():
    small = SMALL["biformer"]
    model = deterministic(small.create()).fuse()
    x = golden.image((2, 3, 65, 97))
    assert torch.equal(torch.jit.script(model)(x), model(x))
    again = small.create().double().eval().fuse()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert {value.dtype for value in again.half().state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_traces_for_all_sizes_and_runs_without_our_ops(name):
    model = deterministic(SMALL[name].create_short())
    traced = torch.jit.trace(model, golden.image((2, 3, 64, 96)))
    for size in [(64, 96), (65, 97), (70, 39), (225, 231)]:
        x = golden.image((2, 3, *size))
        assert relative_error(traced(x), model(x)) < 1e-12
    plain = deterministic(SMALL[name].create_short(exportable=True))
    assert relative_error(plain(x), model(x)) < 1e-12
    with use_reference():
        traced = torch.jit.trace(model, x)
        assert "backbones::" not in str(traced.inlined_graph)
    assert relative_error(traced(x), model(x)) < 1e-12


@torch.no_grad()
def test_floored_regions_compile_and_export_once_for_all_sizes():
    torch._dynamo.reset()
    model = deterministic(SMALL["biformer_stl_nchw"].create_short())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in [(2, 160, 192), (3, 97, 65)]:
        x = golden.image((shape[0], 3, *shape[1:]))
        assert relative_error(compiled(x), model(x)) < 1e-11
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(
        model, (golden.image((2, 3, 96, 160)),), dynamic_shapes=shapes
    ).module()
    x = golden.image((3, 3, 101, 133))
    assert relative_error(program(x), model(x)) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_gradients_survive_checkpointing_and_equal_the_references(name):
    model = deterministic(SMALL[name].create(drop_path_rate=0.3))
    x = golden.image((4, 3, 97, 65))
    plain = gradients(model, x)
    model.set_grad_checkpointing()
    assert worst_gradient(gradients(model, x), plain)[0] < 1e-12
    model.set_grad_checkpointing(False)
    with use_reference():
        assert worst_gradient(gradients(model, x), plain)[0] < 1e-11


def test_drop_path_rises_from_block_to_block():
    model = backbones.BiFormer(drop_path_rate=0.26, device="meta")
    rates = [
        getattr(drop, "drop_prob", 0.0)
        for stage in model.stages
        for block in stage.blocks
        for drop in (block.drop_path1, block.drop_path2)
    ]
    assert rates == pytest.approx([0.02 * (i // 2) for i in range(28)])


def test_first_values():
    for name, kind in [("biformer_stl", nn.Linear), ("biformer_stl_nchw", PointwiseConv2d)]:
        model = SMALL[name].create(embed_dims=(64, 64, 64, 64), num_heads=(2, 2, 2, 8))
        for module in model.stages.modules():
            if isinstance(module, (nn.Linear, PointwiseConv2d)):
                assert type(module) is kind
                # truncated normal, or uniform within 1 / sqrt(width), as convolutions start
                width = module.weight.shape[1]
                std = 0.02 if kind is nn.Linear else (3 * width) ** -0.5
                assert abs(float(module.weight.detach().std()) / std - 1) < 0.1
                if module.bias is not None:
                    assert module.bias.any() == (kind is PointwiseConv2d)
        assert abs(float(model.head.fc.weight.std()) / 0.02 - 1) < 0.2
        assert not model.head.fc.bias.any()


@torch.no_grad()
def test_weights_fit_every_n_win():
    model = deterministic(SMALL["biformer"].create(topks=(1, 4, 16, None)))
    wide = SMALL["biformer"].create(topks=(1, 4, 16, None), n_win=16).double().eval()
    wide.load_state_dict(model.state_dict())
    x = golden.image((1, 3, 128, 160))
    choices = watch_choices(wide)
    assert relative_error(wide(x), model(x)) > 1e-6
    assert [c.shape[1:] for c in choices] == [(256, k) for k in (1, 4, 16, 16)]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depths": (1, 1)}, r"depths=\(1, 1\), num_heads=.* must be of equal length"),
        ({"num_heads": (2, 4, 8, 9)}, r"must be multiples of num_heads=\(2, 4, 8, 9\)"),
        ({"n_win": 3}, r"n_win=3 gives 9 regions, but topks=\(1, 4, 16, None\): increase n_win"),
        ({"n_win": 0}, "n_win=0 gives 0 regions"),
        ({"topks": (0, 4, 16, None)}, "topk=0 must be from 1 to"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        backbones.BiFormer(**kwargs, device="meta")


def test_bad_arguments_of_the_attention_are_named():
    with pytest.raises(ValueError, match="dim=32 must be a multiple of num_heads=5"):
        BiLevelRoutingAttention(32, 5)
    with pytest.raises(ValueError, match=r"topk=10 must be from 1 to n_win\*\*2 = 9"):
        BiLevelRoutingAttention(32, 4, n_win=3, topk=10)
