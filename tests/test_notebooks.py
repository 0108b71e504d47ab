"""The code of the tutorials runs, on sizes that take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "first_spiking_network": dict(N_UNITS=10, CUE=4, WAIT=3, ANSWER=3, BATCH=4, UPDATES=3),
    "choosing_a_rule": dict(N=4, BATCH=2, TIME=12),
    "dale_and_conductances": dict(N_IN=6, N_EXC=8, N_INH=2, TIME=8, ANSWER=3, BATCH=4, UPDATES=2),
    "debugging": dict(TIME=60, N=6, BATCH=4, UPDATES=2),
    "delays_and_sparse": dict(N=20, BATCH=4, UPDATES=2),
    "eligibility_traces": dict(TIME=70),
    "from_snntorch_and_spyx": dict(TIME=4, N_HIDDEN=8, BATCH=100, EPOCHS=1),
    "from_the_published_package": dict(TIME=4, BATCH=2, UPDATES=2),
    "own_rule_and_operation": dict(TIME=6, N_IN=4, N=4, BATCH=2, UPDATES=6),
    "reinforcement_learning": dict(N=2, LENGTH=4, STEPS=200, SEEDS=1, BATCH=4, CUE=2, WAIT=2, UPDATES=6),
    "scaling_out": dict(TIME=6, N_IN=4, N=8, BATCH=4),
}


def code_cells(notebook):
    cells = json.loads((ROOT / "docs" / "tutorials" / notebook).read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", sorted(p.name for p in (ROOT / "docs" / "tutorials").glob("*.ipynb")))
def test_notebook(notebook, tmp_path):
    small = SMALL[notebook.removesuffix(".ipynb")]
    cells = code_cells(notebook)
    [sizes] = [i for i, cell in enumerate(cells) if cell.startswith(("N_IN, ", "TIME, "))]
    cells.insert(sizes + 1, "\n".join(f"{name} = {value}" for name, value in small.items()))
    subprocess.run(
        [sys.executable, "-c", "\n".join(cells)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
    )
    assert all(name in cells[sizes] for name in small)
