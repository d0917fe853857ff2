"""Event files through both backends, metrics.jsonl, progress, tables."""

import errno
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from vpd_jax.monitoring import writers

WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
from vpd_jax.monitoring import writers
with writers.create(sys.argv[1]) as writer:
  writer.write_scalars(1, {"train/loss": 0.5})
loaded = [name for name in sys.modules if name.startswith("clu.metric_writers")]
print(type(writer._backend).__name__, loaded, "torch" in sys.modules)
"""


def write_all(folder, backend):
  with writers.create(folder, backend=backend) as writer:
    for step in (1, 2):
      writer.write_scalars(step, {"train/loss": np.float32(1 / step), "lr/unet": 1e-3})
    writer.write_images(2, {"eval/panel": np.zeros((2, 4, 8, 3), np.uint8)})
    writer.write_texts(0, {"config": "lr: 1"})
    writer.write_hparams(
      {"optim": {"lr": 1e-3, "groups": (("/vae/", None),), "mirror": True}, "name": "x", "none": None}
    )


def events(folder):
  accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
  accumulator.Reload()
  return accumulator


def assert_lines(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], line["train/loss"], line["lr/unet"]) for line in lines] == [(1, 1.0, 1e-3), (2, 0.5, 1e-3)]
  assert all(line["time"] > 0 for line in lines)


def test_clu_writes_scalars_images_texts_and_hyperparameters(tmp_path):
  write_all(tmp_path, "clu")
  read = events(tmp_path)
  loss = [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in read.Tensors("train/loss")]
  assert loss == [(1, 1.0), (2, 0.5)]
  assert {"lr/unet", "eval/panel", "config"} <= set(read.Tags()["tensors"])
  assert any("hparams" in tag for tag in read.summary_metadata)
  assert len(read.Tensors("eval/panel")[0].tensor_proto.string_val) == 2 + 2  # width, height, two pictures
  assert_lines(tmp_path)
  import tensorflow as tf

  assert not tf.config.get_visible_devices("GPU")


def test_tensorboardx_writes_the_same(tmp_path):
  write_all(tmp_path, "tensorboardX")
  read = events(tmp_path)
  assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
  assert (read.Images("eval/panel")[0].height, read.Images("eval/panel")[0].width) == (8, 8)
  assert any("config" in tag for tag in read.Tags()["tensors"])
  assert any("hparams" in tag for tag in read.summary_metadata)
  assert_lines(tmp_path)


def test_without_tensorflow_training_can_log(tmp_path):
  command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.stdout.strip() == "_TensorboardX [] False", done.stderr
  assert events(tmp_path).Scalars("train/loss")[0].value == 0.5


def test_local_folders_do_without_tensorflow_and_buckets_take_it(tmp_path, monkeypatch):
  chosen = []
  monkeypatch.setattr(writers, "_clu", lambda folder: chosen.append("clu"))
  monkeypatch.setattr(writers, "_TensorboardX", lambda folder: chosen.append("tensorboardX"))
  for workdir in (tmp_path, f"memory://{tmp_path}"):
    monkeypatch.setattr(writers.epath, "Path", lambda path: tmp_path)
    writers.create(workdir)
  assert chosen == ["tensorboardX", "clu"]


def test_a_resumed_run_adds_to_its_lines(tmp_path):
  for step in (1, 2):
    with writers.create(tmp_path, backend="tensorboardX") as writer:
      writer.write_scalars(step, {"train/loss": float("nan")})
  assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("backend", ["clu", "tensorboardX"])
def test_no_pictures_are_nothing_to_write(tmp_path, backend):
  """eval.panels=0."""
  with writers.create(tmp_path, backend=backend) as writer:
    writer.write_images(1, {"panels/rooms": np.zeros((0, 1, 1, 3), np.uint8)})


def test_just_logging_writes_no_file(tmp_path):
  with writers.create(tmp_path / "none", just_logging=True) as writer:
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.write_images(1, {"panel": np.zeros((1, 2, 2, 3), np.uint8)})
    writer.write_texts(1, {"a": "b"})
    writer.write_hparams({"a": 1})
  assert not (tmp_path / "none").exists()


def test_wrong_backends_are_refused(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"config.writer='tensorboard' is unknown; choose one of"):
    writers.create(tmp_path, backend="tensorboard")
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(ValueError, match=r"config.writer='clu' needs TensorFlow: pip install 'vpd_jax\[clu\]'"):
    writers.create(tmp_path, backend="clu")


def test_progress_leaves_out_compilation_and_pauses():
  now = [0.0]
  progress = writers.Progress(num_steps=100, images_per_step=8, start=10, devices=2, clock=lambda: now[0])
  now[0] += 30.0  # compiles
  assert progress.report(20, 1.0)[1]["perf/step_ms"] == pytest.approx(3000)
  for step in (30, 40):
    with progress.pause():
      now[0] += 1000.0
    now[0] += 5.0
    line, scalars = progress.report(step, 0.41234)
  assert line == "step 40/100 (40%)  loss 0.4123  16.0 img/s  500 ms/step  ETA 30s"
  assert scalars == pytest.approx({"perf/step_ms": 500, "perf/img_per_sec": 16, "perf/img_per_sec_per_chip": 8})


def test_progress_without_a_finished_step_has_no_speed():
  assert writers.Progress(10, 8, start=10).report(10, 0.5) == ("step 10/10  loss 0.5", {})


def test_a_table_pads_and_puts_numbers_to_the_right():
  text = writers.table([("group", "arrays", "lr"), ("unet", 12345, 0.01), ("rest", 7, 1.0)])
  assert text.splitlines() == [
    "group  arrays    lr",
    "-----  ------  ----",
    "unet   12,345  0.01",
    "rest        7   1.0",
  ]
  assert writers.table([("group", "arrays")]).splitlines() == ["group  arrays", "-----  ------"]


def test_the_overview_names_every_array():
  text = writers.parameter_overview({"method/unet/a/kernel": np.zeros((2, 3)), "neck/b/bias": np.zeros(3)})
  assert "method/unet/a/kernel" in text and "Total: 9" in text


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_a_failed_event_file_is_an_error_instead_of_a_wait_without_end(tmp_path, monkeypatch, seconds):
  """Also if it fails while more scalars are written than tensorboardX's queue holds."""

  def fail(_):
    time.sleep(seconds)
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(threading, "excepthook", lambda _: None)
  writer = writers.create(tmp_path, backend="tensorboardX")
  monkeypatch.setattr(writer._backend._event_writer._ev_writer, "write_event", fail)
  scalars = {f"train/{number}": 0.5 for number in range(40)}
  message = rf"^{tmp_path} cannot be written \(the event file has failed\); check the disk"
  with pytest.raises(OSError, match=message):
    writer.write_scalars(1, scalars)
  with pytest.raises(OSError, match=message):
    writer.write_images(2, {"b": np.zeros((1, 2, 2, 3))})
  with pytest.raises(OSError, match=message):
    writer.close()
  with pytest.raises(ValueError, match="the first error"), writer:
    raise ValueError("the first error")


def test_a_writer_may_be_closed_twice(tmp_path):
  with writers.create(tmp_path, backend="tensorboardX") as writer:
    writer.write_scalars(1, {"a": 1.0})
    writer.close()


def test_a_line_that_was_cut_off_is_removed_before_others_follow(tmp_path):
  for end, kept in (('{"step": 2, "ti', []), ('{"step": 2}', [2]), ('{"step": 2}\n', [2])):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
    with writers.create(tmp_path, backend="tensorboardX") as writer:
      writer.write_scalars(3, {})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, *kept, 3]


def test_lines_that_cannot_be_written_name_their_file(tmp_path):
  with writers.create(tmp_path, backend="tensorboardX") as writer:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(.*\); check the disk space, then give"):
      writer.write_scalars(1, {})
