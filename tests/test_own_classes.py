"""A split and a fusion of one's own: the files that the README shows, in a folder outside the package, and one word each."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from flowhn import train
from flowhn.config import compose, identity, to_dict
from flowhn.errors import UserError
from flowhn.loading import load_run
from flowhn.models import BranchCost
from flowhn.runs import plan

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["budget=2048", "val_points=1", "val_rows=2", "eval=none"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the README's two files, where a user would run the command."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    for block in blocks:
        lines = [line.removeprefix("  ") for line in block.splitlines()]
        if lines[0].startswith("# my_"):
            (tmp_path / lines[0].removeprefix("# ")).write_text("\n".join(lines) + "\n")
    assert {path.name for path in tmp_path.iterdir()} == {"my_split.py", "my_fusion.py"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    for name in ("my_split", "my_fusion"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("my_split", "my_fusion"):
        sys.modules.pop(name, None)


def test_the_readmes_split_and_fusion_train_and_load(folder, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "own-cache"
    words = ["split=my_split.Stripes", "fusion=my_fusion.Scaled", *SMALL, f"cache_dir={cache}", "output_dir=out"]
    assert train._main(words) == 0
    (path,) = folder.glob("out/runs/flowhn_my_split.Stripes-*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["choices"]["split"] == "my_split.Stripes"
    assert record["config"]["choices"]["fusion"] == "my_fusion.Scaled"
    assert 0 < record["losses"]["final_val"] < 9
    assert set(record["config"]["own_code"]) == {"my_split", "my_fusion"}
    with pytest.raises(UserError, match="trust"):
        load_run(path.parent)
    model = load_run(path.parent, trust=True).model
    assert type(model.layers[0].split).__name__ == "Stripes"
    assert model.layers[0].fusion.scale.item() != 1.0  # it was trained
    ids = torch.randint(2048, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(ids)[:, :40], model(torch.cat([ids[:, :40], ids[:, :24]], 1))[:, :40], atol=1e-5)


def test_the_routing_is_the_files(folder):
    compose("train", ["split=my_split.Stripes"])
    split = sys.modules["my_split"].Stripes()
    cost = BranchCost(lambda n: n, lambda n: n)
    assert split(64, 0, cost).attn == ((16, 32), (48, 64))
    assert split(64, 1, cost).attn == ((0, 16), (32, 48))
    assert split(40, 1, cost).ssm == ((16, 32),)


def test_it_is_a_value_of_a_sweep(folder, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "own-cache"
    words = ["-m", "split=fa,my_split.Stripes", *SMALL, f"cache_dir={cache}", f"output_dir={folder}/out"]
    assert train._main([*words, f"hydra.sweep.dir={folder}/sweep"]) == 0
    assert "my_split.Stripes" in (folder / "sweep" / "summary.md").read_text()


def test_another_text_of_the_file_is_another_run(folder):
    def run_id() -> str:
        return plan(compose("train", ["split=my_split.Stripes"])).run_id

    first = run_id()
    assert run_id() == first
    file = folder / "my_split.py"
    file.write_text(file.read_text().replace("16", "8").replace("32", "16"))
    assert run_id() != first
    assert "own_code" not in identity(to_dict(compose("train", ["split=fac"])))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("split=my_splt.Stripes", "there is no module my_splt in"),
        ("split=my_split.Stripe", "must name a subclass of flowhn.models.splits.Split in my_split"),
        ("fusion=my_split.Stripes", "must name a subclass of flowhn.models.fusions.Fusion"),
        ("split=broken.Mine", r"broken cannot be imported \(SyntaxError"),
        ("split=needy.Mine", "needy needs no_such_package, which is not installed"),
        ("split=fax", "did you mean fa"),
        ("model=my_split.Stripes", "choose one of"),
    ],
)
def test_what_is_wrong_is_one_sentence(word, said, folder):
    (folder / "broken.py").write_text("class Mine(:\n")
    (folder / "needy.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=said):
        compose("train", [word])
