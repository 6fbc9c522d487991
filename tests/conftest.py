"""Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import torch

# read when a kernel is defined, so before anything imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
