"""Small layers that the families share."""

from .conv_norm import ConvNorm, NormLinear, Residual
from .mbconv import ConvStem, MBConv
from .multi_axis import MultiAxisBlock, MultiAxisStage, ParallelMultiAxisBlock
from .partition_attention import PartitionAttention, PartitionBlock
from .relative_position import RelativePositionBias, RelativePositionBiasTf, RelativePositionMlp

__all__ = [
    "ConvNorm",
    "ConvStem",
    "MBConv",
    "MultiAxisBlock",
    "MultiAxisStage",
    "NormLinear",
    "ParallelMultiAxisBlock",
    "PartitionAttention",
    "PartitionBlock",
    "RelativePositionBias",
    "RelativePositionBiasTf",
    "RelativePositionMlp",
    "Residual",
]
