"""The notebooks run on the committed records, in time, and say what their committed outputs say."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest

from flowhn.errors import UserError
from flowhn.reporting import notebook as outputs
from flowhn.reporting.breakdown import breakdown_figure, run_breakdown, step_breakdown
from flowhn.reporting.compare import deltas, relative
from flowhn.reporting.record import find_records
from flowhn.reporting.tables import table1
from script_loading import load_script

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "table1" / "tiny-docs-laptop" / "records"


script = load_script("notebooks")


def timed(path: Path) -> tuple[Path, nbformat.NotebookNode, float]:
    begun = time.monotonic()
    return path, script.run(path), time.monotonic() - begun


@pytest.fixture(scope="module")
def fresh():
    """All notebooks, run anew, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return {path.stem: (path, notebook, seconds) for path, notebook, seconds in pool.map(timed, script.names())}


@pytest.mark.slow  # .ci/run executes them by scripts/notebooks.py --check
def test_there_are_five_and_each_runs_in_time(fresh):
    assert list(fresh) == ["01_table1", "02_throughput", "03_ablations", "04_routing", "05_branches"]
    for name, (_, _, seconds) in fresh.items():
        assert seconds < script.TIMEOUT, name


@pytest.mark.slow  # .ci/run executes them by scripts/notebooks.py --check
def test_the_committed_outputs_are_those_of_the_committed_records(fresh):
    for path, notebook, _ in fresh.values():
        same = script.texts(notebook) == script.texts(nbformat.read(path, as_version=4))
        assert same, f"{path.name} is not what the committed records give; run scripts/notebooks.py"


def test_the_committed_notebooks_are_whole_small_and_have_figures():
    for path in script.names():
        assert path.stat().st_size < script.LARGEST, path.name
        cells = nbformat.read(path, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), f"{path.name} was not run"
        assert not [output for cell in code for output in cell.outputs if output.output_type in ("error", "stream")], (
            path.name
        )
    pictures = {}
    for path in script.names():
        shown = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
        pictures[path.stem] = sum("image/png" in output.get("data", {}) for output in shown)
    assert pictures["01_table1"] >= 3
    assert pictures["04_routing"] >= 6
    assert pictures["05_branches"] >= 1


def test_notebooks_train_nothing():
    for path in script.names():
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert "flowhn.training" not in code
        assert "flowhn.experiment" not in code
        assert ".backward" not in code


def test_deltas_need_a_size_of_the_papers_and_relative_rows_need_their_reference():
    records = find_records(RECORDS)
    frame = table1(records, size="tiny")
    with pytest.raises(UserError, match="the paper has no size tiny"):
        deltas(frame)
    shown = relative(frame).set_index("cell")
    assert shown.tps["flowhn_no"] == 1
    assert shown.average["flowhn_no"] == 0
    assert shown.paper_tps["hymba"] == pytest.approx(9393 / 26443)
    assert shown.delta_average["hymba"] == pytest.approx(shown.average["hymba"] - (37.99 - 38.85))
    with pytest.raises(UserError, match="no record of FlowHN No_Split"):
        relative(table1([record for record in records if record.cell != "flowhn_no"], size="tiny"))


def test_deltas_at_a_size_of_the_papers():
    from dataclasses import replace

    frame = table1([replace(record, size="135m") for record in find_records(RECORDS)], size="135m")
    shown = deltas(frame).set_index("model")
    record = next(record for record in find_records(RECORDS) if record.cell == "llama")
    assert shown["tokens/s, ours / paper"]["Llama"] == pytest.approx(record.throughput["tps"] / 21353)


def test_breakdowns_add_up():
    records = find_records(RECORDS)
    frame = run_breakdown(records)
    total = {record.cell: record.wall_seconds["total"] for record in records}
    assert frame.loc["Hymba"].sum() == pytest.approx(total["hymba"], rel=0.02)
    assert step_breakdown([{"cell": "llama", "size": "135m", "profile": None}]).empty
    steps = step_breakdown([{"cell": "llama", "size": "135m", "profile": {"kinds": {"matmul": 3.0, "scan": 1.0}}}])
    assert list(steps.columns) == ["matmul", "scan"]
    assert [patch.get_width() for patch in breakdown_figure(steps, unit="ms").axes[0].patches] == [3, 1]
    with pytest.raises(UserError, match="no record says"):
        breakdown_figure(step_breakdown([]), unit="ms")


def test_a_place_without_records_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not inside a flowhn checkout"):
        outputs.repository(tmp_path)
    for name in ("experiments", "configs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert outputs.settings("table1") == []
    assert "./reproduce.sh table1 --keep" in outputs.not_yet(["table1"]).text


@pytest.mark.slow  # .ci/run executes them by scripts/notebooks.py --check
def test_no_kernel_is_left_running(fresh):
    """``fresh`` has run five kernels as children of this process."""
    left = [child for child in psutil.Process().children(recursive=True) if "ipykernel_launcher" in child.cmdline()]
    assert left == []
