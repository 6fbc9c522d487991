"""Write a model as an ONNX file for one size of images, and compare it with the model.

python examples/export_onnx.py shvit_s1 shvit_s1.onnx --pretrained
python examples/export_onnx.py local-dir:my_model my_model.onnx --pretrained

It needs onnxscript and onnxruntime. Weights of more than 2 GB are put beside the file.
"""

from __future__ import annotations

import argparse

import onnxruntime
import torch

import backbones


def main() -> None:
    """Export, run both, print the largest difference relative to the largest logit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a model, with or without tag, local-dir:... or hf-hub:...")
    parser.add_argument("file", help="what to write")
    parser.add_argument("--pretrained", action="store_true", help="with its weights")
    arguments = parser.parse_args()

    model = backbones.create_model(arguments.name, pretrained=arguments.pretrained).eval()
    # BatchNorm and the like become part of the weights
    model = model.fuse()
    channels, height, width = model.pretrained_cfg["input_size"]
    # two images: of one, export would make a constant
    images = torch.rand(2, channels, height, width)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
    )
    program.save(arguments.file)

    session = onnxruntime.InferenceSession(arguments.file)
    for batch in (1, 3):
        images = torch.rand(batch, channels, height, width)
        with torch.no_grad():
            expected = model(images)
        (logits,) = session.run(None, {"images": images.numpy()})
        error = (torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()
        print(f"{arguments.file}, {batch} images: relative error {float(error):.1e}")


if __name__ == "__main__":
    main()
