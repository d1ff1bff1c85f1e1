"""``flowhn-eval --val-loss``: the loss of a finished run, again, on the validation rows with which its training ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.errors import UserError

if TYPE_CHECKING:
    from flowhn.experiment import Workshop
    from flowhn.loading import LoadedRun

_BATCH_TOKENS = 8192


def validate(loaded: LoadedRun, *, workshop: Workshop, config: Mapping[str, Any], hardware: Any) -> dict[str, Any]:
    """``loss`` in nats per token, ``rows`` read, and ``data_sha256`` of the data they are from, as in a run's record.

    Where the text in the same place is another one (``data=docs`` under another Python), so would be the tokenizer that is
    trained on it: it is then cut by the run's own, and the loss is one on that text, with another ``data_sha256``.

    Args:
        loaded: the run.
        workshop: prepares the data.
        config: the run's, with ``cache_dir`` of this call.
        hardware: device and precision, see :func:`flowhn.training.resolve_hardware`.

    Raises:
        UserError: the config lacks what training's validation read, or the data cannot be prepared.
    """
    import torch

    from flowhn.data import TokenDataModule
    from flowhn.data.prepared import TOKENIZER_NAMES
    from flowhn.training import LitLM

    if loaded.tokenizer is None and config["data"]["name"] != "random":
        raise UserError(f"{loaded.folder} has no tokenizer to cut the validation text with; restore its tokenizer.json")
    if (lacks := next((key for key in ("seed", "val_rows") if key not in config), None)) is not None:
        raise UserError(f"{loaded.folder} does not tell its {lacks}, which --val-loss needs; export the run again")
    prepared = workshop.prepare(config)
    if _backend(prepared.dir) != _backend(loaded.folder):
        own = next(path for name in TOKENIZER_NAMES if (path := loaded.folder / name).exists())
        prepared = workshop.prepare({**config, "data": {**config["data"], "tokenizer": str(own.absolute())}})
    rows = max(1, _BATCH_TOKENS // config["seq_len"])
    module = TokenDataModule(
        prepared=prepared,
        batch_size=rows,
        val_batch_size=rows,
        seed=config["seed"],
        n_train_samples=rows,
        val_rows=config["val_rows"],
    )
    lit = LitLM(net=loaded.model, optimizer={}, schedule={})
    lit.to(hardware.device)
    half = hardware.precision.partition("-")[0]
    types = {"bf16": torch.bfloat16, "16": torch.float16}
    autocast = torch.autocast(hardware.device.type, dtype=types.get(half), enabled=half in types)
    count = 0
    with torch.inference_mode(), autocast:
        for index, batch in enumerate(module.val_dataloader()):
            lit.validation_step({key: value.to(hardware.device) for key, value in batch.items()}, index)
            count += len(batch["labels"])
    return {"loss": lit.validation_loss(), "rows": count, "data_sha256": prepared.stats.get("sha256")}


def _backend(folder: Path) -> Any:
    """Content of a folder's tokenizer.json, however it is laid out; None where there is none."""
    places = (folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    path = next((path for path in places if path.is_file()), None)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
