"""Routing attention against its definition and official code, and what is particular to it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from backbones.ops import (
    _routing_pytorch,
    route_regions,
    route_regions_reference,
    routing_attention,
    routing_attention_reference,
)
from backbones.ops._regions import Regions
from tests.ops.routes import CALLS, Call, by_hand
from tests.support import golden

GOLDEN = {case["id"]: case for case in golden.load("op_bra")["cases"]}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5}

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
each_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(scope="module")
def arrays():
    return load_file(golden.GOLDEN / "op_bra.safetensors")


def official(case: dict, dtype: torch.dtype) -> tuple[Tensor, dict]:
    """The packed map of a golden case, and how its variant divides it."""
    shape = tuple(case[key] for key in "BCHW")
    parts = [golden.normal(f"op_bra/{case['id']}/{name}", shape) for name in "qkv"]
    qkv = torch.cat([torch.from_numpy(part) for part in parts], 1).permute(0, 2, 3, 1).to(dtype)
    n, sides = case["n_win"], shape[2:]
    if case["official"] == "nchw":
        size = [max(1, side // n) for side in sides]
        count = [max(n, -(-side // s)) for side, s in zip(sides, size, strict=True)]
    else:
        size, count = [-(-side // n) for side in sides], [n, n]
    return qkv, {"num_regions": tuple(count), "region_size": tuple(size)}


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(
        (golden.kept(value.detach(), expected) - expected).abs().max() / expected.abs().max()
    )


@each_type
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_official_code(arrays, name, dtype):
    case = GOLDEN[name]
    qkv, layout = official(case, dtype)
    qkv.requires_grad_()
    regions = route_regions(qkv, case["topk"], **layout)
    assert torch.equal(regions.sort(dim=-1).values, arrays[f"{name}.idx"])
    out = routing_attention(qkv, regions, case["heads"], **layout)
    assert relative_error(out.permute(0, 3, 1, 2), arrays[f"{name}.out"]) < TOLERANCE[dtype]
    cotangent = torch.from_numpy(
        golden.normal(f"op_bra/{name}/cotangent", tuple(case[k] for k in "BCHW"))
    )
    out.backward(cotangent.permute(0, 2, 3, 1).to(dtype))
    for key, grad in zip(("dq", "dk", "dv"), qkv.grad.permute(0, 3, 1, 2).chunk(3, 1), strict=True):
        assert relative_error(grad, arrays[f"{name}.{key}"]) < TOLERANCE[dtype], key


@each_call
@torch.no_grad()
def test_equals_the_definition(call):
    qkv, pad = call.inputs()
    expected = by_hand(call, qkv, pad)
    torch.testing.assert_close(call(qkv, pad), expected, rtol=0, atol=1e-12)
    reference = routing_attention_reference(qkv, call.regions(), pad=pad, **call.options)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-12)


@each_call
def test_gradients_are_those_of_the_definition(call):
    inputs = [x for x in call.inputs() if x is not None]

    def gradients(function) -> tuple[Tensor, ...]:
        out = function(*inputs, *([None] if len(inputs) == 1 else []))
        return torch.autograd.grad((out * call.weight()).sum(), inputs)

    expected = gradients(lambda *tensors: by_hand(call, *tensors))
    for value, wanted in zip(gradients(call), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-11)


def test_regions_are_taken_in_blocks_without_a_seam(monkeypatch):
    call = CALLS[4]

    def results() -> list[Tensor]:
        inputs = call.inputs()
        out = call(*inputs)
        return [out, *torch.autograd.grad((out * call.weight()).sum(), inputs)]

    whole = results()
    monkeypatch.setattr(_routing_pytorch, "_BLOCK", 500)
    for value, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_both_ways_to_attend_are_tested():
    """Masked: few tokens in a region, of not too many."""
    ways = {
        _routing_pytorch._masked(Regions(*c.num_regions, *c.region_size), c.topk) for c in CALLS
    }
    assert ways == {True, False}


def means_by_hand(call: Call, qkv: Tensor, pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean queries and keys `(B, R, C)`."""
    (batch, height, width), (h, w) = call.map_size, call.region_size
    means = []
    for n in range(batch):
        for region in range(call.count):
            row, col = divmod(region, call.num_regions[1])
            places = [(row * h + i, col * w + j) for i in range(h) for j in range(w)]
            tokens = [qkv[n, y, x] for y, x in places if y < height and x < width]
            if pad is not None:
                tokens += [pad] * (h * w - len(tokens))
            means.append(torch.stack(tokens).mean(0) if tokens else torch.zeros_like(qkv[0, 0, 0]))
    queries, keys, _ = torch.stack(means).unflatten(0, (batch, -1)).chunk(3, dim=-1)
    return queries, keys


@each_call
@torch.no_grad()
def test_chooses_the_regions_of_the_largest_products_of_means(call):
    qkv, pad = call.inputs()
    queries, keys = means_by_hand(call, qkv, pad)
    products = queries @ keys.mT
    regions = route_regions(qkv, call.topk, call.num_regions, call.region_size, pad)
    assert regions.dtype == torch.int64
    chosen = products.gather(-1, regions)
    # whole regions outside the map are all alike
    expected = products.topk(call.topk).values
    torch.testing.assert_close(chosen, expected, rtol=0, atol=1e-12)
    assert all(len(set(row)) == call.topk for row in regions.flatten(0, 1).tolist())
    reference = route_regions_reference(qkv, call.topk, call.num_regions, call.region_size, pad)
    assert torch.equal(regions, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_means_of_16_bit_maps_are_not_rounded(dtype):
    # 65,536 tokens in a region: their sums leave float16, and their mean is no bfloat16
    qkv = torch.ones(1, 256, 512, 6, dtype=dtype)
    qkv[:, ::2, 256:] = 1.0078125
    regions = route_regions(qkv, 1, (1, 2), (256, 256))
    assert regions.flatten().tolist() == [1, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert route_regions(qkv.float(), 1, (1, 2), (256, 256)).flatten().tolist() == [1, 1]


@pytest.mark.parametrize("topk", [1, 4])
def test_float16_of_a_detection_map_is_finite_and_exact(topk):
    """60,800 tokens, where sums over tokens would overflow."""
    generator = torch.Generator().manual_seed(0)
    qkv = (4 * torch.randn(1, 200, 304, 3 * 8, generator=generator)).half().requires_grad_()
    pad = torch.randn(3 * 8, generator=generator).half().requires_grad_()
    layout = {"num_regions": (16, 16), "region_size": (13, 19)}
    regions = route_regions(qkv, topk, pad=pad, **layout)
    out = routing_attention(qkv, regions, 1, pad=pad, **layout)
    grads = torch.autograd.grad(out.float().square().sum(), (qkv, pad))
    exact = [x.detach().double().requires_grad_() for x in (qkv, pad)]
    wide = routing_attention(exact[0], regions, 1, pad=exact[1], **layout)
    expected = torch.autograd.grad(wide.square().sum(), exact)
    for value, wanted in zip((out, *grads), (wide, *expected), strict=True):
        assert (value.double() - wanted).norm() / wanted.norm() < 2e-3


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_never_holds_a_copy_of_all_chosen_keys(monkeypatch):
    monkeypatch.setattr(_routing_pytorch, "_BLOCK", 1 << 12)
    call = Call("", (1, 28, 28), (7, 7), (4, 4), topk=16, heads=1, dim=4)
    (qkv, _), layout = call.inputs(), (*call.num_regions, *call.region_size)
    arguments = (call.regions(), None, 1, *layout, 0.5)
    with torch.no_grad(), Largest() as largest:
        out, lse = _routing_pytorch.forward(qkv, *arguments)
        _routing_pytorch.backward(out, qkv, arguments[0], None, out, lse, *arguments[2:])
    assert largest.elements <= qkv.numel() < call.topk * qkv.numel() // 3


@pytest.mark.parametrize("pad", [False, True])
def test_choice_is_one_op_for_all_sizes(pad):
    """Padded or not, traced, scripted, exported."""
    torch._dynamo.reset()
    vector = torch.from_numpy(golden.normal("pad", (12,))) if pad else None
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(qkv: Tensor) -> Tensor:
        height, width = qkv.shape[1:3]
        return route_regions(qkv, 3, (2, 3), (-(-height // 2), -(-width // 3)), vector)

    def inputs(*size: int) -> Tensor:
        return torch.from_numpy(golden.normal("qkv", (*size, 12)))

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for size in [(8, 10, 14), (3, 14, 15), (2, 7, 18), (5, 19, 8)]:
        assert torch.equal(compiled(inputs(*size)), function(inputs(*size)))
    assert len(graphs) == 1
    qkv = inputs(2, 5, 7)
    layout = (3, (2, 3), (3, 3), vector)
    assert torch.equal(torch.jit.script(route_regions)(qkv, *layout), function(qkv))
    assert torch.equal(torch.jit.trace(function, qkv)(qkv), function(qkv))

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return function(qkv)

    auto = torch.export.Dim.AUTO
    program = torch.export.export(Module(), (qkv,), dynamic_shapes=({0: auto, 1: auto, 2: auto},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if "backbones" in t] == ["backbones.route_regions.default"]
    larger = inputs(3, 6, 8)
    assert torch.equal(program.module()(larger), function(larger))


@pytest.mark.parametrize("pad", [False, True])
def test_opcheck_of_the_choice(pad):
    qkv, vector = Call("", (2, 5, 7), (2, 3), (3, 3), pad=pad).inputs()
    arguments = (vector, 2, 2, 3, 3, 3)
    torch.library.opcheck(torch.ops.backbones.route_regions.default, (qkv.detach(), *arguments))
    torch.library.opcheck(torch.ops.backbones.route_regions.default, (qkv, *arguments))


def test_choice_follows_the_reference_switch_and_has_no_gradient():
    qkv = torch.randn(1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    with ops.use_reference():
        reference = route_regions(qkv, 2, (2, 2), (2, 2))
    regions = route_regions(qkv, 2, (2, 2), (2, 2))
    assert torch.equal(regions, reference)
    assert not regions.requires_grad and not reference.requires_grad


@pytest.mark.parametrize("call", [CALLS[0], CALLS[4]], ids=lambda call: call.name)
def test_flops_are_those_of_the_reference(call):
    def count(function) -> tuple[int, int]:
        qkv, pad = call.inputs()
        with FlopCounterMode(display=False) as forward:
            out = function(qkv, call.regions(), pad=pad, **call.options)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(routing_attention)
    reference_forward, reference_backward = count(routing_attention_reference)
    pairs = call.count * call.topk * (call.region_size[0] * call.region_size[1]) ** 2
    assert forward == reference_forward == 4 * call.map_size[0] * pairs * call.heads * call.dim
    # the op computes the scores once more instead of keeping them
    assert backward == reference_backward + forward // 2


def test_flops_of_the_choice_are_those_of_the_reference():
    qkv = torch.randn(2, 5, 7, 12)
    counts = []
    for function in (route_regions, route_regions_reference):
        with FlopCounterMode(display=False) as counter:
            function(qkv, 2, (2, 3), (3, 3))
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 6 * 6 * 4] * 2


def test_fvcore_counts_the_choice():
    from fvcore.nn import FlopCountAnalysis

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return route_regions(qkv, 2, (2, 3), (3, 3))

    analysis = FlopCountAnalysis(Module(), torch.randn(2, 5, 7, 12))
    analysis.tracer_warnings("none").unsupported_ops_warnings(False)
    counted = analysis.set_op_handle(**ops.fvcore_handles()).by_operator()
    assert counted["route_regions"] == 2 * 6 * 6 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": (2, 12, 12)}, r"qkv \(2, 12, 12\) must be a map \(B, H, W, 3C\)"),
        ({"qkv": (2, 5, 7, 16)}, r"multiple of 3 \* num_heads = 6"),
        ({"pad": (13,)}, r"pad \(13,\) must be a vector of 12"),
        ({"num_heads": 0}, "num_heads=0.* must be positive"),
        ({"region_size": (3, 0)}, r"region_size=\(3, 0\) must be positive"),
        ({"region_size": (2, 3)}, r"cover \(4, 9\): take more or larger ones .* \(5, 7\)"),
        ({"regions": (2, 5, 2)}, r"regions \(2, 5, 2\) must be \(2, 6, 'topk'\)"),
        ({"regions": (2, 6, 7)}, r"topk in 1..6"),
        ({"regions": (2, 6)}, r"regions \(2, 6\) must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    given = {"qkv": (2, 5, 7, 12), "regions": (2, 6, 2), "pad": (12,), "num_heads": 2}
    given |= {"num_regions": (2, 3), "region_size": (3, 3)} | change
    for name in ("qkv", "pad"):
        given[name] = torch.zeros(given[name])
    given["regions"] = torch.zeros(given["regions"], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        routing_attention(**given)


def test_regions_of_another_type_are_named():
    qkv, regions = torch.zeros(1, 2, 2, 6), torch.zeros(1, 4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"regions of torch.int32 must be int64"):
        routing_attention(qkv, regions, 1, (2, 2), (1, 1))


@pytest.mark.parametrize("topk", [0, 5])
def test_a_topk_beyond_the_regions_is_named(topk):
    with pytest.raises(ValueError, match=rf"topk={topk} must be in 1..R of num_regions=\(2, 2\)"):
        route_regions(torch.zeros(1, 2, 2, 6), topk, (2, 2), (1, 1))
