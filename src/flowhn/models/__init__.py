"""The networks: mixers, blocks, splits, fusions and the language model around them. Plain torch, no config objects."""

from flowhn.models.blocks import ParallelBlock, SequentialBlock, SwiGLU
from flowhn.models.convert import from_transformers
from flowhn.models.fusions import ConcatProj
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
    "FlopAwareCirculatingSplit",
    "FlopAwareSplit",
    "GatedRMSNorm",
    "HymbaBlock",
    "Mamba1",
    "Mamba2",
    "NoSplit",
    "ParallelBlock",
    "PublishedModeDSplit",
    "RMSNorm",
    "SequentialBlock",
    "Split",
    "SwiGLU",
    "TokenSplit",
    "from_transformers",
    "kernels_used",
    "resolve_attention",
    "resolve_ssm",
]
