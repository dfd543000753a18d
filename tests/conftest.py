"""What every test shares: one torch thread, hypothesis profiles, the folder beside the checkout."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # workers beside each other are faster, and sums come out alike


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: recorded runs too large or too foreign to keep."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' beside this checkout")
    return folder
