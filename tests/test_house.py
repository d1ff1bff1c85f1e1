"""The rules of the house: who may import whom, pins that agree, a README whose commands exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "flowhn"
ENTRIES = {"train", "evaluate", "bench", "reproduce", "doctor", "convert", "export", "generate"}
ROOMS = {"models", "data", "training", "evaluation", "benchmark", "reporting", "hf"}
# Of the package itself, what each room may import (its own files are always allowed).
MAY_IMPORT = {
    "models": {"errors"},
    "data": {"errors"},
    "reporting": {"errors"},
    "training": {"errors", "models", "data", "benchmark", "reporting.record"},
    "evaluation": {"errors", "models", "data", "reporting.record"},
    "benchmark": {"errors", "models", "reporting.record"},
    "hf": {"errors", "models"},
}
MODELS_THIRD_PARTY = {
    "torch",
    "einops",
    "numpy",
    "mamba_ssm",
    "flash_attn",
    "causal_conv1d",
    "triton",
    "selective_scan_cuda",
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_import_one_way_only():
    for room, allowed in MAY_IMPORT.items():
        files = list((PACKAGE / room).rglob("*.py"))
        assert files, room
        for path in files:
            for name in imports_of(path):
                if name.startswith("flowhn."):
                    inner = name.removeprefix("flowhn.")
                    fine = any(inner == ok or inner.startswith(f"{ok}.") for ok in allowed | {room})
                    assert fine, f"{path.relative_to(ROOT)} imports {name}"


def test_nobody_imports_an_entry():
    for path in PACKAGE.rglob("*.py"):
        for name in imports_of(path):
            inner = name.removeprefix("flowhn.").split(".")[0] if name.startswith("flowhn.") else ""
            assert inner not in ENTRIES, f"{path.relative_to(ROOT)} imports the entry {name}"


def test_models_need_torch_and_kernels_only():
    for path in (PACKAGE / "models").rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in MODELS_THIRD_PARTY | {"flowhn"}, f"{path.name}: {name}"


def test_there_is_no_utils():
    assert not [path for path in PACKAGE.rglob("*") if path.stem in {"utils", "helpers", "misc"}]


@pytest.mark.parametrize("module", ["flowhn", "flowhn.errors", "flowhn.reporting.record", "flowhn.reproduce"])
def test_light_modules_import_nothing_heavy(module):
    heavy = {"torch", "lightning", "datasets", "lm_eval", "pandas", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_environment_yml_has_pyprojects_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in conda if isinstance(item, dict))
    assert [line for line in pip if line != "-e ."] == project["dependencies"]
    assert f"python{project['requires-python']}" in conda


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    artefacts = {path.stem for path in (ROOT / "configs" / "artefacts").glob("*.yaml")}
    lines = [
        line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", readme, re.S) for line in block.splitlines()
    ]
    commands = [line.split("#")[0].split() for line in lines if line and not line.startswith("#")]
    assert commands, "the README shows no command"
    for words in commands:
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        elif words[0] == "./reproduce.sh":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(named) <= artefacts | {"report"}, words
        elif words[0].startswith("flowhn-"):
            assert words[0] in project["scripts"], words


def test_readme_overrides_compose():
    from flowhn.config import compose
    from flowhn.train import _check_sweep

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", readme, re.S):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if "-m" in words:
                _check_sweep(words[1:])
            elif words and words[0] in {"./reproduce.sh", "flowhn-train"}:
                given = [w for w in words[1:] if "=" in w and not w.startswith(("models=", "model=", "seeds=", "-"))]
                compose("train", given)


def test_committed_tables_and_the_readmes_are_what_the_committed_records_give():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "refresh_experiments.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lock_files_pin_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, wanted in (
        ("requirements.lock", project["dependencies"]),
        ("requirements-dev.lock", [*project["dependencies"], *project["optional-dependencies"]["dev"]]),
    ):
        text = (ROOT / name).read_text()
        entries = re.findall(r"^([\w.-]+)==(\S+)[^\n]*\\\n((?: +--hash=sha256:[0-9a-f]{64}[^\n]*\n?)+)", text, re.M)
        pinned: dict[str, list[str]] = {}
        for package, version, _ in entries:
            pinned.setdefault(canonicalize_name(package), []).append(version)
        assert len(entries) == len(re.findall(r"^[\w.-]+==", text, re.M)), "an entry has no hash"
        assert "torch" not in pinned
        for line in wanted:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) != "torch":
                versions = pinned[canonicalize_name(requirement.name)]
                assert all(requirement.specifier.contains(version) for version in versions), (name, line, versions)


def test_the_gpu_session_runs_every_gpu_test():
    session = (ROOT / "scripts" / "device_session.sh").read_text()
    mark = "pytest.mark." + "gpu"  # not as one word: this file has no such test
    marked = [path.name for path in (ROOT / "tests").glob("test_*.py") if mark in path.read_text()]
    assert marked
    assert [name for name in marked if f"tests/{name}" not in session] == []
