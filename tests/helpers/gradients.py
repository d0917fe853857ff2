"""Gradients against the authors' norms and projections."""

import numpy as np

from tests.helpers import fill


def check_gradients(grads, arrays, limit):
  names = [str(n) for n in arrays["train/grad_names"]]
  assert set(names) == set(grads)
  total = float(arrays["train/grad_total_l2"])
  worst = 0.0
  for name, l2, probe in zip(names, arrays["train/grad_l2"], arrays["train/grad_probe"], strict=True):
    g = np.asarray(grads[name], np.float64)
    along = fill.normal("probe/" + name, g.shape, 0).astype(np.float64)
    worst = max(worst, abs(np.linalg.norm(g) - l2) / total, abs((g * along).sum() - probe) / total)
  assert worst < limit, f"{worst:.2e} of the total norm, limit {limit:.0e}"
  return worst
