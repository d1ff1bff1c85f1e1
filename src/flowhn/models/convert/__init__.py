"""Weights of other implementations as ours: transformers' models, and the paper's published code."""

from flowhn.models.convert.transformers_weights import from_transformers

__all__ = ["from_transformers"]
