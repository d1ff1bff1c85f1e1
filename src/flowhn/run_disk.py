"""How much disk a run takes, told before it begins: an upper end of what lies in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowhn.reporting.record import MAX_TRAIN_POINTS

# Upper ends, over what tensors themselves take. Measured on a model of 51,523 parameters (docs/reliability/long_run.json).
_TENSOR_BYTES = 256  # of a tensor's name, shape and place in a safetensors file
_CHECKPOINT_TENSOR_BYTES = (
    3000  # in a checkpoint: a parameter with its two moments and its step, zip entries and padding
)
_CHECKPOINT_BYTES = 96_000  # generators' states, manifest
_TEXT_BYTES = 64_000  # config.json twice (record.json has it too), balance.json
_POINT_BYTES = 250  # of a point of the curve in metrics.csv, trained.json and record.json, indented
_VOCABULARY_BYTES = 120  # of a token in tokenizer.json, with its merge


def run_bytes(config: Mapping[str, Any], model: Any) -> tuple[float, float]:
    """Bytes of a run's folder at their most, while a checkpoint is written, and when the run is done.

    Args:
        config: the resolved configuration.
        model: the network, on any device (``meta`` will do).

    AdamW's checkpoints hold the weights and two moments; ``trainer.checkpoint.keep`` of them are kept while another is
    written. The logs of Weights & Biases and Lightning's own text logs are not in it.
    """
    item = 8 if config["precision"] == "64-true" else 4
    tensors = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    n = sum(tensors.values())
    steps = math.ceil(config["tokens"] / config["global_batch_tokens"])
    points = curve_points(steps, config["trainer"].get("log_every")) + config["val_points"]
    kept = item * n + len(tensors) * _TENSOR_BYTES + _TEXT_BYTES + points * _POINT_BYTES + steps  # timed windows
    if config["data"]["name"] != "random":
        kept += config["vocab_size"] * _VOCABULARY_BYTES
    checkpoint = 3 * item * n + len(tensors) * _CHECKPOINT_TENSOR_BYTES + _CHECKPOINT_BYTES + points * 40 + steps
    return kept + (config["trainer"]["checkpoint"]["keep"] + 1) * checkpoint, kept


def curve_points(steps: int, log_every: int | None) -> int:
    """Points of the training curve, at most: as trainer.log_every says, within ``MAX_TRAIN_POINTS``."""
    return min(MAX_TRAIN_POINTS, math.ceil(steps / (log_every or max(1, steps // 500))))
