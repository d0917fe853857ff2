import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.paths import ROOT
from tests.helpers.squares import KEYS, Records, Squares, sharding
from vpd_jax.data import pipeline
from vpd_jax.data.shards import reader


def observe_process(example):
  """A host transform that reports from the process in which it runs."""
  from jax._src import xla_bridge

  return dict(
    example,
    process=np.asarray(os.getpid()),
    cpu_only=np.asarray(jax.config.jax_platforms == "cpu" and os.environ["JAX_PLATFORMS"] == "cpu"),
    touched=np.asarray(xla_bridge.backends_are_initialized()),
  )


def take(count, dataset=None, **options):
  """The first batches, and the iterator closed behind them."""
  options = {"batch_size": 6, "seed": 3, "keys": KEYS, **options}
  iterator = pipeline.train_batches(dataset or Squares(), **options)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


def test_each_epoch_holds_every_record_once_in_another_order():
  batches = take(10)  # 60 places: 6 epochs of 10, which a batch of 6 does not divide
  indices = np.concatenate([batch["index"] for batch in batches]).reshape(6, 10)
  positions = np.concatenate([batch["position"] for batch in batches]).reshape(6, 10)
  np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(10), (6, 1)))
  np.testing.assert_array_equal(positions, np.tile(np.arange(10), (6, 1)))
  assert len({tuple(epoch) for epoch in indices}) == 6
  noise = np.concatenate([batch["noise"] for batch in batches])
  assert len(set(noise)) == 60  # random numbers belong to the place, so that no epoch repeats another's


def test_epochs_keep_their_order_where_they_are_not_reshuffled():
  batches = take(10, reshuffle_each_epoch=False)
  indices = np.concatenate([batch["index"] for batch in batches]).reshape(6, 10)
  np.testing.assert_array_equal(indices, np.tile(indices[0], (6, 1)))
  np.testing.assert_array_equal(indices[0], np.concatenate([batch["index"] for batch in take(2)])[:10])
  positions = np.concatenate([batch["position"] for batch in batches]).reshape(6, 10)
  np.testing.assert_array_equal(positions, np.tile(np.arange(10), (6, 1)))
  assert len(set(np.concatenate([batch["noise"] for batch in batches]))) == 60  # every epoch is augmented anew
  assert_same(take(3, reshuffle_each_epoch=False, start_step=7), batches[7:])


def test_batches_depend_on_seed_and_step_only():
  batches = take(8)
  assert_same(take(8), batches)
  assert_same(take(3, start_step=5), batches[5:])
  assert (take(1, seed=4)[0]["index"] != batches[0]["index"]).any()
  assert set(batches[0]) == set(KEYS)
  assert batches[0]["image"].shape == (6, 40, 50, 3)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_rows_of_all_processes_make_the_global_batch(processes):
  parts = [take(3, start_step=4, process_index=i, process_count=processes) for i in range(processes)]
  joined = [{key: np.concatenate([part[step][key] for part in parts]) for key in KEYS} for step in range(3)]
  assert_same(joined, take(3, start_step=4))


def test_workers_give_the_same_batches_and_never_touch_an_accelerator(recwarn):
  keys = (*KEYS, "process", "cpu_only", "touched")
  batches = take(4, workers=2, start_step=1, keys=keys, prepare=observe_process)
  assert len({int(pid) for batch in batches for pid in batch["process"]} - {os.getpid()}) == 2
  assert all(batch["cpu_only"].all() and not batch["touched"].any() for batch in batches)
  assert_same([{key: batch[key] for key in KEYS} for batch in batches], take(4, start_step=1))
  assert not [warning for warning in recwarn if "shared_memory" in str(warning.message)]


def test_the_error_of_a_bad_record_reaches_the_main_process():
  for workers in (0, 1):
    iterator = pipeline.train_batches(Squares(10, bad=7), batch_size=10, seed=0, workers=workers, keys=("index",))
    with pytest.raises(ValueError, match=r"folder/file_7\.png is truncated"):
      next(iterator)
    iterator.close()


def skipping(count, bad, **options):
  """Batches of ten records in spite of bad ones, their iterator closed, and what it has counted."""
  options = {"batch_size": 6, "seed": 3, "keys": KEYS, "on_bad_record": "skip", **options}
  iterator = pipeline.train_batches(Squares(10, bad), **options)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches, iterator.skipped


def test_a_bad_record_is_replaced_by_the_next_readable_one_and_nothing_else_changes(capsys):
  expected = take(10)
  batches, skipped = skipping(10, bad=(4, 5, 9))
  replaced = 0
  for batch, whole in zip(batches, expected, strict=True):
    assert set(batch) == set(KEYS)
    index = whole["index"]
    replaced += np.isin(index, (4, 5, 9)).sum()
    np.testing.assert_array_equal(batch["index"], np.select([index == 4, index == 5, index == 9], [6, 6, 0], index))
    for key in ("position", "noise"):
      np.testing.assert_array_equal(batch[key], whole[key])
  assert skipped == replaced == 3 * 6  # three in each of six epochs
  lines = capsys.readouterr().err.splitlines()
  assert sorted(lines) == [
    f"skipped and replaced by the next record: folder/file_{bad}.png is truncated." for bad in (4, 5, 9)
  ]


def test_a_programming_error_in_a_source_is_no_bad_record():
  class WrongRecords(Records):
    def __getitem__(self, index):
      raise ValueError("operands could not be broadcast together")

  class Wrong(Squares):
    def source(self, split):
      return WrongRecords(10, None)

  batches = pipeline.train_batches(Wrong(), batch_size=6, seed=3, keys=KEYS, on_bad_record="skip")
  with pytest.raises(ValueError, match=r"^operands could not be broadcast"):
    next(batches)
  batches.close()


def test_which_records_are_skipped_depends_on_the_files_only(capsys):
  expected, _ = skipping(6, bad=(4, 5))
  for options in (dict(workers=2), dict(start_step=3)):
    start = options.get("start_step", 0)
    assert_same(skipping(6 - start, bad=(4, 5), **options)[0], expected[start:])
  halves = [skipping(6, bad=(4, 5), process_index=i, process_count=2) for i in range(2)]
  joined = [{key: np.concatenate([half[0][step][key] for half in halves]) for key in KEYS} for step in range(6)]
  assert_same(joined, expected)
  assert halves[0][1] + halves[1][1] == skipping(6, bad=(4, 5), workers=1)[1] > 0
  assert_same(take(6), skipping(6, bad=None)[0])
  assert "file_4.png" in capsys.readouterr().err


def test_too_many_bad_records_in_a_row_stop_all_the_same():
  with pytest.raises(ValueError, match=r"^10 records in a row cannot be read, the first: folder/file_\d\.png is trunc"):
    skipping(1, bad=tuple(range(10)))
  with pytest.raises(ValueError, match=r"^11 records in a row cannot be read"):
    reader.SkipUnreadable(Records(100, tuple(range(20, 40))))[25]
  assert reader.SkipUnreadable(Records(100, tuple(range(20, 30))))[20]["index"] == 30
  with pytest.raises(ValueError, match=r"^on_bad_record='ignore' is unknown; choose one of \('stop', 'skip'\)\.$"):
    skipping(1, bad=None, on_bad_record="ignore")


def test_a_bad_record_always_stops_an_evaluation():
  with pytest.raises(ValueError, match=r"folder/file_7\.png is truncated"):
    list(pipeline.eval_batches(Squares(10, bad=7), batch_size=4, keys=("index",)))


class Ending(Squares):
  """A data set of which one part raises StopIteration at the record 3."""

  def __init__(self, where):
    super().__init__()
    self.where = where

  def source(self, split):
    return EndingRecords(self.records, None) if self.where == "source" else super().source(split)

  def train_transform(self, example, rng, position):
    return super().train_transform(self.eval_transform(example), rng, position)

  def eval_transform(self, example):
    return next(iter(())) if self.where == "transform" and example["index"] == 3 else example


class EndingRecords(Records):
  def __getitem__(self, index):
    return next(iter(())) if index == 3 else super().__getitem__(index)


def ending_prepare(example):
  return next(iter(())) if example["index"] == 3 else example


@pytest.mark.parametrize("where", ["source", "transform", "prepare"])
def test_a_stop_inside_a_record_is_an_error_and_no_end(where):
  prepare = ending_prepare if where == "prepare" else None
  for on_bad_record in reader.ON_BAD_RECORD:
    with pytest.raises(RuntimeError, match="raised StopIteration, as next"):
      take(2, Ending(where), prepare=prepare, on_bad_record=on_bad_record)
  for batches in (
    pipeline.eval_batches(Ending(where), batch_size=2, keys=("index",), prepare=prepare),
    pipeline.eval_examples(Ending(where), prepare=prepare),
  ):
    with pytest.raises(RuntimeError, match="raised StopIteration, as next"):
      list(batches)


def test_prefetch_counts_what_the_batches_it_has_given_left_out(capsys):
  iterator = pipeline.train_batches(Squares(10, 4), batch_size=10, seed=0, keys=("index",), on_bad_record="skip")
  ahead = pipeline.Prefetch(iterator, replicated())
  counts = []
  for _ in range(4):
    next(ahead)
    counts.append(ahead.skipped)
  ahead.close()
  assert counts == [1, 2, 3, 4]
  assert capsys.readouterr().err.count("file_4.png") == 1


@pytest.mark.parametrize(("records", "processes"), [(7, 1), (8, 2), (9, 2), (1, 4)])
def test_evaluation_visits_every_record_once_in_order(records, processes):
  parts = [
    list(
      pipeline.eval_batches(
        Squares(records), batch_size=4, keys=("index", "image"), process_index=i, process_count=processes
      )
    )
    for i in range(processes)
  ]
  assert {len(part) for part in parts} == {-(-records // 4)}
  rows = [
    {key: np.concatenate([part[i][key] for part in parts]) for key in ("index", "real")} for i in range(len(parts[0]))
  ]
  assert all(row["index"].shape == row["real"].shape == (4,) for row in rows)
  index, real = (np.concatenate([row[key] for row in rows]) for key in ("index", "real"))
  assert real.dtype == bool
  np.testing.assert_array_equal(index[real], np.arange(records))
  np.testing.assert_array_equal(index[~real], records - 1)


def test_evaluation_with_more_workers_than_batches():
  batches = list(pipeline.eval_batches(Squares(3), batch_size=4, keys=("index",), workers=2))
  assert_same(batches, list(pipeline.eval_batches(Squares(3), batch_size=4, keys=("index",))))


def test_prepare_runs_after_the_data_set_and_its_keys_are_kept():
  batch = take(1, keys=("length",), prepare=lambda example: dict(length=np.asarray(example["noise"] + 1)))[0]
  assert (batch["length"] > 1).all()


class Uneven(Squares):
  """The last record is of another size."""

  def train_transform(self, example, rng, position):
    return dict(example, image=np.zeros((2, 2 + (example["index"] == 9)), np.uint8))


def test_errors_are_one_line_and_say_what_to_do():
  for message, function in (
    (
      r"^batch_size=7 must be a positive multiple of the 2 processes; use 8\.$",
      lambda: take(1, batch_size=7, process_count=2),
    ),
    (
      r"^batch_size=1 must be a positive multiple of the 4 processes; use 4\.$",
      lambda: take(1, batch_size=1, process_count=4),
    ),
    (r"^batch_size=0 must be a positive multiple of the 1 processes; use 1\.$", lambda: take(1, batch_size=0)),
    (
      r"^an example has no 'depth'; it has \['image', 'index', 'noise', 'position'\]\.",
      lambda: take(1, keys=("depth",)),
    ),
    (r"^the train split has no records\.$", lambda: take(1, Squares(0))),
    (r"^'image' of one batch has the shapes \[\(2, 2\), \(2, 3\)\]; ", lambda: take(2, Uneven(), keys=("image",))),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      function()
    assert "\n" not in str(caught.value)


def replicated():
  return NamedSharding(sharding().mesh, P())


def test_to_mesh_keeps_values_and_splits_the_first_axis():
  batch = take(1, batch_size=8)[0]
  arrays = pipeline.to_mesh(batch, sharding())
  for key, array in arrays.items():
    assert isinstance(array, jax.Array)
    assert array.sharding.is_equivalent_to(sharding(), array.ndim)
    np.testing.assert_array_equal(np.asarray(array), batch[key].astype(array.dtype))


def test_batch_sizes_that_the_devices_cannot_share_fail_with_the_nearest_that_fits():
  pipeline.check_batch_size(24, 8, "devices")
  with pytest.raises(ValueError, match=r"^batch_size=22 must be a positive multiple of the 8 devices; use 24\.$"):
    pipeline.check_batch_size(22, 8, "devices")


@pytest.mark.multidevice
def test_to_mesh_checks_the_batch_against_the_devices():
  with pytest.raises(ValueError, match=r"^batch_size=6 must be a positive multiple of the 8 devices; use 8\.$"):
    pipeline.to_mesh({"index": np.zeros(6)}, sharding())
  array = pipeline.to_mesh({"index": np.arange(16)}, sharding())["index"]
  assert [shard.data.tolist() for shard in array.addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_prefetch_hands_on_all_batches_and_measures_the_wait():
  def slow():
    for step in range(3):
      time.sleep(0.05)
      yield {"index": np.full(8, step)}

  with_waits = pipeline.Prefetch(pipeline.HostBatches(slow()), sharding())
  batches = list(with_waits)
  assert [int(batch["index"][0]) for batch in batches] == [0, 1, 2]
  assert 10 < with_waits.mean_wait_ms() < 1000
  assert with_waits.mean_wait_ms() == 0
  with pytest.raises(StopIteration):
    next(with_waits)


def test_prefetch_raises_what_the_input_raised_and_closes_when_full():
  def failing():
    yield {"index": np.zeros(8)}
    raise ValueError("a bad record")

  iterator = pipeline.Prefetch(pipeline.HostBatches(failing()), sharding())
  next(iterator)
  with pytest.raises(ValueError, match="a bad record"):
    next(iterator)
  endless = pipeline.Prefetch(
    pipeline.train_batches(Squares(), batch_size=8, seed=0, keys=("index",)), sharding(), size=1
  )
  next(endless)
  endless.close()
  assert next(endless, None) is None


FORGETFUL = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers import squares
from vpd_jax.data import pipeline

if __name__ == "__main__":
  workers = pipeline.train_batches(squares.Squares(), batch_size=6, seed=0, workers=1, keys=("image",))
  ahead = pipeline.Prefetch(workers, squares.sharding())
  kept = [next(ahead) for _ in range(3)]
"""


def test_a_program_that_closes_nothing_ends_silently(tmp_path):
  script = tmp_path / "forgetful.py"
  script.write_text(FORGETFUL.format(root=str(ROOT)))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment)
  assert (ended.returncode, ended.stderr) == (0, "")
