"""Values that cannot be: one sentence naming the key, before anything starts."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from flowhn.config import compose, groups, to_dict
from flowhn.config_checks import CHECKS
from flowhn.errors import UserError

BAD = [
    "lr=abc",
    "lr=null",
    "lr=[1]",
    "lr=0",
    "lr=-1",
    "lr=.inf",
    "optimizer.weight_decay=abc",
    "optimizer.betas=0.9",
    "optimizer.betas=[0.9]",
    "optimizer.betas=[0.9,1.0]",
    "schedule.warmup_fraction=abc",
    "schedule.warmup_fraction=2",
    "schedule=null",
    "seed=abc",
    "seed='3'",
    "seed=-1",
    "seed=1.5",
    "seed=null",
    "seed=true",
    "seq_len=abc",
    "seq_len='64'",
    "seq_len=64.5",
    "seq_len=null",
    "seq_len=0",
    "vocab_size='300'",
    "vocab_size=abc",
    "vocab_size=null",
    "vocab_size=299.5",
    "tokens=abc",
    "tokens='1024'",
    "tokens=-1",
    "val_rows='4'",
    "val_rows=abc",
    "val_points='2'",
    "val_points=abc",
    "val_points=null",
    "clip_grad_norm=abc",
    "clip_grad_norm='1.0'",
    "clip_grad_norm=-1",
    "trainer.log_every='1'",
    "trainer.log_every=abc",
    "trainer.log_every=0",
    "trainer.checkpoint.keep='2'",
    "trainer.checkpoint.keep=0",
    "trainer.checkpoint.seconds=abc",
    "trainer.checkpoint.every_n_steps=0",
    "trainer.checkpoint.every_n_steps=abc",
    "trainer.throughput.window_steps=abc",
    "trainer.throughput.window_steps=0",
    "trainer.throughput.warmup_steps=-1",
    "trainer.throughput.peak_flops=abc",
    "trainer.deterministic=abc",
    "trainer.progress_bar=abc",
    "trainer.devices=0",
    "trainer.devices=abc",
    "trainer.devices=1.5",
    "trainer.num_nodes=0",
    "debug=abc",
    "compile=perhaps",
    "output_dir=null",
    "cache_dir=null",
    "output_dir=''",
    "cell=../../x",
    "cell=a/b",
    "global_batch_tokens=0",
    "global_batch_tokens=abc",
    "micro_batch_size=0",
    "eval.limit=0",
    "eval.tasks=docs",
    "size.n_heads='4'",
    "size.n_heads=-4",
    "size.n_kv_heads=abc",
    "size.d_model=80.5",
    "size.d_ff.llama='96'",
    "size.d_ff.llama=-5",
    "size.n_layers.llama=0",
    "size.hymba.sliding_window=abc",
    "size.hymba.n_meta_tokens=-1",
    "size.mamba2.d_state=abc",
    "data.loss_on_padding=abc",
    "size=null",
    "optimizer=null",
    "trainer=null",
    "trainer=1",
    "~seed",
]


@pytest.mark.parametrize("override", BAD)
def test_bad_values_are_one_sentence(override):
    with pytest.raises(UserError) as raised:
        compose("train", [override, *(["data=random"] if override.startswith("data.") else [])])
    said = str(raised.value)
    assert "\n" not in said
    assert override.lstrip("~").partition("=")[0].split(".")[-1] in said


@pytest.mark.parametrize("size", groups()["size"])
@pytest.mark.parametrize("model", groups()["model"])
def test_what_we_ship_passes(size, model):
    compose("train", [f"size={size}", f"model={model}"])


def test_every_check_belongs_to_a_key_that_exists():
    def keys(node, prefix=""):
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")

    known = set()
    for data in groups()["data"]:
        known |= set(keys(to_dict(compose("train", [f"data={data}", *["data.path=x"] * (data == "files")]))))
    for suite in groups()["eval"]:
        known |= set(keys(to_dict(compose("train", [f"eval={suite}"]))))
    assert [pattern for pattern in CHECKS if not any(fnmatch(key, pattern) for key in known)] == []


@pytest.mark.parametrize(
    "word", ["seq_len=x", "windows=0", "steps_per_window=many", "warmup_steps=-1", "profile=1", "seed=null"]
)
def test_values_of_the_benchmark_are_checked(word):
    with pytest.raises(UserError, match=word.partition("=")[0]):
        compose("bench", [word])
