"""A workdir belongs to one run at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from vpd_jax.checkpoints import workdir_lock

HOLD = """
import sys, time
from vpd_jax.checkpoints import workdir_lock
with workdir_lock.claimed(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
  with workdir_lock.claimed(tmp_path / "run") as lines:
    assert lines == []
    with (
      pytest.raises(ValueError, match=rf"run' is in use by another run \(process {os.getpid()} on .*choose another"),
      workdir_lock.claimed(tmp_path / "run"),
    ):
      pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="is in use by another run"), workdir_lock.claimed(tmp_path / "link"):
      pass
  assert not list((tmp_path / "run").iterdir())
  with workdir_lock.claimed(tmp_path / "run"):
    pass


def test_another_process_is_refused_until_it_is_killed(tmp_path):
  child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  try:
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"process {child.pid} on"), workdir_lock.claimed(tmp_path):
      pass
  finally:
    child.send_signal(signal.SIGKILL)
    child.communicate()
  assert (tmp_path / workdir_lock.LOCK).exists()  # left behind, and means nothing
  with workdir_lock.claimed(tmp_path):
    pass


def test_an_error_gives_it_back(tmp_path):
  with pytest.raises(KeyboardInterrupt), workdir_lock.claimed(tmp_path):
    raise KeyboardInterrupt
  with workdir_lock.claimed(tmp_path):
    pass


def test_where_nothing_can_keep_others_out_a_line_says_so(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", no_locks)
  with workdir_lock.claimed(tmp_path) as lines:
    assert lines == ["this file system has no locks (No locks available): start no second run in this workdir"]
  with workdir_lock.claimed("gs://bucket/run") as lines:
    assert "a bucket cannot keep" in lines[0]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir=.* cannot be used"), workdir_lock.claimed(tmp_path / "file"):
    pass


def test_a_name_that_could_not_be_read_again_is_refused_before_it_is_made(tmp_path):
  with pytest.raises(ValueError, match=r"workdir=.* holds \[ \]"), workdir_lock.claimed(tmp_path / "a[1]"):
    pass
  assert not list(tmp_path.iterdir())
