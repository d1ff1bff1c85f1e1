"""The order of training rows: a pure function of the seed and the sample's number in the whole run."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowhn.data import PreparedData, TokenDataModule, prepare
from flowhn.data.datamodule import IGNORED, TokenRows
from flowhn.data.sampling import GlobalOrderSampler, SampleOrder
from flowhn.errors import UserError

ROWS, SAMPLES = 10, 37  # nearly four passes over the data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    spec = {"name": "random", "n_rows": ROWS, "n_val_rows": 7, "seed": 0}
    return prepare(spec, vocab_size=1000, seq_len=8, cache_dir=tmp_path_factory.mktemp("random"))


def module(prepared: PreparedData, **changes) -> TokenDataModule:
    options = {"batch_size": 1, "val_batch_size": 2, "seed": 3, "n_train_samples": SAMPLES, **changes}
    return TokenDataModule(prepared=prepared, **options)


def first_tokens(loader) -> list[int]:
    """The first token of each row served: it tells the row."""
    return [int(token) for batch in loader for token in batch["input_ids"][:, 0]]


def rows_of(*, seed: int = 3, **options) -> list[int]:
    return list(GlobalOrderSampler(order=SampleOrder(n_rows=ROWS, seed=seed), n_samples=SAMPLES, **options))


def test_each_pass_is_another_permutation():
    order = rows_of()
    passes = [order[i : i + ROWS] for i in range(0, 30, ROWS)]
    assert all(sorted(one) == list(range(ROWS)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert order != rows_of(seed=4)
    assert rows_of(seed=0) != rows_of(seed=1)


def test_the_order_is_the_same_in_every_process():
    code = (
        "from flowhn.data.sampling import SampleOrder as S; o = S(n_rows=10, seed=3); print([o[i] for i in range(37)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == str(rows_of())


def test_any_start_serves_the_tail():
    whole = rows_of()
    for start in range(SAMPLES + 1):
        sampler = GlobalOrderSampler(order=SampleOrder(n_rows=ROWS, seed=3), n_samples=SAMPLES, start=start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == SAMPLES - start


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_devices_interleave_to_the_same_order(world_size, start):
    shares = [rows_of(start=start, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    together = [row for step in zip(*shares, strict=True) for row in step]
    assert together == rows_of()[start : start + len(together)]
    assert SAMPLES - start - len(together) < world_size


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("start", [0, 8, 36])
def test_the_loader_starts_anywhere(prepared, num_workers, start):
    whole = first_tokens(module(prepared, batch_size=4).train_dataloader())
    assert len(whole) == SAMPLES
    data = module(prepared, batch_size=4, num_workers=num_workers)
    data.set_start(start)
    loader = data.train_dataloader()
    assert len(loader) == -(-(SAMPLES - start) // 4)
    assert first_tokens(loader) == whole[start:]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_saved_loader_goes_on_where_it_was(prepared, num_workers, stop):
    """Also after ``set_start``: the state is the position in the whole run, so nothing is skipped twice."""
    whole = first_tokens(module(prepared, batch_size=4).train_dataloader())
    loader = module(prepared, batch_size=4, num_workers=num_workers).train_dataloader()
    batches = iter(loader)
    seen = [int(token) for _ in range(stop) for token in next(batches)["input_ids"][:, 0]]
    assert seen == whole[: 4 * stop]
    for start in (0, 4 * stop):
        data = module(prepared, batch_size=4, num_workers=num_workers)
        data.set_start(start)
        resumed = data.train_dataloader()
        resumed.load_state_dict(loader.state_dict())
        assert first_tokens(resumed) == whole[4 * stop :]


def test_batches_are_rows_shifted_by_one(prepared):
    batch = next(iter(module(prepared, batch_size=3).train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    rows = np.array(prepared.train["input_ids"])[rows_of()[:3]]
    np.testing.assert_array_equal(batch["input_ids"], rows[:, :-1])
    np.testing.assert_array_equal(batch["labels"], rows[:, 1:])


def test_validation_is_fixed_and_can_be_shortened(prepared):
    everything = [row["input_ids"][0] for row in prepared.val]
    assert first_tokens(module(prepared).val_dataloader()) == everything
    assert first_tokens(module(prepared, seed=9).val_dataloader()) == everything
    assert first_tokens(module(prepared, val_rows=99).val_dataloader()) == everything
    assert first_tokens(module(prepared, val_rows=3).val_dataloader()) == [everything[i] for i in (0, 2, 4)]


def test_devices_share_the_run(prepared):
    """Each rank of a trainer gets its own rows; together they are the whole order and the whole validation part."""

    class Trainer:
        world_size = 2

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    trains, vals, batches = [], [], []
    for rank in range(2):
        data = module(prepared)
        data.trainer = Trainer(rank)
        trains.append(first_tokens(data.train_dataloader()))
        served = list(data.val_dataloader())
        batches.append(len(served))
        for batch in served:
            counted = (batch["labels"] != -100).any(dim=1)
            vals.append(batch["input_ids"][counted, 0].tolist())
    assert batches[0] == batches[1]  # they wait for each other after every batch
    together = [token for step in zip(*trains, strict=True) for token in step]
    assert together == first_tokens(module(prepared).train_dataloader())[: SAMPLES - 1]
    assert len(prepared.val) % 2 == 1  # one device gets a row that counts in no loss
    assert sorted(token for batch in vals for token in batch) == sorted(row["input_ids"][0] for row in prepared.val)


def test_padding_counts_in_the_loss_unless_told_otherwise():
    from datasets import Dataset, Features, Sequence, Value

    features = Features({"input_ids": Sequence(Value("uint16"), length=5), "n_real": Value("int32")})
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]], "n_real": [3, 5]}, features=features)
    published = TokenRows(rows, loss_on_padding=True).__getitems__([0, 1])
    assert published["labels"].tolist() == [[6, 7, 0, 0], [2, 3, 4, 5]]
    ours = TokenRows(rows, loss_on_padding=False).__getitems__([0, 1])
    assert ours["labels"].tolist() == [[6, 7, IGNORED, IGNORED], [2, 3, 4, 5]]
    assert ours["input_ids"].tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]


def test_sizes_out_of_range(prepared):
    for changes in ({"batch_size": 0}, {"val_rows": 0}, {"num_workers": -1}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(changes))):
            module(prepared, **changes)
    with pytest.raises(UserError, match="cannot go on after 38"):
        module(prepared).set_start(38)
