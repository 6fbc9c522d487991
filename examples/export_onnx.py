"""Write a model as an ONNX file for batches of any size, and compare it with the model.

python examples/export_onnx.py shvit_s1 shvit_s1.onnx --pretrained
python examples/export_onnx.py local-dir:my_model my_model.onnx --pretrained --any-size

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
    parser.add_argument("--any-size", action="store_true", help="leave the size of images free")
    arguments = parser.parse_args()

    model = backbones.create_model(arguments.name, pretrained=arguments.pretrained).eval()
    # BatchNorm and the like become part of the weights; ours only, so timm's types do not know it
    model = model.fuse()  # type: ignore[operator]
    channels, height, width = model.pretrained_cfg["input_size"]
    # two images: of one, export would make a constant
    images = torch.rand(2, channels, height, width)
    free = torch.export.Dim.DYNAMIC
    sizes = {0: free, 2: free, 3: free} if arguments.any_size else {0: free}
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=(sizes,),
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
