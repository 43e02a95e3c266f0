"""A cluster and a checkout to submit from, one for the whole session."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """Return a copy of the code whose site.env names this Python."""
    folder = tmp_path_factory.mktemp("cluster") / "t6"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.yaml", "slurm"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "slurm/site.env").write_text(f"PYTHON={sys.executable}\nexport OMP_NUM_THREADS=1 T6_GPUS_PER_NODE=1\n")
    return folder


@pytest.fixture(scope="module")
def shell(cluster, checkout):
    """Make this process a user's shell in the checkout, where Slurm's commands reach the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(key)
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.chdir(checkout)
        yield
