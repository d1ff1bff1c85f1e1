"""The paper's claims on accuracy and speed as data; :mod:`flowhn.reporting.verdicts` judges them."""

from __future__ import annotations

from dataclasses import dataclass

from flowhn.reporting import paper


@dataclass(frozen=True)
class Claim:
    """``first`` beats each of ``seconds`` (``best``: all other models) in ``quantity``: average, tps or mfu.

    ``factor`` is the claimed ratio, None where the paper only says more. ``sizes`` are those the paper claims it for;
    other sizes are judged too and say so.
    """

    id: str
    sentence: str
    first: str
    seconds: tuple[str, ...]
    quantity: str
    source: str
    factor: float | None = None
    sizes: tuple[str, ...] = paper.SIZES


ALL = "best"  # of the models, whichever it is
CLAIMS = (
    Claim("no_split_best", "No_Split has the best average accuracy.", "flowhn_no", (ALL,), "average", "table 1"),
    Claim("fac_over_ae_fa", "FAC_Split beats AE_Split and FA_Split in accuracy.", "flowhn_fac",
          ("flowhn_ae", "flowhn_fa"), "average", "table 1"),
    Claim("fac_over_hybrids", "FAC_Split beats the sequential hybrids and Hymba in accuracy.", "flowhn_fac",
          ("jamba", "shm", "hymba"), "average", "abstract"),
    Claim("no_over_hybrids", "No_Split beats the sequential hybrids and Hymba in accuracy.", "flowhn_no",
          ("jamba", "shm", "hymba"), "average", "table 1"),
    Claim("no_over_fac", "No_Split beats FAC_Split in accuracy: the price of the split.", "flowhn_no", ("flowhn_fac",),
          "average", "table 1"),
    Claim("fac_fastest", "FAC_Split has the most tokens/s of all models.", "flowhn_fac", (ALL,), "tps", "table 1",
          sizes=("135m", "350m")),
    Claim("fac_best_mfu", "FAC_Split has the highest MFU of all models.", "flowhn_fac", (ALL,), "mfu",
          "table 1", sizes=("135m", "1b")),
    Claim("fac_over_hymba_tps", "FAC_Split has 3.7 times Hymba's tokens/s.", "flowhn_fac", ("hymba",), "tps",
          "figure 4, 135M", factor=3.7, sizes=("135m",)),
    Claim("fac_over_mamba2_tps", "FAC_Split has up to 4 times Mamba-2's tokens/s.", "flowhn_fac", ("mamba2",), "tps",
          "abstract; figure 4, 1B", factor=4.0, sizes=("1b",)),
    Claim("fac_over_mamba2_mfu", "FAC_Split has up to 2 times Mamba-2's MFU.", "flowhn_fac", ("mamba2",), "mfu",
          "abstract; figure 4, 1B", factor=2.0, sizes=("1b",)),
    Claim("ae_over_no_tps", "AE_Split is faster than No_Split.", "flowhn_ae", ("flowhn_no",), "tps", "table 1"),
    Claim("fa_over_no_tps", "FA_Split is faster than No_Split.", "flowhn_fa", ("flowhn_no",), "tps", "table 1"),
    Claim("fac_over_no_tps", "FAC_Split is faster than No_Split.", "flowhn_fac", ("flowhn_no",), "tps", "table 1"),
)  # fmt: skip
