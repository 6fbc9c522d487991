"""Small layers that the families share."""

from .conv_norm import ConvNorm, ConvNormAct, NormLinear, Residual
from .dual_attention import ChannelAttention, ConvAttentionBlock, WindowAttention
from .mbconv import ConvStem, MBConv
from .multi_axis import MultiAxisBlock, MultiAxisStage, ParallelMultiAxisBlock
from .partition_attention import PartitionAttention, PartitionBlock
from .position_conv import ConvPositionEncoding
from .relative_position import RelativePositionBias, RelativePositionBiasTf, RelativePositionMlp
from .squeeze_excite import SqueezeExcite
from .strided import PatchConv2d

__all__ = [
    "ChannelAttention",
    "ConvAttentionBlock",
    "ConvNorm",
    "ConvNormAct",
    "ConvPositionEncoding",
    "ConvStem",
    "MBConv",
    "MultiAxisBlock",
    "MultiAxisStage",
    "NormLinear",
    "ParallelMultiAxisBlock",
    "PartitionAttention",
    "PartitionBlock",
    "PatchConv2d",
    "RelativePositionBias",
    "RelativePositionBiasTf",
    "RelativePositionMlp",
    "Residual",
    "SqueezeExcite",
    "WindowAttention",
]
