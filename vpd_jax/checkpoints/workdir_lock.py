"""A workdir belongs to one run at a time."""

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
# A file system without locks, or one that is mounted without them.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def claimed(workdir: str | epath.PathLike) -> Iterator[list[str]]:
  """Holds a workdir against other runs, on this machine and on others that see the same file system.

  The system itself gives the lock back when the process ends, however it ends; a file that is left means nothing.

  Args:
    workdir: a local folder, which is made; a bucket has no locks.

  Yields:
    a line where the file system cannot keep other runs away.

  Raises:
    ValueError: another run has it, one line that says which; it cannot be made, or not be read again.
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
      (folder / LOCK).unlink()  # before it is given back: whoever waits for it sees that it is gone
    os.close(file)


def _locked(path: pathlib.Path, workdir: str) -> int:
  """The open file, with the lock and with words about this process in it."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _same(file, path):
        words = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # of a full disk: the lock is what counts
          os.ftruncate(file, 0)
          os.pwrite(file, words.encode(), 0)
        return file
    except BlockingIOError:
      words = os.pread(file, 200, 0).decode(errors="replace") or "an unknown process"
      os.close(file)
      raise UserError(
        f"workdir={workdir!r} is in use by another run ({words}); wait for it, end it, or choose another --workdir."
      ) from None
    except BaseException:
      os.close(file)
      raise
    os.close(file)  # the run before has removed it in the meantime


def _same(file: int, path: pathlib.Path) -> bool:
  """Whether the open file still stands under its name."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False
