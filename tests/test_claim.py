"""A workdir belongs to one run at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from vpd_jax import claim

HOLD = """
import sys, time
from vpd_jax import claim
with claim.claimed(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
  with claim.claimed(tmp_path / "run") as lines:
    assert lines == []
    with (
      pytest.raises(ValueError, match=rf"run' is in use by another run \(process {os.getpid()} on .*choose another"),
      claim.claimed(tmp_path / "run"),
    ):
      pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="is in use by another run"), claim.claimed(tmp_path / "link"):
      pass
  assert not list((tmp_path / "run").iterdir())
  with claim.claimed(tmp_path / "run"):
    pass


def test_another_process_is_refused_until_it_is_killed(tmp_path):
  child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  try:
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"process {child.pid} on"), claim.claimed(tmp_path):
      pass
  finally:
    child.send_signal(signal.SIGKILL)
    child.communicate()
  assert (tmp_path / claim.LOCK).exists()  # left behind, and means nothing
  with claim.claimed(tmp_path):
    pass


def test_an_error_gives_it_back(tmp_path):
  with pytest.raises(KeyboardInterrupt), claim.claimed(tmp_path):
    raise KeyboardInterrupt
  with claim.claimed(tmp_path):
    pass


def test_where_nothing_can_keep_others_out_a_line_says_so(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", no_locks)
  with claim.claimed(tmp_path) as lines:
    assert lines == ["this file system has no locks (No locks available): start no second run in this workdir"]
  with claim.claimed("gs://bucket/run") as lines:
    assert "a bucket cannot keep" in lines[0]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir=.* cannot be used"), claim.claimed(tmp_path / "file"):
    pass


def test_a_name_that_could_not_be_read_again_is_refused_before_it_is_made(tmp_path):
  with pytest.raises(ValueError, match=r"workdir=.* holds \[ \]"), claim.claimed(tmp_path / "a[1]"):
    pass
  assert not list(tmp_path.iterdir())
