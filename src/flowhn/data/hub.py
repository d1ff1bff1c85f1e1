"""One quick question to the Hugging Face hub before anything long is started."""

from __future__ import annotations

import os

from flowhn.errors import UserError

TIMEOUT_SECONDS = 10


def require_hub(repo: str, kind: str) -> None:
    """Make sure that a hub repository can be reached, in one request without retries.

    Args:
        repo: owner and name.
        kind: ``dataset`` or ``model``.

    Raises:
        UserError: there is no network, the hub is switched off, or the repository is not open to this user.
    """
    from huggingface_hub import HfApi

    option = "data=slimpajama" if kind == "dataset" else f"data.tokenizer={repo}"
    mend = (
        f"on a machine with a network, download {repo} and use data=files data.path=FOLDER data.tokenizer=FOLDER|train"
        if kind == "dataset"
        else "give data.tokenizer=train or the path of a tokenizer.json"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{option} needs the Hugging Face hub, and HF_HUB_OFFLINE is set; unset it, or {mend}")
    try:
        HfApi().repo_info(repo, repo_type=kind, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # network, proxy, certificate, access: each client version has its own classes
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{option} needs the Hugging Face hub, which did not answer ({reason}); {mend}") from error
