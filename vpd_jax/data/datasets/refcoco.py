"""RefCOCO, RefCOCO+ and RefCOCOg: sentences about objects in COCO images.

Files, below `root`:
  refcoco/instances.json     refcoco/refs(unc).p     refcoco/refs(google).p
  refcoco+/instances.json    refcoco+/refs(unc).p
  refcocog/instances.json    refcocog/refs(umd).p    refcocog/refs(google).p
  images/mscoco/images/train2014/COCO_train2014_<12 digits>.jpg, or images/train2014/..., or data.images/...
A reference is an object with several sentences. Its mask is that of its annotation in instances.json.

Source: Yu et al. 2016, https://arxiv.org/abs/1608.00272; VPD refer/data/dataset_refer_clip.py; REFER's refer.py.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vpd_jax.data.datasets.referring import ReferringDataset
from vpd_jax.data.readers import coco_masks, image_files, label_maps, referring, safe_pickle
from vpd_jax.data.readers.coco_masks import Outline
from vpd_jax.data.readers.referring import Item
from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError, check_choice, first_items, one_line
from vpd_jax.files import reading
from vpd_jax.types import Fields, Published, Source

# Published (references, images) by split; None if unknown.
Counts = dict[str, tuple[int, int] | None]
UNKNOWN: Counts = {"train": None, "val": None, "test": None}
PUBLISHED: dict[tuple[str, str], Counts] = {
  ("refcoco", "unc"): {"train": (42_404, 16_994), "val": (3_811, 1_500), "testA": (1_975, 750), "testB": (1_810, 750)},
  ("refcoco+", "unc"): {"train": (42_278, 16_992), "val": (3_805, 1_500), "testA": (1_975, 750), "testB": (1_798, 750)},
  ("refcocog", "umd"): {"train": (42_226, 21_899), "val": (2_573, 1_300), "test": (5_023, 2_600)},
  ("refcoco", "google"): UNKNOWN,
  ("refcocog", "google"): {"train": None, "val": None},
}
PICTURES = ("images/mscoco/images/train2014", "images/train2014", "train2014")
SOURCE = "refs and instances come with the REFER toolkit of the data sets' authors, pictures are COCO's train2014."
ON_EMPTY = ("stop", "leave_out")
KEYS = {"ann_id": int, "image_id": int, "split": str, "sentences": list}  # of a reference


@dataclasses.dataclass(eq=False, kw_only=True)
class RefCoco(ReferringDataset):
  """One of the RefCOCO family.

  Args:
    root: the folder with refcoco/, refcoco+/ and refcocog/, or with format="tfds" the one that prepare_data.py wrote.
    variant: "refcoco", "refcoco+" or "refcocog".
    split_by: author of the split: "unc" for the first two, "umd" for the third, "google" for the first and the third.
    eval_split: "val"; "testA" or "testB" of unc; "test" of umd and google.
    images: image folder, relative to `root` or an existing path; empty for the first of PICTURES that exists.
    overlap: how to merge polygons of one object, "released" or "union", see coco_masks.decode.
    on_empty: "stop" raises for empty sentences and annotations without outline, "leave_out" skips them.
    complete: whether the published numbers of references and images are required; False accepts any number.

  Attributes:
    provides: see ReferringDataset; "image_id" is COCO's id of the image.
  """

  variant: str = "refcoco"
  split_by: str = "unc"
  eval_split: str = "val"
  images: str = ""
  overlap: str = "released"
  on_empty: str = "stop"
  complete: bool = True

  def __post_init__(self):
    """Checks the options; `source` checks the files.

    Raises:
      ValueError: one line that lists all problems.
    """
    choices = {"overlap": (self.overlap, coco_masks.OVERLAPS), "on_empty": (self.on_empty, ON_EMPTY)}
    problems = [f"{name}={word!r} is unknown, choose one of {known}" for name, (word, known) in choices.items() if
             word not in known]  # fmt: skip
    counts = PUBLISHED.get((self.variant, self.split_by), UNKNOWN)
    if (self.variant, self.split_by) not in PUBLISHED:
      known = ", ".join(f"{name} by {who}" for name, who in PUBLISHED)
      problems.append(f"variant={self.variant!r} by split_by={self.split_by!r} does not exist, there are {known}")
    elif self.eval_split not in (splits := tuple(counts)[1:]):
      problems.append(
        f"eval_split={self.eval_split!r} is none of {self.variant} by {self.split_by}, choose one of {splits}"
      )
    if problems:
      raise UserError(f"data: {'; '.join(problems)}.")
    super().__post_init__()
    self.splits = {"train": "train", "eval": self.eval_split}
    self.published = Published({"train": counts["train"][0]} if self.complete and counts["train"] else {}, None, {})
    options = ("variant", "split_by", "eval_split", "overlap", "on_empty")
    self.made_with = {option: vars(self)[option] for option in options}
    if self.format == "files":
      image_files.require_folder(self.root, f"that holds {self.variant}/: {SOURCE}")

  @reader.read_once
  def source(self, split: str) -> Source:
    """The objects of "train", in the order of the file, or the sentences of "eval", grouped by image.

    Raises:
      ValueError: for missing files or images (all are counted), references to unknown images or annotations, empty
        sentences, annotations without outline, and with `complete` other numbers than published; with format="tfds",
        for missing or incomplete shards, and with `complete` another number of objects of "train" than published.
    """
    check_choice("split", split, sorted(self.splits))
    if self.format == "tfds":
      shards = reader.Shards(self.root, "refcoco", split, decode=referring.decode, made_with=self.made_with)
      return label_maps.check_count(
        shards, split, self.published.counts.get(split), f"{self.variant} by {self.split_by}"
      )
    root, name = Path(self.root).expanduser(), self.splits[split]
    folder = root / self.variant
    path = folder / f"refs({self.split_by}).p"
    image_files.require_files(folder, (path.name, "instances.json"), SOURCE)
    refs = [ref for ref in read_refs(path) if ref["split"] == name]
    self._check_count(refs, name, path)
    items = self._items(refs, read_instances(folder / "instances.json"), path)
    image_folder = self._pictures(root)
    image_files.require_files(
      image_folder, sorted({item.image for item in items}), "they are COCO's train2014 pictures."
    )
    items = [item._replace(image=_below(root, image_folder / item.image)) for item in items]
    read_mask = functools.partial(_read_mask, overlap=self.overlap)
    return referring.ReferringSource(root, items if split == "train" else referring.by_sentence(items), read_mask)

  def _items(self, refs: Sequence[Fields], instances: tuple[Mapping, Mapping], path: Path) -> list[Item]:
    """Converts references to items; all problems are reported together."""
    images, annotations = instances
    ids = first_items
    problems = []
    unknown_images = [ref["image_id"] for ref in refs if ref["image_id"] not in images]
    unknown_annotations = [ref["ann_id"] for ref in refs if ref["ann_id"] not in annotations]
    for unknown, problem in ((unknown_images, "a picture"), (unknown_annotations, "an annotation")):
      if unknown:
        problems.append(f"{len(unknown)} references name {problem} that instances.json lacks ({ids(unknown)})")
    valid = [ref for ref in refs if ref["image_id"] in images and ref["ann_id"] in annotations]
    outlines = {ref["ann_id"]: coco_masks.problem(annotations[ref["ann_id"]]) for ref in valid}
    without_outline = [ann for ann, problem in outlines.items() if problem]
    empty_sentences = [s.get("sent_id", "?") for ref in valid for s in ref["sentences"] if not s["sent"].strip()]
    without_sentence = [ref["ann_id"] for ref in valid if not ref["sentences"]]
    reasons = ids([f"{ann} {outlines[ann]}" for ann in without_outline])
    missing = {
      f"{len(without_outline)} annotations have no usable outline: {reasons}": without_outline,
      f"{len(empty_sentences)} sentences have no words: sent_id {ids(empty_sentences)}": empty_sentences,
      f"{len(without_sentence)} references have no sentence: ann_id {ids(without_sentence)}": without_sentence,
    }
    if self.on_empty == "stop":
      problems += [
        f"{line}; data.on_empty='leave_out' goes on without them" for line, entries in missing.items() if entries
      ]
    if problems:
      raise UserError(f"{path}: {'; '.join(problems)}; complete the copy: {SOURCE}")
    items = []
    for ref in valid:
      texts = tuple(" ".join(s["sent"].split()) for s in ref["sentences"] if s["sent"].strip())
      if texts and not outlines[ref["ann_id"]]:
        name, *size = images[ref["image_id"]]
        items.append(Item(name, ref["image_id"], (annotations[ref["ann_id"]], *size), texts))
    return items

  def _check_count(self, refs: Sequence[Fields], split: str, path: Path) -> None:
    """Raises if a split has other numbers of references and images than published."""
    counts = (len(refs), len({ref["image_id"] for ref in refs}))
    expected = PUBLISHED[self.variant, self.split_by][split] if self.complete else None
    if not refs or (expected and counts != expected):
      published = f", published are {expected[0]} in {expected[1]}" if expected else ""
      raise UserError(
        f"{path}: {counts[0]} references in {counts[1]} pictures are of {split!r}{published}; fetch the file again, "
        "or set data.complete=False, and scores are not comparable."
      )

  def _pictures(self, root: Path) -> Path:
    """The image folder."""
    candidates = (
      [root / self.images, Path(self.images).expanduser()] if self.images else [root / path for path in PICTURES]
    )
    for path in candidates:
      if path.is_dir():
        return path
    raise UserError(
      f"{root} holds no pictures: none of {', '.join(map(str, candidates))} is a folder; set data.images to that of "
      "COCO's train2014 pictures."
    )


def read_refs(path: Path) -> list[Fields]:
  """Reads the references of a refs(...).p.

  Raises:
    ValueError: if it contains more than plain data (no code is executed), or is not a list of references; one line.
  """
  refs = safe_pickle.read(path)
  if not isinstance(refs, list) or not refs:
    raise UserError(f"{path} holds {type(refs).__name__} in place of a list of references; {SOURCE}")
  invalid = [index for index, ref in enumerate(refs) if not _is_reference(ref)]
  if invalid:
    raise UserError(
      f"{path}: {len(invalid)} of {len(refs)} entries, the first is number {invalid[0]}, lack the fields "
      f"{', '.join(KEYS)}, and a text 'sent' in every sentence; {SOURCE}"
    )
  return refs


def _is_reference(ref: object) -> bool:
  if not isinstance(ref, dict) or not all(isinstance(ref.get(key), kind) for key, kind in KEYS.items()):
    return False
  return all(isinstance(s, dict) and isinstance(s.get("sent"), str) for s in ref["sentences"])


def read_instances(path: Path) -> tuple[dict[int, tuple[str, int, int]], dict[int, Outline]]:
  """Reads an instances.json: ({image id: (file name, height, width)}, {annotation id: outline}).

  Raises:
    ValueError: for a damaged or another file; one line.
  """
  content = reading.read_json(path)
  try:
    facts = lambda entry: (str(entry["file_name"]), int(entry["height"]), int(entry["width"]))
    images = {int(entry["id"]): facts(entry) for entry in content["images"]}
    return images, {int(entry["id"]): entry.get("segmentation") for entry in content["annotations"]}
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
    reason = one_line(error)
    raise UserError(f"{path} is damaged or not COCO's instances ({type(error).__name__} {reason}); {SOURCE}") from None


def _read_mask(annotated: tuple[Outline, int, int], folder: Path, size: tuple[int, int], *, overlap: str) -> np.ndarray:
  """The mask of (outline, height, width)."""
  del folder  # outlines are in the annotations
  outline, *expected = annotated
  if tuple(expected) != size:
    raise UserError(f"a picture is {size[0]}x{size[1]}, but was annotated at {expected[0]}x{expected[1]}.")
  return coco_masks.decode(outline, size, overlap=overlap)


def _below(root: Path, path: Path) -> str:
  """The path relative to `root`, or the absolute path if it is elsewhere."""
  return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path.absolute())
