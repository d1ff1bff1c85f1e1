"""The LightningModule: loss, optimiser, schedule; the batch plan, hardware choices and the loop's outer behaviour."""

from __future__ import annotations

import csv
import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from flowhn.errors import UserError
from flowhn.training import (
    Hardware,
    LitLM,
    batch_plan,
    fit,
    resolve_hardware,
    seed_everything,
    token_loss,
    validation_steps,
)
from flowhn.training.optim import build_optimizer, build_schedule, lr_factor, parameter_groups

CPU = Hardware(torch.device("cpu"), 1, "32-true", False)
VOCAB, SEQ, BATCH, STEPS = 16, 8, 4, 30


class Bigram(nn.Module):
    """Learns the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, VOCAB, bias=False)

    def body(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)

    def flops(self, n_tokens: int) -> int:
        return 1000 * n_tokens


class Cycle(LightningDataModule):
    """Token t is followed by t + 1; some labels are left out."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.steps, self.start = steps, 0

    def set_start(self, samples_seen: int) -> None:
        self.start = samples_seen

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.start, self.steps * BATCH), batch_size=BATCH, collate_fn=self.batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(5), batch_size=2, collate_fn=self.batch)

    @staticmethod
    def batch(samples: list[int]) -> dict[str, torch.Tensor]:
        rows = (torch.tensor(samples)[:, None] + torch.arange(SEQ + 1)) % VOCAB
        labels = rows[:, 1:].clone()
        for row, sample in enumerate(samples):
            labels[row, : sample % 4] = -100
        return {"input_ids": rows[:, :-1], "labels": labels}


def lit(lr: float = 3e-2, steps: int = STEPS, **options) -> LitLM:
    return LitLM(net=Bigram(), optimizer={"lr": lr}, schedule={"total_steps": steps}, **options)


def train(module: LitLM, folder: Path, *, data: LightningDataModule | None = None, steps: int = STEPS, **options):
    arguments = {"hardware": CPU, "trainer_cfg": {"throughput": {"peak_flops": 1e12}}, "tokens_per_step": BATCH * SEQ}
    return fit(
        module,
        data or Cycle(steps),
        **{**arguments, "total_steps": steps, "seq_len": SEQ, "run_dir": folder, **options},
    )


# --- loss ---


def test_token_loss_is_the_mean_over_counted_labels():
    hidden, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(VOCAB, 8, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    probabilities = (hidden @ weight.T).log_softmax(-1)
    expected = -torch.stack(
        [probabilities[0, 0, 1], probabilities[0, 2, 2], probabilities[1, 0, 3], probabilities[1, 1, 4]]
    )
    assert torch.allclose(token_loss(hidden, weight, None, labels), expected.mean())


def test_loss_is_fp32_on_bf16_logits():
    hidden, weight = torch.randn(1, 2, 8).bfloat16(), torch.randn(VOCAB, 8).bfloat16()
    loss = token_loss(hidden, weight, None, torch.tensor([[1, 2]]))
    assert loss.dtype == torch.float32
    logits = F.linear(hidden, weight).float()
    assert torch.allclose(loss, F.cross_entropy(logits[0], torch.tensor([1, 2])))


def test_validation_loss_is_token_weighted_and_chunks_do_not_matter(monkeypatch):
    module, batches = lit(), [Cycle.batch([0, 3]), Cycle.batch([1])]
    monkeypatch.setattr("flowhn.training.lit_lm._EVAL_CHUNK_TOKENS", SEQ)  # one row at a time
    module.on_validation_epoch_start()
    total, count = 0.0, 0
    with torch.no_grad():
        for index, batch in enumerate(batches):
            module.validation_step(batch, index)
            logits = module.net.lm_head(module.net.body(batch["input_ids"])).flatten(0, 1)
            total += float(F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum"))
            count += int((batch["labels"] != -100).sum())
    assert module.validation_loss() == pytest.approx(total / count, rel=1e-6)


def test_validation_tolerates_a_batch_without_labels_but_shows_nan():
    module, batch = lit(), Cycle.batch([0, 1])
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    expected = module.validation_loss()
    module.validation_step(empty, 1)
    assert module.validation_loss() == expected
    module.net.lm_head.weight.data[0, 0] = float("nan")
    module.validation_step(batch, 2)
    assert math.isnan(module.validation_loss())


# --- optimiser and schedule ---


def test_decay_groups():
    net = Bigram()
    net.layers[0].weight._no_weight_decay = True
    groups = {name: group for group in parameter_groups(net, 0.1) for name, p in net.named_parameters()
              if any(p is q for q in group["params"])}  # fmt: skip
    decayed = {name for name, group in groups.items() if group["weight_decay"] > 0}
    assert decayed == {"embedding.weight", "layers.1.weight", "lm_head.weight"}
    assert set(groups) == {name for name, _ in net.named_parameters()}


def test_tied_parameters_are_optimised_once():
    net = Bigram()
    net.lm_head.weight = net.embedding.weight
    ids = [id(p) for group in parameter_groups(net, 0.1) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"name": "sgd"}, "optimizer.name"),
        ({"lr": 0}, "lr="),
        ({"lr": float("nan")}, "lr="),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"momentum": 0.9}, "optimizer.momentum"),
    ],
)
def test_bad_optimizer_names_its_key(config, key):
    with pytest.raises(UserError, match=key):
        build_optimizer(Bigram(), config)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"total_steps": 0}, "budget"),
        ({"total_steps": 5, "warmup_fraction": 2}, "warmup_fraction"),
        ({"warmup": 1}, "warmup"),
    ],
)
def test_bad_schedule_names_its_key(config, key):
    with pytest.raises(UserError, match=key):
        build_schedule(build_optimizer(Bigram(), {}), config)


def test_schedule_warms_up_and_falls_to_the_floor():
    values = [lr_factor(step, total_steps=100, warmup_steps=10, min_lr_ratio=0.1) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)


# --- batch plan ---


@given(micro=st.integers(1, 8), accumulate=st.integers(1, 8), devices=st.integers(1, 8), seq_len=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_batch_plan_keeps_the_global_batch(micro, accumulate, devices, seq_len):
    tokens = micro * accumulate * devices * seq_len
    assert batch_plan(global_batch_tokens=tokens, seq_len=seq_len, micro_batch_size=micro, n_devices=devices) == (
        micro,
        accumulate,
    )
    assert batch_plan(global_batch_tokens=tokens, seq_len=seq_len, n_devices=devices) == (micro * accumulate, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_tokens": 1000, "seq_len": 128}, ["global_batch_tokens", "seq_len", "use 1024"]),
        ({"global_batch_tokens": 64, "seq_len": 128}, ["global_batch_tokens", "use 128"]),
        ({"global_batch_tokens": 384, "seq_len": 128, "n_devices": 2}, ["devices", "256"]),
        ({"global_batch_tokens": 1024, "seq_len": 128, "micro_batch_size": 3}, ["micro_batch_size", "use 2"]),
        ({"global_batch_tokens": 1024, "seq_len": 128, "micro_batch_size": 16}, ["micro_batch_size", "use 8"]),
        ({"global_batch_tokens": 1024, "seq_len": 128, "micro_batch_size": 0}, ["micro_batch_size=0"]),
        ({"global_batch_tokens": -1, "seq_len": 128}, ["global_batch_tokens=-1"]),
    ],
)
def test_batch_that_does_not_divide_names_keys_and_mend(options, words):
    with pytest.raises(UserError) as error:
        batch_plan(**options)
    assert all(word in str(error.value) for word in words), error.value


@given(total=st.integers(1, 500), points=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_validation_steps_end_with_the_run(total, points):
    steps = validation_steps(total, points)
    assert steps[-1] == total
    assert steps[0] >= 1
    assert len(steps) == min(points, total) or total < 2 * points


def test_no_validation_points():
    assert validation_steps(10, 0) == ()


# --- hardware ---


def test_auto_hardware_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        resolve_hardware({"device": "auto", "precision": "auto", "compile": "auto", "trainer": {"devices": 1}}) == CPU
    )


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"device": "cuda"}, "device=cuda"),
        ({"device": "mps"}, "device=mps"),
        ({"device": "tpu"}, "device=tpu"),
        ({"precision": "fp8"}, "precision=fp8"),
        ({"compile": "yes"}, "compile=yes"),
        ({"trainer": {"devices": 0}}, "trainer.devices=0"),
        ({"trainer": {"devices": "two"}}, "trainer.devices=two"),
        ({"trainer": {"num_nodes": 0}}, "trainer.num_nodes=0"),
    ],
)
def test_bad_hardware_names_its_key(monkeypatch, config, key):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=key):
        resolve_hardware(config)


# --- fit ---


def test_training_learns_and_reports(tmp_path):
    seed_everything(0)
    shown = []
    result = train(lit(), tmp_path, val_steps=(15, 30), on_progress=lambda *state: shown.append(state))
    losses = [loss for _, loss in result.curves["train"]]
    assert losses[0] > 2.0 > 1.0 > losses[-1]
    assert len(losses) == STEPS  # every step on the CPU
    seconds = [point[2] for point in result.curves["val"]]
    assert 0 < seconds[0] < seconds[1] <= result.train_seconds < result.wall_seconds
    assert shown[-1][:2] == (STEPS, STEPS)
    assert shown[-1][3] == losses[-1]


def test_train_points_are_means_over_their_steps(tmp_path):
    seed_everything(0)
    each = train(lit(), tmp_path / "a").curves["train"]
    seed_everything(0)
    points = train(lit(), tmp_path / "b", trainer_cfg={"log_every": 7}).curves["train"]
    assert [tokens for tokens, _ in points] == [step * BATCH * SEQ for step in (7, 14, 21, 28, 30)]
    for start, stop, (_, loss) in zip((0, 7, 14, 21, 28), (7, 14, 21, 28, 30), points, strict=True):
        assert loss == pytest.approx(sum(value for _, value in each[start:stop]) / (stop - start))


def test_gradients_are_clipped_for_the_fused_optimizer(tmp_path):
    module = lit(lr=1e-30)
    norms = []
    module.on_before_optimizer_step = lambda optimizer: None
    clip = module.configure_gradient_clipping

    def spy(*args, **kwargs):
        clip(*args, **kwargs)
        norms.append(float(torch.stack([p.grad.norm() for p in module.net.parameters()]).norm()))

    module.configure_gradient_clipping = spy
    train(module, tmp_path, steps=3, clip_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)
    assert module.optimizers().optimizer.defaults["fused"]


def test_accumulation_gives_the_same_step(tmp_path):
    """Half the micro-batch twice: the same losses and weights up to rounding (equal label counts in both halves)."""

    class Halves(Cycle):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(range(self.start, self.steps * BATCH), batch_size=BATCH // 2, collate_fn=self.batch)

        @staticmethod
        def batch(samples: list[int]) -> dict[str, torch.Tensor]:
            batch = Cycle.batch(samples)
            return {"input_ids": batch["input_ids"], "labels": (batch["input_ids"] + 1) % VOCAB}

    class Whole(Halves):
        train_dataloader = Cycle.train_dataloader

    seed_everything(0)
    whole = lit()
    first = train(whole, tmp_path / "a", data=Whole())
    seed_everything(0)
    halves = lit()
    second = train(halves, tmp_path / "b", data=Halves(), accumulate=2)
    assert len(first.curves["train"]) == len(second.curves["train"]) == STEPS
    for (_, a), (_, b) in zip(first.curves["train"], second.curves["train"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_csv_logger_has_the_whole_curve_after_a_resume(tmp_path):
    def logger():
        return CSVLogger(str(tmp_path), name="", version="")

    class Stop(Exception):
        pass

    class Broken(Cycle):
        @staticmethod
        def batch(samples):
            if samples[0] == 20 * BATCH:
                raise Stop
            return Cycle.batch(samples)

    options = {"trainer_cfg": {"checkpoint": {"every_n_steps": 6}}, "val_steps": (5, 30)}
    with pytest.raises(Stop):
        train(lit(), tmp_path, data=Broken(), loggers=[logger()], **options)
    train(lit(), tmp_path, loggers=[logger()], **options)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [5, 30]


def test_with_padding_the_cut_into_micro_batches_does_not_change_the_gradient():
    labels = torch.randint(VOCAB, (8, SEQ))
    labels[:3, 2:] = -100
    labels[5] = -100  # a row without any label that counts
    batch = {"input_ids": torch.randint(VOCAB, (8, SEQ)), "labels": labels}
    per_row = float((labels != -100).sum()) / 8
    seed_everything(0)
    module = LitLM(net=Bigram(), optimizer={}, schedule={}, labels_per_row=per_row)
    gradients = []
    for size in (8, 4, 1):
        module.zero_grad()
        for start in range(0, 8, size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            (module.training_step(part, 0)["loss"] * size / 8).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    plain = LitLM(net=module.net, optimizer={}, schedule={})
    plain.zero_grad()
    plain.training_step(batch, 0)["loss"].backward()
    gradients.append(torch.cat([parameter.grad.flatten() for parameter in plain.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_fit_is_quiet(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(lit(), tmp_path, val_steps=(30,))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not [str(w.message) for w in caught if "lightning" in str(w.filename)]


def test_out_of_memory_names_the_key(tmp_path, monkeypatch):
    module = lit()

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module.net, "body", exhausted)
    with pytest.raises(UserError, match="micro_batch_size"):
        train(module, tmp_path)


def test_compiling_keeps_the_state_dict_names(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module = lit(compile=True)
    names = list(module.state_dict())
    module.configure_model()
    module.configure_model()  # once only
    assert [block for block, _ in compiled] == list(module.net.layers)
    assert all(options == {"dynamic": False} for _, options in compiled)
    assert list(module.state_dict()) == names
    assert torch._dynamo.config.recompile_limit >= 16


@pytest.mark.slow
def test_compiled_training_equals_eager(tmp_path):
    seed_everything(0)
    eager = train(lit(), tmp_path / "a", val_steps=(30,))
    seed_everything(0)
    compiled = train(lit(compile=True), tmp_path / "b", val_steps=(30,))
    for (_, a), (_, b) in zip(eager.curves["train"], compiled.curves["train"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
