"""Split strategies: which tokens go to which branch of a parallel block. One file and one YAML each.

To add one: a file here with a subclass of :class:`Split` (or :class:`FlopAware`), a line below, and
``configs/split/<name>.yaml``. The tests find it by listing this package.
"""

from flowhn.models.splits.ae import AlternatingEqualSplit
from flowhn.models.splits.balance import FlopAware, balanced_attention_tokens
from flowhn.models.splits.base import BranchCost, Split, TokenSplit
from flowhn.models.splits.fa import FlopAwareSplit
from flowhn.models.splits.fac import FlopAwareCirculatingSplit
from flowhn.models.splits.no import NoSplit
from flowhn.models.splits.published_d import PublishedModeDSplit

__all__ = [
    "AlternatingEqualSplit",
    "BranchCost",
    "FlopAware",
    "FlopAwareCirculatingSplit",
    "FlopAwareSplit",
    "NoSplit",
    "PublishedModeDSplit",
    "Split",
    "TokenSplit",
    "balanced_attention_tokens",
]
