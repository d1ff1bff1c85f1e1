"""The networks: mixers, blocks, splits, fusions and the language model around them. Plain torch, no config objects."""

from flowhn.models.blocks import ParallelBlock, SequentialBlock, SwiGLU
from flowhn.models.convert import from_transformers
from flowhn.models.fusions import (
    ConcatProj,
    CrossFusion,
    GatedFusion,
    MeanFusion,
    NoFusion,
    NormMeanFusion,
    SumFusion,
)
from flowhn.models.hymba import HymbaBlock
from flowhn.models.kernels import kernels_used, resolve_attention, resolve_ssm
from flowhn.models.lm import CausalLM
from flowhn.models.mixers import Attention, Mamba1, Mamba2
from flowhn.models.norms import GatedRMSNorm, RMSNorm
from flowhn.models.splits import (
    AlternatingEqualSplit,
    BranchCost,
    FlopAwareCirculatingSplit,
    FlopAwareSplit,
    NoSplit,
    PublishedModeDSplit,
    Split,
    TokenSplit,
)

__all__ = [
    "AlternatingEqualSplit",
    "Attention",
    "BranchCost",
    "CausalLM",
    "ConcatProj",
    "CrossFusion",
    "FlopAwareCirculatingSplit",
    "FlopAwareSplit",
    "GatedFusion",
    "GatedRMSNorm",
    "HymbaBlock",
    "Mamba1",
    "Mamba2",
    "MeanFusion",
    "NoFusion",
    "NoSplit",
    "NormMeanFusion",
    "ParallelBlock",
    "PublishedModeDSplit",
    "RMSNorm",
    "SequentialBlock",
    "Split",
    "SumFusion",
    "SwiGLU",
    "TokenSplit",
    "from_transformers",
    "kernels_used",
    "resolve_attention",
    "resolve_ssm",
]
