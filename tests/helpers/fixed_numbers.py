"""Random numbers that are told."""

import numpy as np


class Fixed:
  """Stands in for a Generator and hands out the given numbers of [0, 1)."""

  def __init__(self, *numbers):
    self.numbers = list(numbers)

  def random(self, count=None):
    return self.numbers.pop(0) if count is None else np.array([self.numbers.pop(0) for _ in range(count)])
