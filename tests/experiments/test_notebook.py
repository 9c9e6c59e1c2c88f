from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def results(name: str, request, tmp_path) -> Path:
    """Records made by this code; where only a GPU makes them an empty folder, so that the published ones are read."""
    fixtures = {"niah.ipynb": "finished", "fidelity.ipynb": "compared", "ruler.ipynb": "suites_finished"}
    return request.getfixturevalue(fixtures[name]) if name in fixtures else tmp_path


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_the_notebook_shows_a_results_folder_and_leaves_it_as_it_was(name, results):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert 'RESULTS = Path("../results")' in parameters.source
    parameters.source = f"from pathlib import Path\n\nRESULTS = Path({str(results)!r})"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output.data for output in outputs if "data" in output]
    assert any("bsfa" in data.get("text/markdown", "") for data in shown)
    assert sum("image/png" in data for data in shown) >= 2


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebook_is_kept_without_its_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
