"""The families on the depthwise op: where it is called, and what it computes there."""

from collections import Counter

import pytest
import torch
from timm.layers import set_exportable
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import ops
from backbones.layers import ChannelAttention, ConvAttentionBlock, ConvPositionEncoding, MBConv
from backbones.shvit import PatchMerging
from tests.backbones.models import VARIANTS, deterministic, relative_error
from tests.backbones.test_davit import pair
from tests.support import golden


def block(dim: int) -> ConvAttentionBlock:
    return ConvAttentionBlock(
        dim, lambda dim, **dd: ChannelAttention(dim, 2, mix_values=False, **dd)
    )


# layers that take maps of 8 channels
LAYERS = {
    "block": lambda: block(8),
    "mbconv_tf": lambda: MBConv(8, 8, 1, tensorflow=True),
    "mbconv_tf_strided": lambda: MBConv(8, 12, 2, tensorflow=True),
    "mbconv_rw": lambda: MBConv(8, 8),
    "mbconv_rw_strided": lambda: MBConv(8, 12, 2),
    "merging": lambda: PatchMerging(8, 12),
}
SIZES = [(8, 6), (7, 6), (8, 5), (7, 5), (2, 1), (1, 2), (1, 1)]


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


def layer(kind: str, fused: bool = True) -> nn.Module:
    made = deterministic(LAYERS[kind]())
    return made.fuse() if fused else made


def maps(kind: str, height: int, width: int, batch: int = 2) -> torch.Tensor:
    x = golden.image((batch, 8, height, width)).contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if kind == "block" else x


class _Calls(TorchDispatchMode):
    """Count operators, our own and PyTorch's, that are called outside of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # a convolution of groups
        if name == "convolution" and args[8] > 1:
            name = "grouped_convolution"
        self.count[name] += 1
        return func(*args, **kwargs or {})


def count(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    with _Calls() as calls:
        model(x)
    return calls.count


@torch.no_grad()
def test_davit_computes_each_norm_of_a_block_with_its_position_encoding():
    x = golden.image((1, 3, 64, 97))
    for name in ("davit", "davit_fl"):
        model = deterministic(VARIANTS[name].create())
        for calls in (count(model, x), count(model.fuse(), x)):
            blocks = sum(isinstance(m, ConvAttentionBlock) for m in model.modules())
            assert (calls["depthwise_conv_norm"], blocks) == (2 * blocks, 10)
            # stem, three downsamplings, classifier
            assert calls["native_layer_norm"] == 5
            assert not calls["grouped_convolution"]


@pytest.mark.parametrize("name", ["maxvit", "maxvit_rw", "maxvit_pm", "shvit"])
@torch.no_grad()
def test_fuse_averages_for_squeeze_excite_in_the_convolution(name):
    model, x = deterministic(VARIANTS[name].create()), golden.image((1, 3, 64, 97))
    places = [m for m in model.modules() if isinstance(m, MBConv | PatchMerging)]
    before, after = count(model, x), count(model.fuse(), x)
    assert before["depthwise_conv"] == 0 < len(places)
    assert after["depthwise_conv"] == len(places)
    assert after["mean"] == before["mean"] - len(places)
    assert after["grouped_convolution"] == before["grouped_convolution"] - len(places)
    if name != "shvit":
        assert not after["grouped_convolution"]


@torch.no_grad()
def test_fuse_is_exact_for_every_parity_and_below_the_kernel(kind):
    for size in SIZES:
        x = maps(kind, *size)
        expected, fused = layer(kind, fused=False)(x), layer(kind)
        assert relative_error(fused(x), expected) < 1e-11, size
        with ops.use_reference():
            calls = count(fused, x)
            assert relative_error(fused(x), expected) < 1e-11, size
        assert not any(name.startswith("depthwise_conv") for name in calls)


@torch.no_grad()
def test_exportable_layers_call_plain_pytorch(kind):
    with set_exportable(True):
        plain = layer(kind)
    for size in SIZES[:4]:
        x = maps(kind, *size)
        assert relative_error(plain(x), layer(kind)(x)) < 1e-12
        assert "backbones::" not in str(torch.jit.trace(plain, x).inlined_graph)


@torch.no_grad()
def test_fused_layers_script_and_trace(kind):
    fused = layer(kind)
    forms = [
        torch.jit.script(fused),
        torch.jit.trace(fused, maps(kind, 8, 6)),
        torch.fx.symbolic_trace(fused),
    ]
    for size in SIZES:
        x = maps(kind, *size)
        for form in forms:
            assert relative_error(form(x), fused(x)) < 1e-12


@pytest.mark.parametrize("kind", ["mbconv_tf_strided", "merging"])
@torch.no_grad()
def test_fused_layers_compile_and_export_once_for_all_sizes(kind):
    torch._dynamo.reset()
    fused, counter = layer(kind), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    auto = torch.export.Dim.AUTO
    sizes = ({0: auto, 2: auto, 3: auto},)
    exported = torch.export.export(fused, (maps(kind, 16, 12),), dynamic_shapes=sizes).module()
    counts = []
    # no two sizes of the first call are equal, which the compiler would expect of all
    for batch, size in enumerate([(16, 12), (15, 12), (16, 11), (13, 11)], 2):
        x = maps(kind, *size, batch)
        for form in (compiled, exported):
            assert relative_error(form(x), fused(x)) < 1e-12
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 3


@torch.no_grad()
def test_a_residual_stream_keeps_its_type_under_autocast():
    encoding = deterministic(ConvPositionEncoding(8), torch.float32)
    x, weight, bias = maps("block", 5, 7).float(), torch.randn(8), torch.randn(8)
    expected = encoding(x, weight, bias, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        for value, wanted in zip(encoding(x, weight, bias, 1e-5), expected, strict=True):
            assert torch.equal(value, wanted)
        values = encoding(x.bfloat16(), weight, bias, 1e-5)
    assert [value.dtype for value in values] == [torch.bfloat16] * 2


@pytest.mark.parametrize("kind", ["classifier", "florence"])
@torch.no_grad()
def test_davit_under_autocast_is_as_close_as_timms(kind):
    model, timms = pair(kind)
    x, errors = golden.image((4, 3, 97, 160)), []
    expected = timms(x)
    for other in (model.float(), timms.float()):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(float((other(x.float()) - expected).norm() / expected.norm()))
    assert errors[0] < 1.25 * errors[1] < 0.1
