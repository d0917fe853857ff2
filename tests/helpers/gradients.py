"""Gradients and steps against the authors' norms and projections."""

import numpy as np

from tests.helpers import fill, oracle


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


def check_steps(first, last, arrays, setup, limit=1e-9):
  """Asserts that every parameter moved as the authors' between two states of arrays under their names.

  Args:
    first, last: arrays by name, before and after the steps.
    arrays: of the oracle, with a trace.
    setup: see oracle.is_noise: those parameters are left out, as are those without gradient, which do not move.
    limit: of the length of each difference, and of its projection.
  """
  without = {str(name) for name in arrays.get("train/no_grad_names", ())}
  names = [str(name) for name in arrays["trace/param_names"]]
  assert set(names) - without == first.keys() - without and len(names) > 100
  for name, length, probe in zip(names, arrays["trace/param_delta_l2"], arrays["trace/param_delta_probe"], strict=True):
    if name not in first:
      assert length == 0, name
      continue
    delta = np.asarray(last[name]) - np.asarray(first[name])
    if name in without or length == 0:
      assert length == 0 and not delta.any(), name
    elif not oracle.is_noise(setup, name):
      along = fill.normal("probe/" + name, delta.shape, 0).astype(np.float64)
      assert abs(np.linalg.norm(delta) - length) <= limit * length, name
      assert abs((delta * along).sum() - probe) <= limit * max(1.0, length), name
