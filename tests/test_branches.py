"""Both branches before the fusion: what is measured is what a computation by hand gives; routing and reachability."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flowhn import reproduce
from flowhn.config import build_model, compose, to_dict
from flowhn.errors import UserError
from flowhn.evaluation.branches import linear_cka, loss_by_position, measure_branches
from flowhn.reporting import routing
from flowhn.reporting.branches import (
    branches_figure,
    branches_table,
    find_measurements,
    read_measurement,
    write_branches,
    write_measurement,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["size.d_model=16", "size.n_heads=2", "size.n_kv_heads=1", "size.vocab_size=32", "size.d_ff.flowhn=16"]


def small_model(*words: str, n_layers: int = 2):
    torch.manual_seed(0)
    words = ["model=flowhn", *SMALL, f"size.n_layers.flowhn={n_layers}", "data=random", "eval=none", *words]
    model = build_model(to_dict(compose("train", words)))
    with torch.no_grad():  # away from the small weights of the initialisation, where updates are all but nothing
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def batch(n_rows: int = 3, n_tokens: int = 12):
    rows = torch.randint(0, 32, (n_rows, n_tokens + 1), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("split", ["no", "fa", "fac"])
def test_sizes_and_gradients_are_those_of_a_computation_by_hand(split):
    model, (ids, labels) = small_model(f"split={split}", n_layers=1), batch()
    found = measure_branches(model, ids, labels)
    block, x = model.layers[0], model.embedding(ids).detach()
    routes = block.token_split(ids.shape[1])
    own = {"attention": routes.gather_attn(x), "ssm": routes.gather_ssm(x)}
    given = {name: getattr(block, name)(own[name])[0].detach().requires_grad_() for name in own}
    h = x + block.fusion(given["attention"], given["ssm"], routes)
    h = h + block.proj(block.norm(h))
    loss = F.cross_entropy(model.lm_head(model.norm(h)).flatten(0, 1), labels.flatten())
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, y in given.items():
        told = found["blocks"][0][name]
        assert told["tokens"] == y.shape[1]
        assert told["input_rms"] == pytest.approx(own[name].square().mean().sqrt().item(), rel=1e-5)
        assert told["output_rms"] == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)
        assert told["update_rms"] == pytest.approx((y - own[name]).square().mean().sqrt().item(), rel=1e-5)
        assert told["output_gradient_rms"] == pytest.approx(y.grad.square().mean().sqrt().item(), rel=1e-4)
    if split == "no":
        cosine = F.cosine_similarity(given["attention"] - x, given["ssm"] - x, dim=-1).mean().item()
        assert found["blocks"][0]["similarity"]["cosine_update"] == pytest.approx(cosine, rel=1e-4)
        assert found["blocks"][0]["similarity"]["runs_in_model"]


def test_behind_a_short_convolution_its_output_is_what_the_branches_get():
    model, (ids, labels) = small_model("split=fac", "model.blocks.parallel.short_conv=4"), batch()
    for layer in model.layers:
        torch.nn.init.normal_(layer.short_conv.conv1d.weight)
    came: list[torch.Tensor] = []
    for layer in model.layers:
        layer.ssm.register_forward_pre_hook(lambda module, args: came.append(args[0].detach()))
    blocks = measure_branches(model, ids, labels)["blocks"]
    for entry, x in zip(
        blocks, came, strict=False
    ):  # the first calls are the model's own, later ones compare all tokens
        assert entry["ssm"]["input_rms"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)


def test_parameter_gradients_are_the_branchs_own_and_none_are_left_behind():
    model, (ids, labels) = small_model("split=ae"), batch()
    found = measure_branches(model, ids, labels)
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
    for block, told in zip(model.layers, found["blocks"], strict=True):
        for name in ("attention", "ssm"):
            norm = torch.cat([p.grad.flatten() for p in getattr(block, name).parameters()]).norm().item()
            assert told[name]["parameter_gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_coordinated_gradients_arrive_with_equal_size():
    ids, labels = batch()
    plain = measure_branches(small_model("split=no"), ids, labels)["blocks"][1]
    even = measure_branches(small_model("split=no", "fusion.coordinate_gradients=true"), ids, labels)["blocks"][1]
    ratios = [
        block["attention"]["output_gradient_rms"] / block["ssm"]["output_gradient_rms"] for block in (plain, even)
    ]
    assert abs(ratios[0] - 1) > 0.01
    assert ratios[1] == pytest.approx(1, rel=1e-5)


def test_keys_of_all_tokens_and_a_branch_without_tokens_can_be_measured():
    ids, labels = batch()
    every = measure_branches(small_model("split=fac", "split.keys=all"), ids, labels)
    assert every["blocks"][0]["attention"]["tokens"] + every["blocks"][0]["ssm"]["tokens"] == 12
    empty = measure_branches(small_model("split=fa", "split.ratio=0.0"), ids, labels)["blocks"][0]["attention"]
    assert (empty["tokens"], empty["output_rms"], empty["output_gradient_rms"]) == (0, None, None)


def test_a_model_without_branches_is_one_sentence():
    ids, labels = batch()
    model = build_model(to_dict(compose("train", ["model=llama", "data=random", "eval=none"])))
    with pytest.raises(UserError, match="no two branches"):
        measure_branches(model, ids, labels)


def test_cka_is_that_of_the_kernels_and_blind_to_rotation_and_scale():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=random), torch.randn(40, 5, generator=random)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.trace(a.double() @ a.double().T @ centre @ b.double() @ b.double().T @ centre)

    assert linear_cka(x, y) == pytest.approx((hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item(), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=random))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, y) < 0.5


def test_loss_by_position_averages_to_the_loss():
    model, (ids, labels) = small_model("split=fa"), batch(n_rows=5)
    found = loss_by_position(model, [(ids[:3], labels[:3]), (ids[3:], labels[3:])], n_bins=5)
    assert found["edges"] == [0, 2, 4, 7, 9, 12]
    widths = np.diff(found["edges"])
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).item()
    assert (np.array(found["losses"]) @ widths / 12).mean() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("words", [["split=no"], ["split=ae"], ["split=fa"], ["split=fac"], ["split=fac", "split.window=5"],
                                   ["split=fa", "split.keys=all"], ["split=fac", "split.keys=all"]], ids="-".join)  # fmt: skip
def test_reach_is_where_the_models_gradients_are_not_zero(words):
    model, n_tokens = small_model(*words, n_layers=3), 11
    blocks = list(model.layers)
    found = routing.reach(
        [block.token_split(n_tokens) for block in blocks], attention_sees_all="split.keys=all" in words
    )
    x = torch.randn(1, n_tokens, 16, generator=torch.Generator().manual_seed(2)).double()
    model.double()
    for number in range(1, 4):

        def through(x: torch.Tensor, blocks=tuple(blocks[:number])) -> torch.Tensor:
            for block in blocks:
                x, _ = block(x)
            return x[0].sum(dim=-1)

        jacobian = torch.autograd.functional.jacobian(through, x)[:, 0].abs().sum(dim=-1)  # (T, T)
        assert ((jacobian > 1e-12).numpy() == found[number - 1]).all(), number


def test_what_the_splits_can_see_at_the_papers_sizes():
    routes = {}
    for split in ("no", "ae", "fa", "fac"):
        with torch.device("meta"):
            model = build_model(to_dict(compose("train", ["model=flowhn", f"split={split}", "size=350m"])))
        routes[f"flowhn_{split}"] = [layer.token_split(64) for layer in model.layers]
    last = routing.reach_table(routes).groupby("cell")["last"].last()
    assert last["flowhn_no"] == last["flowhn_fac"] == 100
    assert last["flowhn_ae"] == pytest.approx(100 * 31 / 63)
    shares = routing.share_seen(routing.reach(routes["flowhn_ae"])[-1])
    assert shares[0] == shares[31] == 1
    assert shares[32] == 0, "the first token of the second half sees nothing before it, at any depth"
    figure = routing.routing_figure(routes)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["No_Split", "AE_Split", "FA_Split", "FAC_Split"]
    assert len(routing.reach_figure(routes).axes) == 4 * 6
    assert len(routing.reach_over_blocks_figure(routing.reach_table(routes)).axes[0].lines) == 4


def test_differences_of_losses_are_paired():
    first = {"edges": [0, 2, 4], "losses": [[3.0, 1.0], [5.0, 2.0], [4.0, 3.0]]}
    second = {"edges": [0, 2, 4], "losses": [[2.0, 1.0], [4.0, 2.0], [3.0, 3.0]]}
    frame = routing.loss_difference(first, second)
    assert list(frame.difference) == [1, 0]
    assert list(frame.stderr) == [0, 0]
    with pytest.raises(ValueError, match="same sequences"):
        routing.loss_difference(first, second | {"losses": second["losses"][:2]})


def test_reproduce_branches_measures_once_and_writes_its_folder(tmp_path, capsys):
    words = ["branches", "models=[flowhn_fac]", "budget=1024", "data=random", "data.n_rows=16", "data.n_val_rows=4",
             "eval=none", "val_points=1", "val_rows=2", "trainer=cpu", "logger=none"]  # fmt: skip
    words += [f"output_dir={tmp_path}/out", f"cache_dir={tmp_path}/cache"]
    assert reproduce._main(words) == 0
    folder = tmp_path / "out" / "branches" / "tiny-random-1024"
    assert "gradient attention / SSM" in capsys.readouterr().out
    assert {"table.md", "table.csv", "branches.png", "measurements", "command.txt"} == {
        path.name for path in folder.iterdir()
    }
    record = read_measurement(folder / "measurements" / "flowhn_fac-s0.json")
    assert record["training"]["tokens"] == 1024
    assert len(record["blocks"]) == 3
    assert len(record["loss_by_position"]["losses"]) == 4
    times = {path: path.stat().st_mtime_ns for path in (folder / "measurements").iterdir()}
    assert reproduce._main(words) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "measurements").iterdir()}


def committed() -> list[Path]:
    return [path.parent for path in (ROOT / "experiments" / "branches").glob("*/measurements")]


def test_the_committed_tables_are_those_of_the_committed_measurements(tmp_path):
    assert committed()
    for folder in committed():
        records = find_measurements(folder / "measurements")
        title = (folder / "table.md").read_text().splitlines()[0].removeprefix("# ")
        write_branches(records, tmp_path, title=title)
        for name in ("table.md", "table.csv"):
            assert (tmp_path / name).read_text() == (folder / name).read_text(), f"{folder / name} is not up to date"
        assert len(branches_table(records)) == sum(len(record["blocks"]) for record in records)
        assert [axis.get_ylabel() for axis in branches_figure(records).axes][2] == "Similarity of updates"


def test_an_edited_measurement_is_refused(tmp_path):
    path = write_measurement(tmp_path, {"cell": "flowhn_fac", "seed": 0, "loss": 5.0})
    assert read_measurement(path)["loss"] == 5.0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 4.0}))
    with pytest.raises(UserError, match="was edited"):
        read_measurement(path)
    with pytest.raises(UserError, match="no measurement"):
        branches_figure([])
