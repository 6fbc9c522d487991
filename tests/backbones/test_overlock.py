"""OverLoCK against the official code (golden files): models, pyramids, training, merging, cost."""

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.layers import ConvNormAct, DilatedReparamConv
from backbones.ops import count_macs
from backbones.pretrained import convert_state_dict, overlock
from tests.backbones.models import VARIANTS, deterministic, relative_error
from tests.support import golden

PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 2e-5)]

# parameters of both forms without and with the auxiliary head, and the GMACs of the merged form
MODELS = {
    "overlock_xt": (16969600, 17307272, 16453712, 16791384, 2.701),
    "overlock_t": (34476448, 34990472, 33467040, 33981064, 5.646),
    "overlock_s": (57795748, 58309772, 56156452, 56670476, 9.894),
    "overlock_b": (97434816, 98012968, 94942528, 95520680, 17.096),
}


def load(recorded: dict, dtype: torch.dtype, **kwargs) -> nn.Module:
    """The model of a golden file with its weights, for evaluation."""
    name = recorded["model"].removesuffix("_reparam")
    model = timm.create_model(name, **kwargs).to(dtype).eval()
    model.load_state_dict(convert_state_dict(golden.official_weights(recorded), model))
    return model


def module_of(model: nn.Module, official: str) -> tuple[nn.Module, str | None]:
    """Our module whose output an official one has, and the half of it that is meant."""
    fixed = {
        "patch_embed1": "stem",
        "patch_embed2": "stages.1.downsample",
        "patch_embed3": "stages.2.downsample",
        "patch_embed4": "overview.downsample",
        "high_level_proj": "context_proj",
        "patch_embedx.0": "focus.1.downsample",
        "patch_embedx.1": "focus.1.context_downsample",
    }
    if official in fixed:
        return model.get_submodule(fixed[official]), None
    group, block, *rest = official.split(".")
    ours = f"{overlock._GROUPS[group]}.{block}"
    parts = {"proj.1": "conv.rep", "fusion": "fusion", "dyconv_proj": "mixer.out"}
    if rest and ".".join(rest) in parts:
        return model.get_submodule(f"{ours}.{parts['.'.join(rest)]}"), None
    return model.get_submodule(ours), rest[0] if rest else None


def record(model: nn.Module, features: dict) -> dict[str, list[Tensor]]:
    """Keep outputs of the modules that a golden file has summaries of."""
    outputs: dict[str, list[Tensor]] = {}
    for name in features:
        module, _ = module_of(model, name)
        module.register_forward_hook(
            lambda _, __, out, name=name: outputs.setdefault(name, []).append(out)
        )
    return outputs


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("overlock_xt", 0),
        ("overlock_xt", 1),
        ("overlock_xt_reparam", 0),
        pytest.param("overlock_t", 0, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_equals_the_official_code(name, index, dtype, tolerance):
    recorded = golden.load(name)
    model = load(recorded, dtype, aux_head=True, reparam=name.endswith("_reparam"))
    case = recorded["cases"][index]
    x = golden.image(case["input_shape"]).to(dtype)
    # of the weights of kernels there is no map
    features = {k: v for k, v in case["features"].items() if not k.endswith("weight_proj")}
    outputs = record(model, features)
    logits = model(x)
    for kind, value in [("logits", logits), ("aux_logits", model.aux_head(outputs_of(model, x)))]:
        expected = torch.tensor(case[kind], dtype=torch.float64).reshape(len(x), -1)
        assert relative_error(value.double(), expected) < tolerance, kind
    for key, summary in features.items():
        module, half = module_of(model, key)
        value, width = outputs[key][0], summary["shape"][1]
        if not isinstance(module, (nn.Sequential, ConvNormAct)):
            value = value.permute(0, 3, 1, 2)
        if half is not None:
            value = value[:, :width] if half == "0" else value[:, -width:]
        golden.check_summary(value, summary, tolerance)


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """The overview of images."""
    return model._run(x, [], 3)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "index"), [("det", 0), pytest.param("det", 1, marks=pytest.mark.slow), ("seg", 0)]
)
@torch.no_grad()
def test_equals_the_official_pyramids(kind, index, dtype, tolerance):
    recorded, base = golden.load(f"overlock_xt_{kind}"), golden.load("overlock_xt")
    names = {**base["manifest"], **recorded["manifest_extra"]}
    names = {k: v for k, v in names.items() if k not in recorded["manifest_missing"]}
    detector = {f"backbone.{k}": v for k, v in golden.state_dict(names).items()}
    model = timm.create_model(
        "overlock_xt",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": {"state_dict": detector}},
        pyramid=kind,
        features_only=True,
        dtype=dtype,
    )
    model.eval()
    assert model.feature_info.channels() == [56, 112, 340, 420]
    case = recorded["cases"][index]
    maps = model(golden.image(case["input_shape"]).to(dtype))
    for value, summary in zip(maps, case["outs"], strict=True):
        golden.check_summary(value, summary, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(*PRECISIONS[0], marks=pytest.mark.slow), PRECISIONS[1]]
)
def test_training_equals_the_official_code(dtype, tolerance):
    recorded = golden.load("overlock_xt_train")
    model = load(golden.load("overlock_xt"), dtype, aux_head=True).train()
    x = golden.image(recorded["input_shape"]).to(dtype).requires_grad_()
    out, loss = model(x), torch.zeros((), dtype=torch.float64)
    for kind, weight in [("main", 1.0), ("aux", 0.4)]:
        expected = torch.tensor(recorded[kind], dtype=torch.float64).reshape(len(x), -1)
        assert relative_error(out[kind].double(), expected) < tolerance, kind
        cotangent = torch.from_numpy(golden.normal(f"train.grad_{kind}", expected.shape))
        loss = loss + weight * (out[kind].double() * cotangent).sum()
    assert abs(loss.item() - recorded["loss_value"]) < tolerance * abs(recorded["loss_value"])
    loss.backward()
    golden.check_summary(x.grad, recorded["grad_input"], tolerance)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = overlock.to_official(grads)
    assert set(grads) == set(recorded["param_grad_norm"])
    # some gradients are zero but for rounding, those of biases before a norm
    floor = 1e-2 * max(recorded["param_grad_norm"].values())
    for name, norm in recorded["param_grad_norm"].items():
        assert abs(float(grads[name].double().norm()) - norm) < tolerance * max(norm, floor), name
    # single numbers come this near in float32, also by convolutions and norms one by one
    tolerance *= 1 if dtype == torch.float64 else 2
    for name, summary in recorded["param_grad"].items():
        golden.check_summary(grads[name], summary, tolerance)
    state = overlock.to_official(model.state_dict())
    for name, summary in recorded["running_after"].items():
        golden.check_summary(state[name], summary, tolerance)


@torch.no_grad()
def test_merged_kernels_equal_the_official_ones():
    recorded = golden.load("overlock_xt")
    model = load(recorded, torch.float64)
    x = golden.image((1, 3, 97, 131))
    expected = model(x)
    assert model.reparameterize() is model
    assert relative_error(model(x), expected) < 1e-9
    merged = overlock.to_official(model.state_dict())
    names = set(golden.load("overlock_xt_reparam")["manifest"])
    assert set(merged) == {name for name in names if not name.startswith("aux_head.")}
    for name, summary in recorded["reparam_of_filled"]["merged"].items():
        golden.check_summary(merged[name], summary, 1e-8)


@torch.no_grad()
def test_fuse_merges_too():
    model = deterministic(VARIANTS["overlock_trained"].create(aux_head=True))
    x = golden.image((2, 3, 97, 65))
    expected = model(x)
    assert model.fuse() is model
    assert relative_error(model(x), expected) < 1e-11
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    # that of a fusion is read by a convolution, whose border would show
    norms = {n: m.bias for n, m in model.named_modules() if n.endswith(".grn")}
    assert {n for n, bias in norms.items() if bias is None} == {n for n in norms if "mlp" in n}


@torch.no_grad()
def test_merging_runs_in_every_type():
    small = VARIANTS["overlock_trained"]
    expected = deterministic(small.create()).reparameterize()
    for dtype, tolerance in [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.1),
        (torch.float16, 0.02),
    ]:
        model = deterministic(small.create(), dtype).reparameterize()
        x = golden.image((1, 3, 64, 96))
        assert model.get_parameter("stages.0.blocks.0.conv.rep.conv.bias").dtype == dtype
        assert relative_error(model(x.to(dtype)).double(), expected(x)) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_costs(name):
    *parameters, giga_macs = MODELS[name]
    model = timm.create_model(name, device="meta", aux_head=True).eval()
    auxiliary = sum(p.numel() for p in model.aux_head.parameters())
    counts = []
    for _ in range(2):
        total = sum(p.numel() for p in model.parameters())
        counts += [total - auxiliary, total]
        model.reparameterize()
    assert counts == parameters
    # counted by another program, which finds up to 0.06 % more
    counted = (count_macs(model) + order_of_products(model)) / 1e9
    assert counted == pytest.approx(giga_macs, rel=6e-4)


def order_of_products(model: nn.Module) -> int:
    """What the official order of products costs more: affinities and kernels for every pixel."""
    more = 0
    for stage, pixels in zip(model.focus, (14 * 14, 7 * 7), strict=True):
        for block in stage.blocks:
            mixing = block.mixer.mixing
            regions, slots = mixing.kernel_proj.in_features, mixing.kernel_proj.out_features
            half, heads = mixing.key.linear.out_features, mixing.num_heads
            more += pixels * (half * regions + heads * regions * slots)
            more -= half * regions * slots + pixels * half * slots
    return more


def test_the_auxiliary_head_speaks_in_training_only():
    model = VARIANTS["overlock_trained"].create(aux_head=True)
    x = torch.randn(2, 3, 64, 64)
    assert model.eval()(x).shape == (2, 10)
    out = model.train()(x)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "main": (2, 10),
        "aux": (2, 10),
    }
    model.reset_classifier(3)
    assert {tuple(value.shape) for value in model(x).values()} == {(2, 3)}
    model.reset_classifier(0)
    assert model(x)["aux"].shape == (2, 96)
    plain = VARIANTS["overlock_trained"].create().train()
    assert plain(x).shape == (2, 10)
    model.eval().fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.head.modules())


def test_weights_of_the_trained_form_are_merged_on_the_way_in():
    trained = deterministic(VARIANTS["overlock_trained"].create())
    merged = VARIANTS["overlock"].create().double().eval()
    merged.load_state_dict(convert_state_dict(trained.state_dict(), merged))
    x = golden.image((1, 3, 64, 96))
    with torch.no_grad():
        assert relative_error(merged(x), trained(x)) < 1e-11
    assert not any(hasattr(m, "branches") for m in merged.modules())


def test_classifiers_weights_start_a_pyramid():
    small = VARIANTS["overlock_trained"]
    trained = deterministic(small.create())
    pyramid = small.create(pyramid="det").double().eval()
    weights = convert_state_dict(trained.state_dict(), pyramid)
    assert set(weights) == set(pyramid.state_dict())
    assert not any(name.startswith("head.") for name in weights)
    pyramid.load_state_dict(weights)
    x = golden.image((1, 3, 64, 96))
    with torch.no_grad():
        first = pyramid.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        raw = trained.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert torch.equal(first, pyramid.feature_norms[0](raw))
    with pytest.raises(backbones.pretrained.WeightsError, match="pyramid='det' or 'seg'"):
        convert_state_dict(pyramid.state_dict(), trained)


def test_tags_choose_the_form():
    for name, reparam in [
        ("overlock_xt", False),
        ("overlock_xt.in1k", False),
        ("overlock_xt.reparam_in1k", True),
    ]:
        model = timm.create_model(name, device="meta")
        assert model.reparam is reparam
        norms = sum(isinstance(m, DilatedReparamConv) and m.reparam for m in model.modules())
        assert bool(norms) is reparam
    assert not timm.create_model("overlock_xt.reparam_in1k", reparam=False, device="meta").reparam


def test_saved_models_keep_their_form(tmp_path):
    small = VARIANTS["overlock_trained"]
    for form, model in [
        ("method", small.create().eval().reparameterize()),
        ("tag", timm.create_model("overlock_xt.reparam_in1k", **small.args).eval()),
    ]:
        timm.models.save_for_hf(model, tmp_path / form, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True).eval()
        assert again.reparam
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(again(x), model(x))


def test_rates_of_drop_path_rise_over_all_blocks():
    model = timm.create_model("overlock_xt", drop_path_rate=0.16, device="meta")
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    # two in every block of the focus; the first block of all has none
    expected = [0.01 * i for i in range(1, 9)] + [0.01 * i for i in range(9, 17) for _ in (0, 1)]
    assert rates == pytest.approx(expected)


def test_bad_arguments_are_named():
    for arguments, message in [
        ({"pyramid": "fpn"}, "pyramid='fpn' is none of"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\) must have four numbers"),
        ({"num_heads": (7, 16)}, r"multiples of 2 \* num_heads=\(7, 16\)"),
        ({"dims": (65, 128, 256, 512)}, "the first must be even"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbones.OverLoCK(**arguments, device="meta")
