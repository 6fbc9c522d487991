"""Small layers that the families share."""

from .context_mixing import ContextMixing
from .contmix_block import ContMixBlock
from .conv_norm import ConvNorm, ConvNormAct, NormLinear, Residual
from .depthwise_mlp import DepthwiseMlp
from .dilated_reparam import DilatedReparamConv
from .dual_attention import ChannelAttention, ConvAttentionBlock, WindowAttention
from .global_response_norm import GlobalResponseNorm
from .lepe_attention import LepeAttention
from .linear_attention import LinearAttention, LinearAttentionBlock
from .local_concentration import LocalConcentration
from .mbconv import ConvStem, MBConv
from .msa_conv import MSAConv2d
from .multi_axis import MultiAxisBlock, MultiAxisStage, ParallelMultiAxisBlock
from .neighborhood_attention import NeighborhoodAttention
from .partition_attention import PartitionAttention, PartitionBlock
from .position_conv import ConvPositionEncoding
from .projection_head import ProjectionHead
from .rank_augmented_attention import RankAugmentedAttention, RotaryAttention
from .relative_position import RelativePositionBias, RelativePositionBiasTf, RelativePositionMlp
from .rotary import RotaryPosition
from .routing_attention import BiLevelRoutingAttention
from .routing_block import RoutingBlock
from .squeeze_excite import SqueezeExcite
from .stage import ChannelsLastStage
from .strided import PatchConv2d

__all__ = [
    "BiLevelRoutingAttention",
    "ChannelAttention",
    "ChannelsLastStage",
    "ContMixBlock",
    "ContextMixing",
    "ConvAttentionBlock",
    "ConvNorm",
    "ConvNormAct",
    "ConvPositionEncoding",
    "ConvStem",
    "DepthwiseMlp",
    "DilatedReparamConv",
    "GlobalResponseNorm",
    "LepeAttention",
    "LinearAttention",
    "LinearAttentionBlock",
    "LocalConcentration",
    "MBConv",
    "MSAConv2d",
    "MultiAxisBlock",
    "MultiAxisStage",
    "NeighborhoodAttention",
    "NormLinear",
    "ParallelMultiAxisBlock",
    "PartitionAttention",
    "PartitionBlock",
    "PatchConv2d",
    "ProjectionHead",
    "RankAugmentedAttention",
    "RelativePositionBias",
    "RelativePositionBiasTf",
    "RelativePositionMlp",
    "Residual",
    "RotaryAttention",
    "RotaryPosition",
    "RoutingBlock",
    "SqueezeExcite",
    "WindowAttention",
]
