"""Numbers that go wrong: skipped steps are counted, three in a row stop the run soon, spikes are marked, logs are bounded."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flowhn.errors import UserError
from flowhn.training import Hardware, LitLM
from flowhn.training.guard import LossGuard, SkipWatch
from test_training import BATCH, CPU, STEPS, Cycle, lit, train


def test_loss_that_is_not_finite_stops_with_one_sentence(tmp_path):
    class Poisoned(Cycle):
        @staticmethod
        def batch(samples):
            if samples[0] == 4 * BATCH:
                module.net.lm_head.weight.data.fill_(float("nan"))
            return Cycle.batch(samples)

    module = lit()
    with pytest.raises(UserError, match=r"not finite in steps 5 to 7 of 30; lower lr="):
        train(module, tmp_path, data=Poisoned(), trainer_cfg={"log_every": 10, "checkpoint": {"every_n_steps": 1}})
    assert not (tmp_path / "checkpoints/step-00000005.ckpt").exists()  # the last good one stays the newest
    assert (tmp_path / "checkpoints/step-00000004.ckpt").exists()
    assert json.loads((tmp_path / "not-finite.json").read_text())["steps"] == [5, 6, 7]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where, tmp_path):
    class Poisoned(LitLM):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            if self.trainer.global_step in (7, 12):  # steps 8 and 13
                if where == "loss":
                    out["loss"] = out["loss"] * float("nan")
                    out["loss_value"] = out["loss"].detach()
                else:
                    out["loss"].register_hook(lambda grad: grad * float("inf"))
            return out

        def on_before_optimizer_step(self, optimizer):
            before[self.trainer.global_step] = self.net.lm_head.weight.detach().clone()

    before: dict[int, torch.Tensor] = {}
    whole = lit()
    module = Poisoned(net=whole.net, optimizer=whole.optimizer_config, schedule=whole.schedule_config)
    result = train(module, tmp_path)
    assert result.curves["skipped_steps"] == [8, 13]
    assert result.steps == STEPS
    assert len(result.curves["train"]) == STEPS - 2
    assert all(math.isfinite(loss) for _, loss in result.curves["train"])
    assert torch.equal(before[7], before[8])  # before step 8 and before step 9
    assert not torch.equal(before[6], before[7])
    assert torch.isfinite(module.net.lm_head.weight).all()


def test_a_resumed_run_remembers_skipped_steps_and_spikes(tmp_path):
    guard = LossGuard(tokens_per_step=10, total_steps=100, folder=tmp_path)
    losses = [5 - 0.01 * step for step in range(40)]
    losses[30], losses[35] = 9.0, math.nan
    for step, loss in enumerate(losses[:33], start=1):
        guard.see(step, loss)
    other = LossGuard(tokens_per_step=10, total_steps=100, folder=tmp_path)
    other.load_state_dict(guard.state_dict())
    for step, loss in enumerate(losses[33:], start=34):
        assert other.see(step, loss) == math.isfinite(loss)
    assert other.spikes == [[310, 9.0]]
    assert other.skipped == [36]


def test_three_skipped_steps_in_a_row_end_the_run_and_name_their_rows(tmp_path):
    guard = LossGuard(tokens_per_step=1, total_steps=9, folder=tmp_path, rows_of_step=lambda step: [step * 10])
    for step, loss in enumerate([1.0, math.inf, math.nan, 1.0, math.nan, math.nan], start=1):
        guard.see(step, loss)
    with pytest.raises(UserError, match="steps 5 to 7 of 9"):
        guard.see(7, math.nan)
    noted = json.loads((tmp_path / "not-finite.json").read_text())
    assert noted == {"steps": [5, 6, 7], "training_rows": {"5": [50], "6": [60], "7": [70]}, "skipped_before": [2, 3]}


def test_only_the_first_of_several_processes_writes_the_rows(tmp_path):
    """All see the same losses and all stop; two that wrote the same temporary file would spoil each other's."""
    for first in (False, True):
        guard = LossGuard(tokens_per_step=1, total_steps=9, folder=tmp_path, rows_of_step=lambda step: [step])
        guard.notes = first
        for step in (1, 2):
            guard.see(step, math.nan)
        with pytest.raises(UserError, match="steps 1 to 3 of 9"):
            guard.see(3, math.nan)
        assert (tmp_path / "not-finite.json").exists() == first


def test_three_skipped_steps_stop_the_run_at_once_though_losses_are_fetched_later(tmp_path):
    class Poisoned(LitLM):
        def training_step(self, batch, batch_idx):
            steps.append(self.trainer.global_step + 1)
            out = super().training_step(batch, batch_idx)
            if steps[-1] in (3, 4, 6, 7, 8):
                out["loss"].register_hook(lambda grad: grad * float("nan"))
            return out

    steps: list[int] = []
    whole = lit()
    module = Poisoned(net=whole.net, optimizer=whole.optimizer_config, schedule=whole.schedule_config)
    with pytest.raises(UserError, match="not finite in steps 6 to 8 of 30"):
        train(module, tmp_path, trainer_cfg={"log_every": 25})
    assert steps[-1] == 8
    assert json.loads((tmp_path / "not-finite.json").read_text())["skipped_before"] == [3, 4]


def test_on_cuda_the_count_is_looked_at_a_few_steps_late_without_waiting(monkeypatch):
    """The copies and their order, with a device that is played here; the test below has a real one."""
    waited: list[int] = []

    class Event:
        made = 0

        def record(self):
            Event.made += 1
            self.number = Event.made

        def synchronize(self):
            waited.append(self.number)

    class OnCuda:
        device = torch.device("cuda")

        def __init__(self, value):
            self.value = torch.tensor(value)

    class Copy:
        def copy_(self, source, non_blocking):
            assert non_blocking
            self.value = source.value

        def __int__(self):
            return int(self.value)

    def empty_like(source, *, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        return Copy()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    watch = SkipWatch()
    seen = [watch.see(OnCuda(count)) for count in (0, 1, 2, 3, 4, 5, 6)]
    assert seen == [False] * 6 + [True]  # the third skipped step is the fourth; it is looked at three steps later
    assert waited == [1, 2, 3, 4]


@pytest.mark.gpu
def test_on_a_gpu_three_skipped_steps_stop_the_run_within_a_few_steps(tmp_path):
    class Poisoned(LitLM):
        def training_step(self, batch, batch_idx):
            steps.append(self.trainer.global_step + 1)
            out = super().training_step(batch, batch_idx)
            if steps[-1] in (6, 7, 8):
                out["loss"].register_hook(lambda grad: grad * float("nan"))
            return out

    steps: list[int] = []
    whole = lit()
    module = Poisoned(net=whole.net, optimizer=whole.optimizer_config, schedule=whole.schedule_config)
    hardware = Hardware(torch.device("cuda"), 1, "32-true", False)
    with pytest.raises(UserError, match="not finite in steps 6 to 8 of 30"):
        train(module, tmp_path, hardware=hardware, trainer_cfg={"log_every": 25})
    assert 8 <= steps[-1] <= 8 + SkipWatch.LAG


def test_a_point_per_step_of_a_long_run_is_bounded(tmp_path):
    from flowhn.reporting.record import MAX_TRAIN_POINTS
    from flowhn.run_disk import curve_points
    from flowhn.training.loop import _log_every

    said: list[str] = []
    hardware = CPU
    assert _log_every(1, MAX_TRAIN_POINTS, hardware, said.append) == 1
    assert not said
    assert _log_every(1, 25_000, hardware, said.append) == 3
    assert "trainer.log_every=1 would give 25,000 points" in said[0]
    assert _log_every(7, 25_000, hardware, said.append) == 7
    for steps in (1, 499, 999, 10_000, 10**7):
        for every in (None, 1, 10):
            assert (
                steps / _log_every(every, steps, hardware, said.append)
                <= curve_points(steps, every)
                <= MAX_TRAIN_POINTS
            )
