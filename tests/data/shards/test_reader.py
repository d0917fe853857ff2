"""What a data set reads of its files is read once in a run."""

import gc
import inspect
import pickle
import weakref

import pytest

from tests.helpers import coco_people
from tests.helpers.turned_pictures import MADE, write
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.data.shards import reader
from vpd_jax.experiment import DATASETS
from vpd_jax.files import reading

DRAWN = {"rooms", "room_figures"}  # have no files


class Counted:
  def __init__(self, broken=False):
    self.calls, self.broken = [], broken

  @reader.read_once
  def source(self, split):
    self.calls.append(split)
    if self.broken:
      raise ValueError("broken")
    return [split]


def test_a_source_is_made_once_for_each_split_and_data_set():
  first, second = Counted(), Counted()
  assert first.source("train") is first.source("train") and first.source("eval") == ["eval"]
  assert second.source("train") is not first.source("train")
  assert first.calls == ["train", "eval"] and second.calls == ["train"]
  assert pickle.loads(pickle.dumps(first)).__dict__ == first.__dict__  # what was read does not travel to workers
  held, alive = len(reader._READ), weakref.ref(first)
  del first
  gc.collect()
  assert alive() is None and len(reader._READ) < held  # those of other tests may go, too


def test_an_error_is_told_again():
  broken = Counted(broken=True)
  for _ in range(2):
    with pytest.raises(ValueError, match="broken"):
      broken.source("train")
  assert broken.calls == ["train", "train"]


@pytest.mark.parametrize("name", sorted(set(DATASETS) - DRAWN))
def test_every_data_set_of_files_reads_once(name):
  source = inspect.getattr_static(DATASETS[name], "source")
  assert getattr(source, "__wrapped__", None) is not None, f"decorate {name}.source with reader.read_once"


@pytest.mark.parametrize("name", MADE)
def test_data_of_ones_own_is_the_same_object_at_every_call(tmp_path, name):
  data = MADE[name][0](write(tmp_path / "data", 1), "stored")
  assert data.source("train") is data.source("train") and data.source("eval") is data.source("eval")
  assert len(pickle.dumps(data)) < 5000


def test_annotations_are_read_once_for_people_and_truth(tmp_path, monkeypatch):
  seen, read = [], reading.read_json
  monkeypatch.setattr(reading, "read_json", lambda path, **options: (seen.append(str(path)), read(path, **options))[1])
  data = CocoPose(root=str(coco_people.write(tmp_path / "coco")), complete=False)
  for _ in range(3):
    data.source("train"), data.source("eval"), data.truth("eval"), data.describe()
  assert len(seen) == len(set(seen)) == 3  # two files of annotations, one of detections
