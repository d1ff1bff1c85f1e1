"""Lightning data module over prepared rows: one epoch is the whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from lightning import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader

from flowhn.data.prepared import PreparedData
from flowhn.data.sampling import GlobalOrderSampler, SampleOrder
from flowhn.errors import UserError

IGNORED = -100  # the label that torch's cross-entropy leaves out
PADDING_ROW = -1  # index of a row that counts in no loss


class TokenRows(torch.utils.data.Dataset):
    """Rows of a prepared part, read in whole batches.

    Args:
        rows: the memory-mapped part.
        loss_on_padding: whether targets on padding keep their label.
    """

    def __init__(self, rows: Dataset, *, loss_on_padding: bool) -> None:
        self._has_padding = "n_real" in rows.column_names
        self._rows = rows.with_format("arrow")
        self._loss_on_padding = loss_on_padding

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch: ``input_ids`` and ``labels``, both (B, T) long; labels are -100 where there is no loss."""
        table = self._rows[[max(index, 0) for index in indices]]
        flat = table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        rows = torch.from_numpy(flat.astype(np.int64)).view(len(indices), -1)  # (B, T + 1)
        labels = rows[:, 1:].clone()  # (B, T)
        if self._has_padding and not self._loss_on_padding:
            n_real = torch.from_numpy(table["n_real"].to_numpy().astype(np.int64))
            labels[torch.arange(1, rows.shape[1]) >= n_real[:, None]] = IGNORED
        labels[[index == PADDING_ROW for index in indices]] = IGNORED
        return {"input_ids": rows[:, :-1].contiguous(), "labels": labels}


def _as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


class TokenDataModule(LightningDataModule):
    """Batches of a run.

    The training loader serves ``n_train_samples`` rows over all devices, drawn from as many passes over the data as
    that takes, in an order that depends on the seed alone. The trainer must leave the sampler alone
    (``use_distributed_sampler=False``): each device already takes its own share.

    Args:
        prepared: the tokenised data.
        batch_size: rows of a training batch on one device.
        val_batch_size: rows of a validation batch on one device.
        seed: decides the order of training rows.
        n_train_samples: training rows of the whole run, over all devices.
        num_workers: loader processes; 0 reads in the training process.
        val_rows: number of validation rows, spread evenly over the part; null takes all.

    Raises:
        UserError: a size that is not positive.
    """

    def __init__(
        self,
        *,
        prepared: PreparedData,
        batch_size: int,
        val_batch_size: int,
        seed: int,
        n_train_samples: int,
        num_workers: int = 0,
        val_rows: int | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size), ("val_rows", val_rows)):
            if value is not None and value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        row_bytes = 2 * 8 * int(prepared.stats.get("seq_len") or 1)  # ids and labels, 8 bytes each
        if max(batch_size, val_batch_size) * row_bytes > psutil.virtual_memory().total:
            raise UserError(
                f"a batch of {max(batch_size, val_batch_size):,} rows (global_batch_tokens, micro_batch_size) does not fit "
                "into this machine's memory; set a smaller micro_batch_size or global_batch_tokens"
            )
        if num_workers < 0 or seed < 0:
            raise UserError(f"num_workers={num_workers} and seed={seed} must not be negative")
        self.prepared = prepared
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.n_train_samples, self.val_rows = n_train_samples, val_rows
        self.samples_seen = 0

    def set_start(self, samples_seen: int) -> None:
        """Let the next training loader start after this many samples (over all devices), and be shorter by as many.

        Raises:
            UserError: a position outside of the run.
        """
        if not 0 <= samples_seen <= self.n_train_samples:
            raise UserError(f"the run has {self.n_train_samples} samples and cannot go on after {samples_seen}")
        self.samples_seen = samples_seen

    def row_of_sample(self, sample: int) -> int:
        """Row of the training part that global sample number ``sample`` (from 0, over all devices) reads."""
        return SampleOrder(n_rows=len(self.prepared.train), seed=self.seed)[sample]

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of :meth:`TokenRows.__getitems__`, in the run's order."""
        rank, world_size = self._place()
        rows = self.prepared.train
        sampler = GlobalOrderSampler(
            order=SampleOrder(n_rows=len(rows), seed=self.seed),
            n_samples=self.n_train_samples,
            start=self.samples_seen,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(rows, self.batch_size, sampler)

    def val_dataloader(self) -> StatefulDataLoader:
        """The same validation rows in the same order each time; each device reads its share."""
        rank, world_size = self._place()
        rows = self.prepared.val
        count = min(self.val_rows or len(rows), len(rows))
        chosen = [index * len(rows) // count for index in range(count)]
        chosen += [PADDING_ROW] * (-count % world_size)  # every device has as many batches: they wait for each other
        return self._loader(rows, self.val_batch_size, chosen[rank::world_size])

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, rows: Dataset, batch_size: int, sampler: Any) -> StatefulDataLoader:
        return StatefulDataLoader(
            TokenRows(rows, loss_on_padding=self.prepared.loss_on_padding),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
        )
