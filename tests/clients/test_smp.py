"""segmentation_models_pytorch: our models as encoders, `tu-` and the name."""

import pytest
import torch
from torch import nn

import backbones
from tests.backbones.models import FAMILIES, Small

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="pip install segmentation-models-pytorch"
)

# its pyramid wants features of strides 4 to 32
USABLE = {name: family for name, family in FAMILIES.items() if name != "shvit"}


@pytest.fixture(params=USABLE.values(), ids=USABLE)
def family(request) -> Small:
    return request.param


def segmenter(architecture: str, family: Small, **kwargs) -> nn.Module:
    encoder = {key: value for key, value in family.args.items() if key != "head_hidden_size"}
    return smp.create_model(
        architecture,
        encoder_name=f"tu-{family.name}",
        encoder_weights=None,
        classes=3,
        **{**encoder, **kwargs},
    )


@pytest.mark.parametrize("architecture", ["unet", "fpn"])
def test_segments_and_trains(family, architecture):
    model = segmenter(architecture, family, in_channels=4)
    masks = model(torch.randn(2, 4, 64, 96))
    assert masks.shape == (2, 3, 64, 96)
    masks.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_strides_that_its_decoders_do_not_know():
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.create_model("unet", encoder_name="tu-shvit_s1", encoder_weights=None)


def test_no_output_stride():
    with pytest.raises(TypeError, match="output_stride"):
        segmenter("deeplabv3plus", FAMILIES["davit"])


def test_images_are_prepared_as_the_configuration_says():
    cfg = backbones.create_model("davit_tiny", device="meta").pretrained_cfg
    parameters = smp.encoders.get_preprocessing_params("tu-davit_tiny")
    assert parameters["mean"] == list(cfg["mean"]) and parameters["std"] == list(cfg["std"])
