"""The Gradio page: inputs on the left, predictions on the right."""

import functools
import hashlib
import html
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import gradio as gr  # pyright: ignore[reportMissingImports]
from gradio import themes  # pyright: ignore[reportMissingImports]

from vpd_jax.demo import results
from vpd_jax.demo.results import Inputs, Network
from vpd_jax.errors import UserError
from vpd_jax.types import Fields

TITLE = "vpd_jax"
ABOUT = (
  "# vpd_jax\nDrop a picture, say what is to be found in it, and take the files, which are those of `--mode=predict`. "
  "They are removed when the page is closed, after an hour at the latest."
)
MAX_BYTES = 100 * 2**20  # of an upload
CLEANUP_INTERVAL, MAX_AGE = 300, 3600  # seconds, for files of browsers that have disconnected
MAX_QUEUE = 32  # predictions
SYSTEM_FONTS = [themes.Font(name) for name in ("system-ui", "sans-serif")]  # Gradio's fonts are downloaded
MONO_FONTS = [themes.Font(name) for name in ("ui-monospace", "monospace")]

# Enlarges small input images. Results are not enlarged, since Gradio would then report wrong click positions.
CSS = "#preview img { width: 100%; height: 100%; object-fit: contain; }"


def _shows_errors(function: Callable[..., object]) -> Callable[..., object]:
  """Decorator that shows user errors as messages on the page."""

  @functools.wraps(function)
  def wrapped(*arguments: object, **options: object) -> object:
    try:
      return function(*arguments, **options)
    except UserError as error:
      raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None

  return wrapped


class Page:
  """The page for some networks, which writes its files below a folder; `blocks` is the Gradio app."""

  def __init__(self, networks: dict[str, Network], folder: Path):
    self._networks, self._folder = networks, folder
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CLEANUP_INTERVAL, MAX_AGE)) as self.blocks:
      gr.Markdown(ABOUT)
      self._build()
      self._connect()
      self.blocks.unload(self._forget)
    self.blocks.queue(max_size=MAX_QUEUE, api_open=False)

  def launch(self, host: str, port: int | None) -> str:
    """Serves the page from a background thread until `blocks.close()`; returns its address.

    Raises:
      ValueError: if the port is not free.
    """
    _, address, _ = self.blocks.launch(
      server_name=host,
      server_port=port,
      share=False,
      quiet=True,
      prevent_thread_lock=True,
      max_file_size=MAX_BYTES,
      run_history=False,
      ssr_mode=False,
      footer_links=[],
      enable_monitoring=False,
      css=CSS,
      theme=themes.Default(font=SYSTEM_FONTS, font_mono=MONO_FONTS),
    )
    return address

  def _build(self) -> None:
    first = next(iter(self._networks))
    self.shown, self.depth = gr.State(), gr.State()  # task and .npy file of the shown result
    with gr.Row():
      with gr.Column():
        self.task = gr.Radio([*self._networks], value=first, label="Task", visible=len(self._networks) > 1)
        self.notice = gr.Markdown()
        self.file = gr.File(label="Picture: drop it here", height=120, elem_id="picture")
        self.room = gr.Button("Draw a room", size="sm", visible=False)
        self.preview = gr.Image(
          show_label=False, interactive=False, visible=False, buttons=[], height=300, elem_id="preview"
        )
        self.sentence = gr.Textbox(label="Sentence", placeholder="the red box", visible=False)
        self.class_name = gr.Dropdown([""], value="", label="Class of the picture", visible=False)
        self.boxes = gr.Textbox(
          label="People: x, y, width, height in pixels, one a line; empty: the whole picture is one person",
          lines=2,
          visible=False,
        )
        self.attention = gr.Checkbox(False, label="Attention to each class", visible=False)
        self.ply = gr.Checkbox(True, label="Point cloud", visible=False)
        self.focal = gr.Number(0, label="Focal length in pixels; 0: as the photo says, else assumed", visible=False)
        self.go = gr.Button("Predict", variant="primary")
      with gr.Column():
        self.result = gr.Image(
          show_label=False, interactive=False, format="png", buttons=["fullscreen"], height=420, elem_id="result"
        )
        with gr.Group(visible=False) as self.colors:
          self.pointed = gr.Markdown("Click on the result to read the depth there.", padding=True)
          self.nearest = gr.Slider(0, 1, label="Red from, meters")
          self.farthest = gr.Slider(0, 1, label="Blue from, meters")
        self.cloud = gr.Model3D(
          label="Point cloud: drag to turn it",
          display_mode="point_cloud",
          visible=False,
          camera_position=(90, 90, None),
        )
        self.files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
        with gr.Accordion("The .json file", open=False):
          self.facts = gr.JSON(show_label=False)

  def _connect(self) -> None:
    hidden: Fields = {"api_visibility": "private"}
    network: Fields = hidden | {"concurrency_limit": 1, "concurrency_id": "network"}
    inputs = [self.sentence, self.class_name, self.boxes, self.attention, self.ply, self.focal]
    task_inputs = [self.notice, self.room, *inputs]
    gr.on([self.blocks.load, self.task.change], self._choose, [self.task], task_inputs, **network)
    self.file.upload(self._preview, [self.file], [self.preview], **hidden)
    self.file.clear(lambda: gr.Image(None, visible=False), None, [self.preview], **hidden)
    room_outputs = [self.file, self.preview, self.sentence, self.boxes]
    self.room.click(self._draw, [self.task], room_outputs, **network)
    outputs = [self.shown, self.depth, self.result, self.colors, self.pointed, self.nearest, self.farthest]
    outputs += [self.cloud, self.files, self.facts]
    gr.on([self.go.click, self.sentence.submit], self._predict, [self.task, self.file, *inputs], outputs, **network)
    self.result.select(self._point, [self.depth], [self.pointed], show_progress="hidden", **hidden)
    for slider in (self.nearest, self.farthest):
      range_inputs = [self.shown, self.depth, self.nearest, self.farthest]
      slider.release(self._recolor, range_inputs, [self.result], show_progress="hidden", **hidden)

  @_shows_errors
  def _choose(self, task: str) -> list[object]:
    """Updates for the inputs of a task, in the order of `task_inputs`."""
    network = self._networks[task]
    predictor = network.predictor
    depth = predictor.experiment.task.measures_depth
    classes = predictor.experiment.classes if predictor.takes_class else ()
    return [
      gr.Markdown(network.notice),
      gr.Button(visible=network.draws),
      gr.Textbox(visible=predictor.takes_sentence),
      gr.Dropdown([("not given", ""), *classes], value="", visible=len(classes) > 1),
      gr.Textbox(visible=predictor.takes_boxes),
      gr.Checkbox(visible=predictor.draws_attention),
      gr.Checkbox(visible=depth),
      gr.Number(visible=depth),
    ]

  @_shows_errors
  def _preview(self, path: str | None) -> object:
    return gr.Image(results.preview(results.read_picture(path)), visible=True)

  @_shows_errors
  def _draw(self, task: str, request: gr.Request) -> list[object]:
    predictor = self._networks[task].predictor
    path, sentence, boxes = results.drawn_room(predictor, self._session_folder(request), secrets.randbelow(10**6))
    return [str(path), self._preview(str(path)), sentence, boxes]

  @_shows_errors
  def _predict(
    self,
    task: str,
    path: str | None,
    sentence: str,
    class_name: str,
    boxes: str,
    attention: bool,
    ply: bool,
    focal: float | None,
    request: gr.Request,
  ) -> list[object]:
    """Updates for a new prediction, in the order of `outputs`."""
    inputs = Inputs(sentence, class_name, boxes, attention, ply, focal or 0.0)
    result = results.predict(self._networks[task].predictor, path, self._session_folder(request), inputs)
    nearest, farthest = result.facts.get("min") or 0.0, result.facts.get("max") or 1.0
    slider = lambda value: gr.Slider(0, round(1.2 * farthest, 2), value=round(value, 3), step=0.01)
    return [
      task,
      result.depth and str(result.depth),
      str(result.shown),
      gr.Group(visible=result.depth is not None),
      "Click on the result to read the depth there.",
      slider(nearest),
      slider(farthest),
      gr.Model3D(result.cloud and str(result.cloud), visible=result.cloud is not None),
      [str(file) for file in result.files],
      result.facts,
    ]

  @_shows_errors
  def _point(self, depth: str | None, event: gr.SelectData) -> str:
    return results.depth_at(Path(depth), *event.index) if depth else ""

  @_shows_errors
  def _recolor(self, task: str | None, depth: str | None, nearest: float, farthest: float) -> object:
    if not (task and depth):
      return gr.skip()
    return results.recolored(self._networks[task].predictor, Path(depth), nearest, farthest)

  def _session_folder(self, request: gr.Request) -> Path:
    """The folder of a session; hashed, because the browser chooses the session name."""
    return self._folder / hashlib.blake2b(str(request.session_hash).encode(), digest_size=16).hexdigest()

  def _forget(self, request: gr.Request) -> None:
    shutil.rmtree(self._session_folder(request), ignore_errors=True)
