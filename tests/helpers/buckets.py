"""A bucket that is a folder."""

import pathlib

import pytest
from etils.epath import backend, gpath
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry, known_implementations


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket, kept in a folder by a filesystem of fsspec in place of gcsfs; (the folder, names opened)."""
  opened = []

  class Bucket(LocalFileSystem):
    protocol = ("gs", "gcs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
      path = str(path)
      return super()._strip_protocol(str(tmp_path / path[5:]) if path.startswith("gs://") else path)

    def _open(self, path, mode="rb", **kwargs):
      opened.append(pathlib.Path(path).relative_to(tmp_path / "bucket").as_posix())
      return super()._open(path, mode, **kwargs)

  caches = (gpath._is_tf_installed, backend.fsspec_backend._get_filesystem)
  monkeypatch.setenv("EPATH_USE_TF", "0")  # Where tensorflow is there, it reads gs:// by itself.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setitem(_registry, "gcs", Bucket)
  monkeypatch.setitem(known_implementations, "s3", {"class": "absent.S3", "err": "Install s3fs to access S3"})
  for cache in caches:
    cache.cache_clear()
  yield tmp_path / "bucket", opened
  monkeypatch.undo()
  for cache in caches:
    cache.cache_clear()
