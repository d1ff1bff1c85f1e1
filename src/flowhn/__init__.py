"""flowhn: a PyTorch Lightning reproduction of FlowHN, the parallel hybrid of attention and Mamba (arXiv 2505.19472)."""

from __future__ import annotations

import os
from typing import Any

# Before torch is first imported: OpenMP threads that spin while they wait make a busy 2-core machine up to 40 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(folder: Any, *, device: Any = "cpu", trust: bool = False) -> Any:
    """The network of a finished run's folder, with its weights, in eval mode (a :class:`flowhn.models.CausalLM`).

    ``trust`` also builds classes from outside flowhn that the run's config names.

    Raises:
        UserError: see :func:`flowhn.loading.load_run`.
    """
    from flowhn.loading import load_run  # torch takes seconds to import; `import flowhn` must not

    return load_run(folder, device=device, trust=trust).model
