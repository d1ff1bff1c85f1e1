"""Run the notebooks on the committed records and write their outputs back, small and the same every time.

python scripts/notebooks.py [NAME ...]          all of them, or those whose name begins so (01, 04_routing)
python scripts/notebooks.py --check [NAME ...]  write nothing; exit code 1 where one fails or its texts and tables have changed
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
TIMEOUT = 60  # seconds that a notebook may take
LARGEST = 500_000  # bytes of a notebook with its outputs
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def names(chosen: list[str] | None = None) -> list[Path]:
    """The notebooks, or those whose names begin with one of ``chosen``."""
    found = sorted(FOLDER.glob("*.ipynb"))
    return [path for path in found if not chosen or path.stem.startswith(tuple(chosen))]


def run(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook in its own folder and return it with fresh, normalised outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as home:
        # The kernel's own files go away with it. The package is the one of this checkout, installed or not.
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "IPYTHONDIR": home,
            "JUPYTER_RUNTIME_DIR": home,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        # Sockets in that folder, not ports that anybody on the machine could connect to.
        manager = AsyncKernelManager(
            kernel_name="python3",
            transport="ipc",
            ip=str(Path(home) / "kernel"),
            connection_file=str(Path(home) / "kernel.json"),
        )
        client = NotebookClient(
            notebook, km=manager, timeout=TIMEOUT, resources={"metadata": {"path": str(path.parent)}}, record_timing=False,
            extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
        client.execute(env=env, cleanup_kc=True)  # a manager of one's own would leave its kernel running
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"{path.stem[:2]}-{number:02d}", nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            output.pop("metadata", None)
            if output.output_type in ("execute_result", "display_data"):
                output.metadata = nbformat.from_dict({})
    return notebook


def texts(notebook: nbformat.NotebookNode) -> list[Any]:
    """What a notebook says: sources, printed text and tables. Pictures are left out, they differ by matplotlib's version."""
    found: list[Any] = []
    for cell in notebook.cells:
        found.append(cell.source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            found.append(data.get("text/markdown") or output.get("text") or sorted(data))
    return found


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # Fonts are listed anew: a list that another environment left would put its warnings into the outputs.
        os.environ["MPLCONFIGDIR"] = cache
        importlib.import_module("matplotlib.font_manager")
        return int(run_all(args.names, check=args.check) > 0)


def run_all(chosen: list[str], *, check: bool) -> int:
    """Run, and write or compare; returns how many failed or differ."""
    bad = 0
    for path in names(chosen):
        begun = time.monotonic()
        try:
            notebook = run(path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}")
            bad += 1
            continue
        seconds = time.monotonic() - begun
        if check:
            same = texts(notebook) == texts(nbformat.read(path, as_version=4))
            bad += not same
            said = "as committed" if same else "is not what the committed records give; run scripts/notebooks.py"
        else:
            nbformat.write(notebook, path)
            said = f"{path.stat().st_size / 1000:.0f} kB"
        print(f"{path.name}: {seconds:.0f} s, {said}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
