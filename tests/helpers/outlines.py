"""Outlines of objects and masks as COCO stores them."""

import numpy as np
from pycocotools import mask as coco

SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]
OVERLAPPING = [SQUARE, [20.0, 5.0, 40.0, 5.0, 40.0, 25.0, 20.0, 25.0]]


def run_lengths(mask, *, compressed):
  """Columns first, beginning with zeros."""
  code = coco.encode(np.asfortranarray(mask))
  if compressed:
    return {"size": list(mask.shape), "counts": code["counts"].decode()}
  flat = mask.ravel(order="F")
  borders = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
  return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], borders])).tolist()}


def disc(size):
  y, x = np.mgrid[: size[0], : size[1]]
  return ((y - 15) ** 2 + (x - 20) ** 2 < 100).astype(np.uint8)
