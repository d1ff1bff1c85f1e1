"""Fusions: how the outputs of a parallel block's branches become one. One file and one YAML each.

A fusion is an ``nn.Module`` built with ``(d_model=, full=)`` and called with ``(y_attn, y_ssm, split) -> (B, T, D)``;
it reports ``flops(n_tokens)``. To add one: a file here with a subclass of :class:`Fusion`, a line below, and
``configs/fusion/<name>.yaml``. The tests find it by listing this package.

In split modes a token has one branch output. ``sum``, ``mean`` and ``none`` coincide there; ``concat_proj`` is the same
followed by a linear map. With No_Split ``mean`` is half of ``sum``, and ``none`` is refused.
"""

from flowhn.models.fusions.base import Fusion
from flowhn.models.fusions.concat_proj import ConcatProj
from flowhn.models.fusions.cross import CrossFusion
from flowhn.models.fusions.gated import GatedFusion
from flowhn.models.fusions.mean import MeanFusion
from flowhn.models.fusions.none import NoFusion
from flowhn.models.fusions.norm_mean import NormMeanFusion
from flowhn.models.fusions.sum import SumFusion

__all__ = [
    "ConcatProj",
    "CrossFusion",
    "Fusion",
    "GatedFusion",
    "MeanFusion",
    "NoFusion",
    "NormMeanFusion",
    "SumFusion",
]
