"""scripts/benchmark_page.py: what a page says, and where it lies."""

import datetime
import json

import pytest

from tests.helpers.loaded_scripts import load
from vpd_jax.errors import UserError

script = load("scripts/benchmark_page.py")
DAY = datetime.date(2026, 11, 30)
OURS = {
  "device": "NVIDIA H200", "devices": 8, "mesh": {"data": 8, "fsdp": 1}, "batch": 24, "compile_s": 61.5,
  "step_ms": 20.0, "step_ms_p95": 29.0, "step_times_ms": [10.0, 20.0, 30.0], "images_per_sec_per_chip": 150.0,
  "model_tflop_per_image": 3.5, "model_tflops_per_sec_per_chip": 525.0, "share_of_peak": 0.531,
  "peak_bytes": 30 * 2**30, "compiler_peak_bytes": None, "resident_bytes": 5 * 2**30,
}  # fmt: skip
AROUND = {"commit": "0123abc", "versions": "python 3.11.7, jax 0.10.2", "host": "Linux x86_64, 2 CPU cores, load 0.1"}


def written(folder, **changes):
  command = ["scripts/benchmark.py", "--config=configs/nyu_depth.py", "--config.data.crop=(96, 96)"]
  return script.write("nyu", {"ours": OURS | changes}, command, AROUND, "as printed", folder=folder, date=DAY)


def test_a_page_holds_command_commit_versions_memory_throughput_and_share(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--one --two")
  path = written(tmp_path)
  assert path.name == "nyu_nvidia-h200_2026-11-30.md"
  text = path.read_text()
  assert "XLA_FLAGS='--one --two' " in text
  assert "python scripts/benchmark.py --config=configs/nyu_depth.py '--config.data.crop=(96, 96)'" in text
  said = (
    "30.00 GiB at the peak",
    "not reported by the ",
    "150 images per second and chip",
    "| share of peak | 53.1 % |",
  )
  said += ("20.0 ms median", "10.0 to 30.0 ms of 3 steps", "as printed")
  for words in (*AROUND.values(), *said):
    assert words in text
  assert json.loads(text.split("```json\n")[1].split("```")[0]) == {"step_times_ms": [10.0, 20.0, 30.0]}
  assert "| share of peak | peak not known |" in written(tmp_path, share_of_peak=None).read_text()


def test_a_page_of_the_same_day_stays(tmp_path):
  first, second = written(tmp_path), written(tmp_path, batch=48)
  assert second.name == "nyu_nvidia-h200_2026-11-30_2.md" and "batch 24" in first.read_text()
  assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("work", ["../x", "a b", "", ".hidden", "a/b"])
def test_a_name_that_is_none_of_a_file_is_refused(work):
  with pytest.raises(UserError, match=r"^--report="):
    script.check_work(work)


def test_the_surroundings_are_those_of_the_checkout():
  around = script.surroundings()
  assert "jax " in around["versions"] and "CPU cores" in around["host"]
  assert around["commit"] == "unknown" or len(around["commit"].split(",")[0]) == 40
