"""NYU Depth v2 as the depth papers use it: BTS's synchronized frames for training, the official 654 for evaluation.

Files, below `root`:
  sync/<scene>_<nnnn>/rgb_<nnnnn>.jpg and sync_depth_<nnnnn>.png
  official_splits/test/<scene>/rgb_<nnnnn>.jpg and sync_depth_<nnnnn>.png
  train_list.txt and test_list.txt (or nyudepthv2_train_list.txt ..., or .gz; in `root` or beside it)
Depth is a 16-bit PNG in millimetres, 0 where nothing was measured.
"""

from pathlib import Path

import numpy as np

from vpd_jax.data import files, transforms
from vpd_jax.types import Example

# The order is that of the class vectors in the released checkpoints; 'excercise_room' is spelt as in the data.
# Source: VPD depth/nyu_class_list.json.
CLASSES = (
  *("printer_room", "bathroom", "living_room", "study", "conference_room", "study_room", "kitchen", "home_office"),
  *("bedroom", "dinette", "playroom", "indoor_balcony", "laundry_room", "basement", "excercise_room", "foyer"),
  *("home_storage", "cafe", "furniture_store", "office_kitchen", "student_lounge", "dining_room", "reception_room"),
  *("computer_lab", "classroom", "office", "bookstore"),
)
DEPTH_SCALE = 1000.0  # millimetres in the files
MAX_DEPTH = 10.0  # metres, the range of the data set's sensor as all papers take it
FOLDERS = {"train": "sync", "eval": "official_splits/test"}
LISTS = {
  "train": ("train_list.txt", "nyudepthv2_train_list.txt"),
  "eval": ("test_list.txt", "nyudepthv2_test_list.txt"),
}
LISTS_SOURCE = "take it from depth/dataset/filenames/nyudepthv2 of github.com/wl-zhao/VPD, or name it in data.{option}."
FILES_SOURCE = {
  "train": "they come from sync.zip, which github.com/cleinc/bts links to.",
  "eval": "they are cut out of nyu_depth_v2_labeled.mat of NYU by the extraction script of github.com/cleinc/bts.",
}


class Nyu:
  """NYU Depth v2 with VPD's augmentation and scene classes.

  Args:
    root: folder that holds sync/ and official_splits/.
    crop: (height, width) of a training example.
    cut_depth: "released", "scaled" or "off", see transforms.vertical_cut_depth.
    train_list: list file of the training frames; empty looks for the usual names in `root` and beside it.
    test_list: the same for evaluation.
    resize: (height, width) that images and depth get before anything else; () keeps the files' 480x640. Scores of
      resized data are not the published ones.
    colour: False trains without the changes of colour.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "depth" float32 [H, W] metres (0 is no measurement),
      "class_id" int32 [] into `classes`, "index" int32 [], position in the list file.
    classes: names of the 27 scene classes.

  Source: VPD depth/dataset/nyudepthv2.py.
  """

  provides = frozenset({"image", "depth", "class_id", "index"})
  classes = CLASSES

  def __init__(
    self,
    *,
    root: str,
    crop: tuple[int, int] = (480, 480),
    cut_depth: str = "released",
    train_list: str = "",
    test_list: str = "",
    resize: tuple[int, int] = (),
    colour: bool = True,
  ):
    transforms.check_cut_depth(cut_depth)
    if not root:
      raise ValueError("data.root is empty; set it to the folder that holds sync/ and official_splits/.")
    self.root = Path(root).expanduser()
    self.crop = check_size("crop", crop)
    self.cut_depth = cut_depth
    self.lists = {"train": train_list or None, "eval": test_list or None}
    self.resize = None if not resize else check_size("resize", resize)
    self.colour = colour
    if self.resize and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
      raise ValueError(f"crop={self.crop} does not fit into resize={self.resize}; make data.crop smaller.")
    if not self.root.is_dir():
      raise ValueError(
        f"root={str(root)!r} is not a folder; set data.root to the folder that holds sync/ and official_splits/ "
        f"of NYU Depth v2: {FILES_SOURCE['train']}"
      )

  def source(self, split: str) -> "Frames":
    """The frames of "train" or "eval", in the order of the list file, whose files are all there.

    Raises:
      ValueError: the list file or listed files are missing (all are counted), or a folder belongs to no scene class.
    """
    if split not in FOLDERS:
      raise ValueError(f"split={split!r} is unknown; choose one of {sorted(FOLDERS)}.")
    hint = LISTS_SOURCE.format(option="train_list" if split == "train" else "test_list")
    path = files.find_list(self.root, self.lists[split], LISTS[split], hint)
    pairs = files.read_list(path)
    folder = self.root / FOLDERS[split]
    files.require_files(folder, (name for pair in pairs for name in pair), FILES_SOURCE[split])
    return Frames(folder, pairs, scene_classes([image for image, _ in pairs]))

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The released augmentation of one frame, see transforms.depth_training."""
    return transforms.depth_training(
      self.eval_transform(example),
      rng,
      position,
      crop=self.crop,
      cut_depth=self.cut_depth,
      depth_scale=DEPTH_SCALE,
      max_depth=MAX_DEPTH,
      colour=self.colour,
    )

  def eval_transform(self, example: Example) -> Example:
    """The whole frame, resized where asked."""
    return example if self.resize is None else transforms.resize(example, size=self.resize)


class Frames:
  """Random access to the frames of one split; reading starts with `[]`."""

  def __init__(self, folder: Path, pairs: list[tuple[str, str]], class_ids: list[int]):
    self.folder, self.pairs, self.class_ids = folder, pairs, class_ids

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, index: int) -> Example:
    image_path, depth_path = (self.folder / name for name in self.pairs[index])
    image, depth = files.read_image(image_path), files.read_depth(depth_path, scale=DEPTH_SCALE)
    if image.shape[:2] != depth.shape:
      sizes = ["{}x{}".format(*array.shape[:2]) for array in (depth, image)]
      raise ValueError(f"depth file {depth_path} is {sizes[0]}, but its image {image_path} is {sizes[1]}.")
    return {
      "image": image,
      "depth": depth,
      "class_id": np.asarray(self.class_ids[index], np.int32),
      "index": np.asarray(index, np.int32),
    }


def scene_classes(names: list[str]) -> list[int]:
  """Class of each frame: the lowest index whose class name is a substring of '<folder>_<file>'.

  So 'study_room' becomes 'study' and 'office_kitchen' becomes 'kitchen': classes 5 and 19 never occur.

  Raises:
    ValueError: frames of no class, the first ten and their number.

  Source: VPD depth/dataset/nyudepthv2.py, `__getitem__`.
  """
  labels = ["_".join(name.split("/")[-2:]) for name in names]
  ids = [next((index for index, scene in enumerate(CLASSES) if scene in label), -1) for label in labels]
  unknown = [name for name, index in zip(names, ids, strict=True) if index < 0]
  if unknown:
    raise ValueError(
      f"{len(unknown)} frames lie in folders of no scene class: {', '.join(unknown[: files.SHOWN])}; "
      f"folder names must contain one of {', '.join(CLASSES)}."
    )
  return ids


def check_size(option: str, size: tuple[int, int]) -> tuple[int, int]:
  """(height, width) as two positive whole numbers, or a ValueError that names the option."""
  sides = tuple(size) if isinstance(size, tuple | list) else (size,)
  if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
    raise ValueError(f"{option}={size!r} must be (height, width), two positive whole numbers.")
  return sides
