"""Composition: every YAML composes, and what a user mistypes is answered in one sentence."""

from __future__ import annotations

import pytest

from flowhn.config import compose, config_dir, groups, identity, parse_tokens, to_dict
from flowhn.errors import UserError
from flowhn.runs import plan

NAMED = {"smoke": 6000, "laptop": 200_000, "paper": 10**9}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("smoke", 6000), ("60M", 60_000_000), ("1.5B", 1_500_000_000), ("200k", 200_000), (4096, 4096), ("1e6", 10**6)],
)
def test_budget_is_a_name_or_a_number(text, tokens):
    assert parse_tokens(text, NAMED) == tokens


@pytest.mark.parametrize("text", ["", "huge", "0", "-5", "60X", "M", None])
def test_bad_budget_names_the_key(text):
    with pytest.raises(UserError, match="budget="):
        parse_tokens(text, NAMED)


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g, options in groups().items() if g not in ("artefacts", "bench") for o in options],
)
def test_every_yaml_composes(group, option):
    cfg = compose("train", [f"{group}={option}"])
    assert cfg.choices[group] == option
    to_dict(cfg)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "did you mean seed"),
        ("model=lama", "did you mean llama"),
        ("split=facc", "did you mean fac"),
        ("size=136m", "did you mean 13"),
        ("optimizer.weigth_decay=0.1", "did you mean optimizer.weight_decay"),
        ("budget=lots", "budget=lots"),
        ("nonsense", "nonsense"),
        ("seed=[1", "seed"),
    ],
)
def test_a_mistyped_override_is_one_sentence_with_the_nearest_name(override, said):
    with pytest.raises(UserError) as caught:
        compose("train", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose("train").choices.size == "tiny"
    assert (config_dir() / "train.yaml").is_file()


def test_identity_ignores_where_and_how_it_is_shown():
    def run_id(*overrides):
        return plan(compose("train", list(overrides))).run_id

    assert run_id() == run_id("output_dir=elsewhere", "logger=none", "debug=true", "artefact=table1")
    others = [run_id("seed=1"), run_id("model=llama"), run_id("split=ae"), run_id("budget=1000000"), run_id("lr=0.1")]
    assert len({run_id(), *others}) == 6


def test_a_baseline_does_not_depend_on_the_split():
    assert plan(compose("train", ["model=llama", "split=fa"])).run_id == plan(compose("train", ["model=llama"])).run_id


def test_budget_decides_the_identity_by_its_tokens():
    named = to_dict(compose("train", ["budget=laptop"]))
    number = to_dict(compose("train", [f"budget={named['tokens']}"]))
    assert identity(named) == identity(number)
