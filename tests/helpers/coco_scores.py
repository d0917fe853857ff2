"""Scores of COCO keypoints without our code."""

import contextlib
import io
import json


def directly(truth, entries):
  """pycocotools by hand."""
  from pycocotools.coco import COCO as Coco
  from pycocotools.cocoeval import COCOeval

  with contextlib.redirect_stdout(io.StringIO()):
    known = Coco()
    known.dataset = {"info": {}} | json.loads(json.dumps(truth))
    known.createIndex()
    scores = COCOeval(known, known.loadRes(json.loads(json.dumps(entries))), "keypoints")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
  return scores.stats
