"""Masks from COCO's outlines of objects: polygons and run-length codes.

Source: pycocotools/mask.py; REFER's refer.py getMask.
"""

from typing import Any, cast

import numpy as np
from pycocotools import mask as coco

from vpd_jax.errors import UserError

OVERLAPS = ("released", "union")
MAX_COORDINATE = 1e5  # pixels
Outline = Any  # [[x, y, x, y, ...], ...], or {"size": [H, W], "counts": [...] or text}, or a list of such


def problem(outline: Outline) -> str:
  """Describes what is wrong with the format of an outline; empty if it is valid."""
  if isinstance(outline, dict):
    return _problem_of_runs(outline)
  if not isinstance(outline, list):
    return f"is {type(outline).__name__}"
  parts = [part for part in outline if part]
  if not parts:
    return "is empty"
  if all(isinstance(part, dict) for part in parts):
    return next((text for part in parts if (text := _problem_of_runs(part))), "")
  if any(not isinstance(part, list) or len(part) < 6 or len(part) % 2 for part in parts):
    return "has a polygon of less than three points"
  if not all(isinstance(x, int | float) and -MAX_COORDINATE < x < MAX_COORDINATE for part in parts for x in part):
    return "has polygon coordinates that are not numbers or are out of range"
  return ""


def _problem_of_runs(outline: dict) -> str:
  size, counts = outline.get("size"), outline.get("counts")
  if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, list | str):
    return "is a run-length code without size and counts"
  if isinstance(counts, list) and not all(isinstance(count, int) and count >= 0 for count in counts):
    return "is a run-length code whose counts are not nonnegative integers"
  return "" if counts else "is empty"


def decode(outline: Outline, size: tuple[int, int], *, overlap: str = "released") -> np.ndarray:
  """The mask of an outline, uint8 [H, W], 1 on the object.

  Args:
    outline: see Outline; must be valid, see `problem`.
    size: (height, width) of the picture.
    overlap: how to merge several parts of one object: "released" excludes pixels in two or more of them, because it
      only keeps pixels where their sum is 1; "union" includes them.

  Raises:
    ValueError: for a run-length code that is damaged or has another size.

  Source: VPD refer/data/dataset_refer_clip.py, `annot[ref_mask == 1] = 1`.
  """
  if reason := problem(outline):
    raise UserError(f"the outline of an object {reason}; fetch the annotations again.")
  parts = [part for part in outline if part] if isinstance(outline, list) else [outline]
  height, width = size
  for other in (part["size"] for part in parts if isinstance(part, dict)):
    if other != [height, width]:
      sides = "x".join(map(str, other))
      raise UserError(f"the outline of an object is {sides}, its picture {height}x{width}.")
  try:
    if isinstance(parts[0], list):
      polygons: Outline = [[float(x) for x in part] for part in parts]
      counts = coco.decode(coco.frPyObjects(polygons, height, width)).sum(axis=2, dtype=np.int64)
    else:
      counts = cast(np.ndarray, sum(_of_runs(part) for part in parts))
  except Exception as error:  # pycocotools raises any type of error
    raise UserError(f"the outline of an object cannot be read ({error}); fetch the annotations again.") from None
  return (counts == 1 if overlap == "released" else counts > 0).astype(np.uint8)


def _of_runs(code: dict) -> np.ndarray:
  """int64 [H, W], 0 or 1, of a run-length code in column-major order, starting with zeros.

  pycocotools 2.0.11 is not used, because it leaves pixels after the last run uninitialized.

  Source: pycocotools common/maskApi.c rleDecode, rleFrString.
  """
  height, width = code["size"]
  runs = _runs_of_text(code["counts"]) if isinstance(code["counts"], str) else code["counts"]
  if sum(runs) != height * width or min(runs) < 0:
    raise UserError(f"its runs are {sum(runs)} pixels, its size is {height}x{width}")
  return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T


def _runs_of_text(text: str) -> list[int]:
  """The counts of a compressed code: groups of five bits, lowest first; from the fourth on, relative to two before."""
  runs, value, shift = [], 0, 0
  for letter in text.encode("ascii"):
    bits = letter - 48
    value |= (bits & 31) << shift
    shift += 5
    if not bits & 32:
      value -= (bits & 16) >> 4 << shift
      runs.append(value + (runs[-2] if len(runs) > 2 else 0))
      value, shift = 0, 0
  return runs
