"""What every test shares: one torch thread, hypothesis profiles."""

import importlib.util
import os

import hypothesis

hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # workers beside each other are faster, and sums come out alike
