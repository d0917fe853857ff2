"""Heatmaps by the loops of the release."""

import numpy as np

CROP, SIZE = (256, 192), (64, 48)


def written_targets(points, size=SIZE, sigma=2, udp=True):
  """The release's loops, in float64. Returns [K, h, w] and weights [K]."""
  h, w = size
  stride = ((CROP[1] - 1) / (w - 1), (CROP[0] - 1) / (h - 1)) if udp else (CROP[1] / w, CROP[0] / h)
  maps, weights = np.zeros((len(points), h, w)), points[:, 2].copy()
  for k, (x, y, visible) in enumerate(points):
    mu = x / stride[0], y / stride[1]
    m = int(mu[0] + 0.5), int(mu[1] + 0.5)
    ul, br = [i - 3 * sigma for i in m], [i + 3 * sigma + 1 for i in m]
    if ul[0] >= w or ul[1] >= h or br[0] < 0 or br[1] < 0:
      weights[k] = 0
      continue
    if visible < 0.5:
      continue
    for row in range(max(0, ul[1]), min(h, br[1])):
      for column in range(max(0, ul[0]), min(w, br[0])):
        cx, cy = mu if udp else m
        maps[k, row, column] = np.exp(-((column - cx) ** 2 + (row - cy) ** 2) / (2 * sigma**2))
  return maps, weights
