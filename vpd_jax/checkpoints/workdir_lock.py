"""A lock that prevents two runs from using the same workdir at the same time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from etils import epath

from vpd_jax.errors import UserError
from vpd_jax.files import paths

LOCK = ".lock"
# File systems that do not support locks, or are mounted without them.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def claimed(workdir: str | epath.PathLike) -> Iterator[list[str]]:
  """Locks a workdir against other runs, on this machine and on others with the same file system.

  The operating system releases the lock when the process ends, even if it is killed; a remaining file has no effect.

  Args:
    workdir: a local folder, which is created; buckets have no locks.

  Yields:
    warnings, if the file system does not support locks.

  Raises:
    ValueError: another run holds the lock (one line that names it); the folder cannot be created or used.
  """
  if "://" in str(workdir):
    yield ["a bucket cannot keep a second run out of this workdir: start no other one in it"]
    return
  folder = pathlib.Path(workdir).expanduser()
  paths.check_name(epath.Path(folder.resolve()), "workdir")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder / LOCK, str(workdir))
  except OSError as error:
    if error.errno not in _UNKNOWN:
      raise UserError(f"workdir={str(workdir)!r} cannot be used: {error}; choose another.") from error
    yield [f"this file system has no locks ({error.strerror}): start no second run in this workdir"]
    return
  try:
    yield []
  finally:
    with contextlib.suppress(OSError):
      (folder / LOCK).unlink()  # before the lock is released, so that a waiting process notices the removal
    os.close(file)


def _locked(path: pathlib.Path, workdir: str) -> int:
  """Opens and locks the file, and writes a description of this process to it."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _same(file, path):
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # the disk is full; the lock itself is sufficient
          os.ftruncate(file, 0)
          os.pwrite(file, owner.encode(), 0)
        return file
    except BlockingIOError:
      owner = os.pread(file, 200, 0).decode(errors="replace") or "an unknown process"
      os.close(file)
      raise UserError(
        f"workdir={workdir!r} is in use by another run ({owner}); wait for it, end it, or choose another --workdir."
      ) from None
    except BaseException:
      os.close(file)
      raise
    os.close(file)  # the previous run has removed it in the meantime


def _same(file: int, path: pathlib.Path) -> bool:
  """Whether the open file still exists under its name."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False
