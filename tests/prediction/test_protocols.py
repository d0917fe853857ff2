"""How many windows go through the network at once."""

import jax
import pytest

from vpd_jax.config import loader
from vpd_jax.prediction import protocols


@pytest.mark.parametrize("backend, windows", [("cpu", 1), ("gpu", 8)])
def test_a_cpu_takes_one_window_at_a_time(monkeypatch, backend, windows):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert protocols._batch_size(loader.load("configs/nyu_depth.py")) == windows
