"""Outlines of objects as COCO stores them, as masks: polygons and run-length codes.

Source: pycocotools/mask.py; REFER's refer.py getMask.
"""

from typing import Any

import numpy as np
from pycocotools import mask as coco

OVERLAPS = ("released", "union")
Outline = Any  # [[x, y, x, y, ...], ...], or {"size": [H, W], "counts": [...] or text}, or a list of such


def problem(outline: Outline) -> str:
  """What is wrong with an outline, or an empty text; looks at its form only."""
  if isinstance(outline, dict):
    return _problem_of_runs(outline)
  if not isinstance(outline, list):
    return f"is {type(outline).__name__}"
  parts = [part for part in outline if part]
  if not parts:
    return "is empty"
  if all(isinstance(part, dict) for part in parts):
    return next((found for part in parts if (found := _problem_of_runs(part))), "")
  if any(not isinstance(part, list) or len(part) < 6 or len(part) % 2 for part in parts):
    return "has a polygon of less than three points"
  return ""


def _problem_of_runs(outline: dict) -> str:
  size, counts = outline.get("size"), outline.get("counts")
  if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, list | str):
    return "is a run-length code without size and counts"
  return "" if counts else "is empty"


def decode(outline: Outline, size: tuple[int, int], *, overlap: str = "released") -> np.ndarray:
  """The mask of an outline, uint8 [H, W], 1 on the object.

  Args:
    outline: see Outline; one that `problem` has nothing against.
    size: (height, width) of the picture.
    overlap: of several parts of one object: "released" leaves out what two or more of them share, for it keeps only
      where their sum is 1; "union" keeps that too.

  Raises:
    ValueError: a run-length code of another size, or one that is damaged.

  Source: VPD refer/data/dataset_refer_clip.py, `annot[ref_mask == 1] = 1`.
  """
  parts = [part for part in outline if part] if isinstance(outline, list) else [outline]
  height, width = size
  try:
    if isinstance(parts[0], list):
      codes = coco.frPyObjects([[float(x) for x in part] for part in parts], height, width)
    else:
      codes = [coco.frPyObjects(p, *p["size"]) if isinstance(p["counts"], list) else p for p in parts]
    counts = coco.decode(codes).sum(axis=2, dtype=np.int64)
  except Exception as error:  # pycocotools raises whatever Python does
    raise ValueError(f"the outline of an object cannot be read ({error}); fetch the annotations again.") from None
  if counts.shape != (height, width):
    raise ValueError(f"the outline of an object is {counts.shape[0]}x{counts.shape[1]}, its picture {height}x{width}.")
  return (counts == 1 if overlap == "released" else counts > 0).astype(np.uint8)
