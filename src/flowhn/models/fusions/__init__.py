"""Fusions: how the outputs of a parallel block's branches become one. One file and one YAML each.

A fusion is an ``nn.Module`` built with ``(d_model=, full=)`` and called with ``(y_attn, y_ssm, split) -> (B, T, D)``;
it reports ``flops(n_tokens)``.
"""

from flowhn.models.fusions.concat_proj import ConcatProj

__all__ = ["ConcatProj"]
