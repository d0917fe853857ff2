"""Batches -> measurements -> one dict of scores. Every image counts exactly once, whatever the number of devices."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import is_workdir
from vpd_jax.data import pipeline
from vpd_jax.data.shards import reader
from vpd_jax.distributed import sharding
from vpd_jax.distributed.preemption import PreemptionGuard
from vpd_jax.errors import UserError
from vpd_jax.evaluation import encoder_cache
from vpd_jax.experiment import Experiment
from vpd_jax.files import atomic
from vpd_jax.inference import sliding_window, tiles, tta
from vpd_jax.monitoring import progress, writers
from vpd_jax.tasks import colormaps
from vpd_jax.types import Array, Batch, Dataset, Example, Fields, PyTree, Rows, Task, Weights, WindowedTask

Step = Callable[[Weights, Batch], PyTree]


class Evaluation(NamedTuple):
  """Result of one pass over the evaluation split: scores by name, panels uint8 [N, H, W', 3], all measurements."""

  scores: dict[str, float]
  panels: np.ndarray
  rows: Rows


def make_predict(
  exp: Experiment, test_time: tuple[str, ...], coverage: str, *, smooth: bool = False
) -> Callable[[Weights, Batch], Array]:
  """(weights, batch) -> prediction with test-time augmentation; pure."""

  def predict(weights: Weights, batch: Batch) -> Array:
    model = exp.spec.merge(*weights)
    plain = lambda part: exp.task.predict(model(part, training=False))
    options: Fields = {"coverage": coverage, "smooth": smooth, "mirrored": exp.task.mirrored}
    return tta.with_test_time_augmentation(plain, test_time, **options)(batch)

  return predict


def make_scores(exp: Experiment) -> Callable[[Weights, Batch], Array]:
  """(weights, batch of windows) -> class scores [n, h, w, K]; pure."""

  def scores(weights: Weights, batch: Batch) -> Array:
    return exp.task.predict(exp.spec.merge(*weights)(batch, training=False))

  return scores


def make_step(config: ConfigDict, exp: Experiment) -> Callable[[Weights, Batch], tuple[dict[str, Array], Array]]:
  """(weights, batch) -> measurements and predictions for images of one size; pure."""
  predict = make_predict(exp, config.eval.test_time, config.eval.coverage, smooth=config.eval.blend == "smooth")

  def step(weights: Weights, batch: Batch) -> tuple[dict[str, Array], Array]:
    check_coverage(config, exp, batch["image"].shape[1:3])
    prediction = predict(weights, encoder_cache.inputs(batch, exp))
    return exp.task.measure(prediction, batch), prediction

  return step


def check_coverage(config: ConfigDict, exp: Experiment, size: Sequence[int]) -> None:
  """Raises ValueError if windows do not cover all scored pixels of images of this size."""
  if exp.task.test_time_protocol == "windows":
    region = cast(WindowedTask, exp.task).region((size[0], size[1]))
    tta.check_coverage(size, config.eval.test_time, config.eval.coverage, region)


def on_mesh(step: Step, config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> Step:
  """Wraps a step for this mesh: all-gathers sharded weights, so that each device computes its own rows."""
  gather = initialize.gather(config, exp, mesh)

  def run(weights: Weights, batch: Batch) -> object:
    with sharding.tracing(mesh):
      params, frozen, stats = map(gather, weights)
      return step((params, frozen, stats), batch)

  return run


def lower_step(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh, batch: Batch) -> jax.stages.Lowered:
  """Lowers the evaluation step for a batch of images, or of windows with a sliding window.

  `batch` may be ShapeDtypeStructs, and `mesh` of devices that do not exist.
  """
  state = sharding.abstract(initialize.state_shapes(config, exp), initialize.state_shardings(config, exp, mesh))
  batch_sharding = sharding.batch_sharding(mesh)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding), batch)
  step = make_scores(exp) if exp.task.test_time_protocol == "sliding" else make_step(config, exp)
  return jax.jit(on_mesh(step, config, exp, mesh)).lower((state.params, state.frozen, state.stats), shapes)


class _Batches:
  """Evaluates images of one size in batches: one row and one prediction per image."""

  def __init__(
    self,
    config: ConfigDict,
    exp: Experiment,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    encodings: encoder_cache.EncoderCache,
  ):
    self._batch_size, self._experiment, self._dataset = config.eval.batch_size, exp, dataset
    self._encodings = encodings
    self._sharding = sharding.batch_sharding(mesh)
    self._step = jax.jit(on_mesh(make_step(config, exp), config, exp, mesh))

  def __call__(self, weights: Weights, panels: int) -> Generator[tuple[Rows, np.ndarray | tuple[()]], None, None]:
    """Yields the rows of each batch from all processes, with "real", and the first `panels` predictions.

    With several processes, predictions are those of this process for images of any size, else those of all.
    """
    local = pipeline.eval_batches(
      self._dataset,
      batch_size=self._batch_size,
      keys=(*self._experiment.keys, *sorted(self._experiment.task.eval_needs)),
      prepare=self._experiment.method.prepare,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    shown, local = 0, self._encodings(local, weights[1])
    with contextlib.closing(pipeline.Prefetch(local, self._sharding)) as batches:
      for batch in batches:
        measured, prediction = self._step(weights, batch)
        predictions = _in_order(prediction, batch["position"]) if shown < panels else ()
        shown += len(predictions)
        yield _gathered(measured | {"real": batch["real"]}), predictions


class _Images:
  """Evaluates images of any size one by one, different ones in each process; see inference/sliding_window.py."""

  def __init__(self, config: ConfigDict, exp: Experiment, dataset: Dataset, mesh: jax.sharding.Mesh):
    self._experiment, self._dataset, self._mesh = exp, dataset, mesh
    # Processes work independently of each other, each on its local devices.
    self._local = mesh if jax.process_count() == 1 else sharding.make_mesh(devices=jax.local_devices())
    self._labeling = sliding_window.SlidingWindowInference(
      on_mesh(make_scores(exp), config, exp, self._local),
      sliding_window.parse(config.eval.test_time),
      batch_size=config.eval.batch_size // jax.process_count(),
      small_images=config.eval.small_images,
      smooth=config.eval.blend == "smooth",
      postprocess=sliding_window.finite_label,
      place=lambda x: jax.device_put(x, sharding.batch_sharding(self._local)),
      gathered=sharding.replicated(self._local),
    )
    self._measure = jax.jit(exp.task.measure)

  def __call__(self, weights: Weights, panels: int) -> Generator[tuple[Rows, np.ndarray | tuple[()]], None, None]:
    """As _Batches, with batches of one image per process."""
    examples = pipeline.eval_examples(
      self._dataset,
      prepare=self._experiment.method.prepare,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    if jax.process_count() > 1:
      weights = sharding.on_devices_of_one_process(weights, self._mesh, self._local)
    pending: collections.deque[Example] = collections.deque()  # examples whose results are not ready yet

    def views() -> Iterator[sliding_window.Views]:
      for example in examples:
        pending.append(example)
        inputs = {name: example[name] for name in ("image", *sorted(self._experiment.method.needs))}
        yield self._labeling.views(inputs)

    with contextlib.closing(examples):
      for shown, label in enumerate(self._labeling(weights, views())):
        example = pending.popleft()
        bad = label == len(self._experiment.classes)
        measured = self._areas(label, example) | {"not_finite": bad.sum()[None]}
        measured |= {"real": np.asarray(example["real"])[None]}
        yield _gathered(measured), label[None] if shown < panels else np.asarray(())

  def _areas(self, label: np.ndarray, example: Example) -> Rows:
    """The task's measurements of one image, which are sums over pixels, computed in squares by one program."""
    truth = {name: tiles.squares(example[name], tiles.OUTSIDE_LABEL) for name in self._experiment.task.needs}
    label, count = tiles.squares(label, 0), tiles.SQUARES
    rows = [
      self._measure(label[i : i + count], {name: value[i : i + count] for name, value in truth.items()})
      for i in range(0, len(label), count)
    ]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(rows))
    return {name: value.sum(axis=0, keepdims=True, dtype=value.dtype) for name, value in joined.items()}


class Evaluator:
  """Evaluates weights on the evaluation split, and computes the baselines once.

  Attributes:
    source: of the split.
    encodings: the encoder cache, also used for training.
  """

  def __init__(self, config: ConfigDict, exp: Experiment, dataset: Dataset, mesh: jax.sharding.Mesh):
    """Opens the evaluation split.

    Raises:
      ValueError: the number of devices does not divide the evaluation batch; missing files.
    """
    pipeline.check_batch_size(config.eval.batch_size, mesh.size, "devices")
    self.config, self.experiment, self.dataset = config, exp, dataset
    self.source = dataset.source("eval")
    if exp.task.test_time_protocol == "windows" and config.eval.coverage != "full" and len(self.source):
      check_coverage(config, exp, dataset.eval_transform(self.source[0])["image"].shape[:2])  # fails early
    self._truth = {"truth": dataset.truth("eval")} if exp.task.needs_truth else {}
    self.encodings = encoder_cache.EncoderCache(config, exp, dataset, mesh)
    self._measured = (
      _Images(config, exp, dataset, mesh)
      if exp.task.test_time_protocol == "sliding"
      else _Batches(config, exp, dataset, mesh, self.encodings)
    )
    self._baselines: dict[str, float] | None = None

  def run(self, weights: Weights, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
    """Computes scores "eval/<data set>/<name>" of the weights, and panels of the first examples.

    The score "not_finite" counts pixels predicted as NaN or infinity, which are scored nevertheless. Calls `stop` after
    each batch or image, and returns None if it is true.

    Raises:
      ValueError: not all records of the split were scored.
    """
    rows, shown, expected = [], [], len(self.source)
    with (
      progress.phase("evaluate", expected, "records") as evaluated,
      contextlib.closing(self._measured(weights, self.config.eval.panels)) as measured,
    ):
      for row, predictions in measured:
        if stop():
          return None
        rows.append(row)
        shown += list(predictions)
        evaluated.advance(int(row["real"].sum()))
    scored = evaluated.done
    if scored != expected:
      raise UserError(
        f"the evaluation scored {scored} of the {expected} records of data set {self.config.data.name!r}: their "
        "iteration ended early, or the length of the data set changed; fix the data set."
      )
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    real = joined.pop("real")
    joined = {name: values[real] for name, values in joined.items()}
    scores = self.experiment.task.summarize(joined, **self._truth)
    prefix = f"eval/{self.config.data.name}"
    panels = self._panels(shown if jax.process_index() == 0 else [])  # only the first process writes them
    return Evaluation({f"{prefix}/{name}": value for name, value in scores.items()}, panels, joined)

  def baselines(self) -> dict[str, float]:
    """Scores of trivial predictors by name; empty if `eval.baselines` is 0."""
    count = self.config.eval.baselines
    if self._baselines is None:
      task = self.experiment.task
      with progress.phase("trivial predictors") if count else contextlib.nullcontext():
        scores = task.baselines(self._examples("train", count), self._examples("eval"), **self._truth) if count else {}
      self._baselines = scores
      return scores
    return self._baselines

  def write_results(self, folder: epath.Path, rows: Rows) -> None:
    """Writes the submission file of the task's benchmark, if it has one."""
    self.experiment.task.write_results(folder / "results.json", rows, **self._truth)

  def report(self, scores: dict[str, float], rows: Rows | None = None) -> str:
    """Formats the scores in one line; with `rows`, also those of each class."""
    prefix = f"eval/{self.config.data.name}/"
    line = writers.class_table(class_scores(self.experiment.task, rows) if rows else [])
    line += "  ".join(f"{name.removeprefix(prefix)} {value:.4f}" for name, value in scores.items())
    if bad := scores.get(f"{prefix}not_finite"):
      line += f"\n  {bad:.0f} pixels were predicted as NaN or infinity: do not trust these scores"
    return line

  def comparison(self, scores: dict[str, float]) -> str:
    """Formats the main score of trivial predictors, with that of `scores` as a share of it; may be empty."""
    chosen = self.experiment.task.best_metric
    score = scores[f"eval/{self.config.data.name}/{chosen}"]
    ratio = lambda value: f" (x{score / value:.2f})" if value else ""
    compared = ", ".join(f"{name} {value:.4f}{ratio(value)}" for name, value in self.baselines().items())
    return compared and f"  {chosen} of trivial predictors, and ours as a share of it: {compared}"

  def _examples(self, split: str, count: int | None = None) -> Iterator[Example]:
    source = self.dataset.source(split)
    if split == "train" and self.config.data.get("on_bad_record") == "skip":
      source = reader.SkipUnreadable(source)  # as in training
    indices = range(len(source)) if not count else range(min(count, len(source)))
    return (self.dataset.eval_transform(source[i]) for i in indices)

  def _panels(self, predictions: list[np.ndarray]) -> np.ndarray:
    # With several processes, the first one evaluates every `step`-th image of the split.
    step = jax.process_count() if self.experiment.task.test_time_protocol == "sliding" else 1
    shown = predictions[: self.config.eval.panels]
    examples = list(itertools.islice(self._examples("eval"), 0, step * len(shown), step))
    # The last batch also contains predictions of padding rows.
    return colormaps.stacked(self.experiment.task.panels(examples, shown[: len(examples)]))


def class_scores(task: Task, rows: Rows) -> list[Fields]:
  """{"class": name, "IoU", "Acc"} of every class, None if it does not occur; empty for a task without classes."""
  number = lambda value: None if np.isnan(value) else float(value)
  scores_by_name = task.per_class(rows)
  return [
    {"class": name, **{score: number(values[k]) for score, values in scores_by_name.items()}}
    for k, name in enumerate(task.class_names)
  ]


def _in_order(prediction: Array, position: Array) -> np.ndarray:
  """The predictions of all processes, sorted by record: a mesh may have its devices in another order."""
  gathered = _gathered({"prediction": prediction, "position": position})
  return gathered["prediction"][np.argsort(gathered["position"])]


def _gathered(values: Fields) -> Rows:
  """Rows of all processes on the host, in the order of the global batch."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(values, tiled=True)
  return jax.device_get(values)


def run(config: ConfigDict, workdir: str) -> dict[str, float]:
  """--mode=eval: evaluates a workdir's checkpoint, or `init.pretrained` if it has none, and prints the scores."""
  source = workdir if is_workdir(workdir) else ""
  if not initialize.source_of(config, workdir):
    raise UserError(
      f"no trained weights to evaluate: --workdir={workdir!r} holds no checkpoint and config.init.pretrained "
      "is empty; give one of them."
    )
  with progress.phase("assemble"):
    config = initialize.with_backbone_sizes(config, initialize.source_of(config, workdir))
    exp = experiment.assemble(config, training=False)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  with progress.phase("open data"):
    dataset = experiment.dataset(config, exp)
    evaluator = Evaluator(config, exp, dataset, mesh)
  with progress.phase("load weights"):
    weights, lines = initialize.weights_on_mesh(config, exp, mesh, source, complete=True)
  is_first = jax.process_index() == 0
  if is_first:
    data_lines = [*dataset.notes("eval"), *experiment.sentence_lines(exp, dataset, ("eval",))]
    progress.write("\n".join([*lines, *data_lines, *evaluator.encodings.lines()]))
  # With several processes, JAX receives the signals; alone, SIGTERM ends the process.
  result = evaluator.run(weights, PreemptionGuard().should_stop)
  if result is None:
    raise UserError("stopped by SIGTERM: nothing was scored; the same command begins anew.")
  if is_first:
    progress.write(evaluator.report(result.scores, result.rows))
    folder = epath.Path(workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"weights": lines, "scores": result.scores, "trivial predictors": {}}
    content |= {"classes": classes} if (classes := class_scores(exp.task, result.rows)) else {}
    evaluator.write_results(folder, result.rows)
    atomic.write_json(folder / "eval.json", content)
    if comparison := evaluator.comparison(result.scores):  # reads other records, which may be damaged
      progress.write(comparison)
      atomic.write_json(folder / "eval.json", content | {"trivial predictors": evaluator.baselines()})
  return result.scores
