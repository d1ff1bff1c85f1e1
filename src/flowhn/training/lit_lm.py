"""The LightningModule: a plain network with the next-token loss, its optimiser and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import SumMetric

from flowhn.errors import UserError
from flowhn.training.loss import IGNORE, token_loss, training_loss
from flowhn.training.optim import build_optimizer, build_schedule

_EVAL_CHUNK_TOKENS = 8192  # bounds the validation logits: 8192 x 65,536 x 4 bytes = 2 GiB


class LitLM(LightningModule):
    """Trains a :class:`flowhn.models.CausalLM` (or anything with ``body``, ``lm_head``, ``layers`` and ``flops``).

    Args:
        net: the network; ``net.body(input_ids (B, T)) -> (B, T, D)``.
        optimizer: ``{name: adamw, lr, betas, weight_decay, eps}``, see :mod:`flowhn.training.optim`.
        schedule: ``{warmup_fraction, min_lr_ratio, total_steps}``, in optimiser steps.
        compile: compile every block of ``net.layers`` and the loss with static shapes. Blocks are compiled in place, so
            the names in the state dict do not change. Validation runs eagerly: it would need a second compilation
            of every block, which costs more than the few validation batches.
        labels_per_row: mean number of labels of a row that count, for data whose padding does not. A micro-batch then
            counts by its number of labels and not as much as any other, so that cutting a step into micro-batches
            or over devices does not change it. None: every label counts.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        compile: bool = False,
        labels_per_row: float | None = None,
    ) -> None:
        super().__init__()
        self.labels_per_row = labels_per_row
        self.net = net
        self.optimizer_config = dict(optimizer)
        self.schedule_config = dict(schedule)
        self.compiles = compile
        # Sums over batches and ranks. Not MeanMetric: it drops NaNs, or (told not to) the weights with them.
        self.val_sum = SumMetric(nan_strategy="disable")
        self.val_tokens = SumMetric(nan_strategy="disable")
        self.step_was_skipped: Tensor | None = None  # of the last optimiser step, on the device
        self.skipped_in_a_row: Tensor | None = None  # (), optimiser steps up to the last one, on the device
        self._loss = token_loss
        self._compiled = False
        self._sharded = False
        self._marks: dict[str, dict[str, Any]] = {}  # of a sharded network's parameters

    def configure_model(self) -> None:
        """Compile the blocks, then shard them (trainer=fsdp), once. Lightning calls this before each fit and validation."""
        if self.compiles and not self._compiled:
            self._compile()
        if self._device_mesh is not None and not self._sharded:  # set by Lightning's ModelParallelStrategy
            from flowhn.training.sharded import parameter_marks, shard

            self._marks = parameter_marks(self.net)
            shard(self.net, self._device_mesh["data_parallel"])
            self._sharded = True

    def _compile(self) -> None:
        # What earlier runs of this process compiled counts toward the limits below, and their models are gone.
        torch._dynamo.reset()
        # Blocks of one class share their code object, and FAC's split differs by block: the default of eight
        # specialisations would silently leave the later blocks of a deep model eager.
        limit = 8 + 4 * len(self.net.layers)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        torch._dynamo.config.accumulated_recompile_limit = max(
            torch._dynamo.config.accumulated_recompile_limit, 8 * limit
        )
        for block in self.net.layers:
            block.compile(dynamic=False)
        self._loss = torch.compile(token_loss, dynamic=False)
        self._compiled = True

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        return self.net(input_ids)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss of one micro-batch ``{input_ids (B, T), labels (B, T)}``."""
        hidden = self.net.body(batch["input_ids"])  # (B, T, D)
        head = self.net.lm_head
        loss = training_loss(hidden, head.weight, getattr(head, "bias", None), batch["labels"], plain=self._loss)
        value = loss.detach()
        if self.labels_per_row is not None:
            counted = (batch["labels"] != IGNORE).sum()
            share = counted / (batch["labels"].shape[0] * self.labels_per_row)
            loss = torch.where(counted > 0, loss * share, torch.zeros_like(loss))  # 0/0 where nothing counts
            value = loss.detach()
        return {"loss": loss, "loss_value": value}

    def on_validation_epoch_start(self) -> None:
        self.val_sum.reset()
        self.val_tokens.reset()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the token-weighted mean loss; the logits are made in bounded pieces."""
        labels = batch["labels"]  # (B, T)
        head = self.net.lm_head
        rows = max(1, _EVAL_CHUNK_TOKENS // max(1, labels.shape[1]))
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            hidden = self.net.body(batch["input_ids"])  # (B, T, D)
            for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
                count = (target != IGNORE).sum()
                loss = token_loss(part, head.weight, getattr(head, "bias", None), target)
                # a piece without any label has a loss of 0/0
                self.val_sum.update(torch.where(count > 0, loss * count, torch.zeros_like(loss)))
                self.val_tokens.update(count)

    def validation_loss(self) -> float:
        """Token-weighted mean over the batches seen since the validation began, over all ranks, in nats per token."""
        return float(self.val_sum.compute() / self.val_tokens.compute())

    def configure_optimizers(self) -> dict[str, Any]:
        if self._sharded:
            from flowhn.training.sharded import mark_parameters

            mark_parameters(self.net, self._marks)
        optimizer = build_optimizer(self.net, self.optimizer_config)
        scheduler = build_schedule(optimizer, self.schedule_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm with torch, and skip the step when it is not finite (as with a loss that is not).

        Lightning's mixed-precision plugin refuses to clip for fused optimisers. On CUDA the fused optimiser is told
        through ``found_inf`` (what a gradient scaler uses), so that nothing waits for the device; elsewhere the
        gradients are taken away, which makes any optimiser skip its parameters.
        """
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded model's (DTensor)
        self.step_was_skipped = ~torch.isfinite(norm)
        before = 0 if self.skipped_in_a_row is None else self.skipped_in_a_row
        self.skipped_in_a_row = self.step_was_skipped * (before + 1)
        if gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if norm.device.type == "cuda" and optimizer.defaults.get("fused"):
            optimizer.found_inf = self.step_was_skipped.float()
        elif self.step_was_skipped:
            for parameter in parameters:
                parameter.grad = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model in one sentence before torch lists every difference.

        Raises:
            UserError: names or shapes differ from this network's.
        """
        if "state_dict" in checkpoint:  # a sharded strategy has compared and loaded them before
            self.check_shapes(checkpoint["state_dict"])

    def check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        """
        Raises:
            UserError: names or shapes differ from this network's.
        """
        mine = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        check_same_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, mine)


def check_same_shapes(
    theirs: Mapping[str, tuple[int, ...]], mine: Mapping[str, tuple[int, ...]], *, what: str = "the checkpoint"
) -> None:
    """
    Args:
        theirs: name -> shape in the checkpoint; ``mine``: in the model.
        what: the checkpoint, as the message calls it.

    Raises:
        UserError: names or shapes differ; it names the first one.
    """
    if mine != theirs:
        name = min(set(mine.items()) ^ set(theirs.items()))[0]
        raise UserError(
            f"{what} belongs to another model ({name} is {theirs.get(name, 'missing')} there and "
            f"{mine.get(name, 'missing')} here); set output_dir= to a new folder or use --force"
        )
