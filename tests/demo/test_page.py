"""The page in a browser: upload, result, download, messages, what is left on disk. Needs extra `browser`, Chromium."""

import importlib.util
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import one_convolution
from vpd_jax.demo import results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium"]
pytestmark = [
  pytest.mark.skipif(bool(MISSING), reason=f"the page is not tested: {', '.join(MISSING)} not installed"),
  # Gradio and Playwright leave sockets and event loops to the garbage collector.
  pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
SECONDS = 120  # until the page has done what is asked


@pytest.fixture(scope="module")
def served():
  """Address and folder of a page whose network is random."""
  with one_convolution.known(), tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    patch.setitem(os.environ, "GRADIO_TEMP_DIR", folder)
    patch.setitem(os.environ, "GRADIO_ANALYTICS_ENABLED", "False")
    from vpd_jax.demo import page

    patch.setattr(page, "MAX_BYTES", 200_000)
    made = page.Page({"depth": results.Network(one_convolution.rooms())}, Path(folder) / "sessions")
    yield made.launch("127.0.0.1", None), Path(folder)
    made.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield chromium
    chromium.close()


@pytest.fixture
def opened(served, browser):
  """The page, just opened; it may ask nobody else for anything."""
  page = browser.new_page(viewport={"width": 1280, "height": 1500})
  page.set_default_timeout(1000 * SECONDS)
  others = []
  page.on(
    "request",
    lambda request: None if request.url.startswith((served[0], "blob:", "data:")) else others.append(request.url),
  )
  page.goto(served[0])
  page.get_by_label("Point cloud", exact=True).wait_for()  # what this network takes is shown once it is loaded
  yield page
  page.close()
  assert not others


def upload(page, path, content):
  path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)
  page.locator("#picture input[type=file]").set_input_files(path)


def noise(size):
  return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


def test_a_picture_becomes_files_that_go_with_the_page(opened, served, tmp_path):
  upload(opened, tmp_path / "kitchen.png", noise((64, 96)))
  opened.locator("#preview img").wait_for()
  opened.get_by_role("button", name="Predict").click()
  with opened.expect_download() as loading:
    opened.locator("#files a").nth(3).click()
  assert loading.value.suggested_filename == "kitchen.npy"
  loading.value.save_as(tmp_path / "kitchen.npy")
  depth = np.load(tmp_path / "kitchen.npy")
  assert depth.shape == (64, 96) and depth.dtype == np.float32
  names = opened.locator("#files").inner_text()
  assert all(f"kitchen{end}" in "".join(names.split()) for end in (".ply", ".color.png", ".depth.png", ".npy", ".json"))

  shown = opened.locator("#result img").bounding_box()  # in the middle of it, at its own size, with the bar
  wide = opened.locator("#result img").evaluate("image => image.naturalWidth")
  assert wide > 96
  place = {"x": (shown["width"] - wide) / 2 + 10, "y": (shown["height"] - 64) / 2 + 20}
  opened.locator("#result img").click(position=place)
  pointed = opened.get_by_text("at column")
  pointed.wait_for()
  meters, column, row = re.fullmatch(r"(.+) m at column (\d+), row (\d+)", pointed.inner_text()).groups()
  assert abs(int(column) - 10) <= 1 and abs(int(row) - 20) <= 1  # browsers cut fractions of pixels
  assert meters == f"{depth[int(row), int(column)]:.2f}"

  before = opened.locator("#result img").get_attribute("src")
  opened.get_by_role("slider").first.click(position={"x": 20, "y": 5})
  opened.wait_for_function("before => document.querySelector('#result img').src != before", arg=before)

  sessions = served[1] / "sessions"
  assert any(sessions.iterdir())
  opened.close()
  deadline = time.monotonic() + SECONDS
  while any(sessions.iterdir()) and time.monotonic() < deadline:
    time.sleep(0.2)
  assert not any(sessions.iterdir())


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("notes.txt", b"no picture", "notes.txt is not a picture in a supported format"),
    ("cut.png", b"\x89PNG\r\n\x1a\n", "cut.png"),
    ("large.bmp", noise((300, 300)), "File(s) exceed the maximum allowed size of 195.3 Kb"),
  ],
)
def test_what_is_no_picture_is_a_message(opened, tmp_path, name, content, message):
  upload(opened, tmp_path / name, content)
  told = opened.get_by_test_id("toast-body")
  told.wait_for()
  assert message in told.inner_text() and "Traceback" not in opened.content()
  opened.get_by_role("button", name="Predict").click()  # the page goes on
