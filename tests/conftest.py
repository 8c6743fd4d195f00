"""Test environment: offline, one thread, tiny models of every family."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Read when numpy and scipy are imported: workers side by side, each on all cores, take several times as long.
os.environ["OMP_NUM_THREADS"] = os.environ.get("LMLEAK_TEST_THREADS", "1")

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _offline_and_quiet(tmp_path_factory):
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold parameters' names too, such as gpu.yaml's
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data and models; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LMLEAK_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data: set LMLEAK_DATA or place it at {default}")
    return folder
