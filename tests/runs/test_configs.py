"""Every shipped config and method: assembled at its real size without an array, and stepped once in small."""

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.batches import batch_for
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.evaluation import evaluate
from vpd_jax.training import step as training_step

# configs/<file>: words of its argument. A config that is not listed fails the first test.
SHIPPED = {
  "nyu_depth": ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp", "vpd,tiny"),
  "kitti_depth": ("vpd", "meta_prompts", "iedp", "eco_depth", "vpd,tiny", "eco_depth,sd21"),
  "my_depth": ("vpd,tiny", "meta_prompts,tiny", "iedp,tiny", "eco_depth,tiny", "meta_prompts,sd21"),
  "ade20k_seg": ("vpd", "meta_prompts", "iedp", "tadp"),
  "cityscapes_seg": ("vpd,tiny", "meta_prompts,extra", "iedp,tiny", "meta_prompts,mapillary"),
  "my_segmentation": ("vpd,tiny", "meta_prompts,tiny", "iedp,tiny", "tadp,sd21"),
  "refcoco_refer": (
    "refcoco",
    "refcoco_plus,as_intended,meta_prompts",
    "refcocog,iedp,tiny",
    "refcoco,sd21",
    "refcoco,tadp",
  ),
  "my_refer": ("tiny", "meta_prompts,tiny", "iedp,tiny"),
  "coco_pose": ("meta_prompts", "vpd,384x288", "iedp,tiny"),
  "my_pose": ("vpd,tiny", "meta_prompts,tiny", "iedp,tiny", "iedp,sd21", "tadp,tiny"),
  "rooms": (
    "depth,vpd,full",
    "depth,meta_prompts,tiny",
    "depth,iedp,tiny",
    "segmentation,iedp,tiny",
    "segmentation,tadp,full",
    "segmentation,eco_depth,tiny",
    "referring,eco_depth,tiny",
    "pose,eco_depth,tiny",
    "pose,tadp,tiny",
    "referring,tadp,tiny",
    "referring,tiny",
    "pose,iedp,full",
  ),
}
# Stepped as well; what the others are made of is stepped here, in test_run.py or in the tests of the methods.
STEPPED = (
  "configs/ade20k_seg.py:iedp",
  "configs/kitti_depth.py:eco_depth",
  pytest.param("configs/coco_pose.py:meta_prompts", marks=pytest.mark.slow),  # test_pose_run.py has VPD's
  pytest.param("configs/cityscapes_seg.py:meta_prompts", marks=pytest.mark.slow),
)
STRINGS = [f"configs/{name}.py:{words}" for name, arguments in SHIPPED.items() for words in arguments]
QUICK = {"xla_backend_optimization_level": 0}


def test_every_config_file_is_tested():
  assert {path.stem for path in (loader.PROJECT / "configs").glob("*.py")} == set(SHIPPED)


@pytest.mark.parametrize(
  "stage, data, steps", [("fine", "cityscapes", 3), ("extra", "cityscapes", 1), ("mapillary", "mapillary", 1)]
)
def test_the_two_stages_of_cityscapes_have_one_step_and_data_of_their_own(stage, data, steps):
  config = loader.load(f"configs/cityscapes_seg.py:{stage}")
  assert (config.data.name, config.method.refine_steps) == (data, steps)
  assert config.data.get("extra", "none") == ("autolabelled" if stage == "extra" else "none")
  assert experiment.assemble(config).classes == experiment.assemble(loader.load("configs/cityscapes_seg.py")).classes


@pytest.mark.parametrize("string", STRINGS)
def test_assembles_at_its_real_size(string):
  config = loader.load(string)
  exp = experiment.assemble(config)
  count = sum(shape.size for shape in exp.spec.shapes.values())
  assert count > (8e8 if "tiny" not in string else 9e6)
  assert exp.groups.lr and exp.keys[0] == "image"


def test_every_config_takes_the_words_of_all_sizes():
  for name in SHIPPED:
    for size, width in {"full": 768, "sd21": 1024, "tiny": 64}.items():
      assert loader.load(f"configs/{name}.py:{size}").backbone.unet.context_dim == width, (name, size)


# Methods and tasks that are not assembled with it above.
REST_OF_SD21 = (
  *("nyu_depth:vpd", "nyu_depth:tadp", "nyu_depth:iedp", "my_depth:vpd", "ade20k_seg:vpd", "ade20k_seg:iedp"),
  *("ade20k_seg:eco_depth", "cityscapes_seg:meta_prompts", "refcoco_refer:meta_prompts", "refcoco_refer:iedp"),
  *("my_refer:eco_depth", "coco_pose:meta_prompts", "coco_pose:eco_depth", "coco_pose:vpd", "rooms:depth,vpd"),
)


@pytest.mark.slow  # each method and each task takes sd21 in STRINGS
@pytest.mark.parametrize("words", REST_OF_SD21)
def test_stable_diffusion_21_assembles_at_its_real_size(words):
  name, _, argument = words.partition(":")
  shapes = experiment.model_shapes(loader.load(f"configs/{name}.py:{argument},sd21"))
  assert sum(shape.size for shape in shapes.values()) > 8e8


# Config and method: GPUs and images on each in the release, whether batch norm is over all GPUs, whether the loss of
# all images is another number than the mean over the GPUs. No code of IEDP and of pose is published: they follow the
# protocol of the data, with heads of our own.
RELEASES = {
  ("nyu_depth", "vpd"): (8, 3, "of a GPU", "grouped"),
  ("nyu_depth", "meta_prompts"): (8, 3, "of a GPU", "grouped"),
  ("nyu_depth", "iedp"): (8, 3, "of all", "grouped"),  # an assumption, see presets.iedp_assumptions
  ("nyu_depth", "eco_depth"): (8, 4, "of a GPU", "grouped"),
  ("nyu_depth", "tadp"): (8, 3, "of a GPU", "grouped"),
  ("kitti_depth", "vpd"): (8, 3, "of a GPU", "grouped"),
  ("kitti_depth", "eco_depth"): (8, 4, "of a GPU", "grouped"),
  ("kitti_depth", "meta_prompts"): (8, 3, "of a GPU", "grouped"),
  ("kitti_depth", "iedp"): (8, 3, "of all", "grouped"),
  ("ade20k_seg", "vpd"): (8, 2, "of all", "grouped"),
  ("ade20k_seg", "meta_prompts"): (8, 1, "of all", "grouped"),
  ("ade20k_seg", "iedp"): (8, 2, "of all", "grouped"),
  ("ade20k_seg", "tadp"): (2, 8, "of all", "grouped"),
  ("cityscapes_seg", "vpd"): (8, 1, "of all", "grouped"),
  ("cityscapes_seg", "meta_prompts"): (8, 1, "of all", "grouped"),
  ("cityscapes_seg", "iedp"): (8, 1, "of all", "grouped"),
  ("refcoco_refer", "vpd"): (8, 4, "of all", "grouped"),
  ("refcoco_refer", "meta_prompts"): (8, 4, "of all", "grouped"),
  ("refcoco_refer", "iedp"): (8, 4, "of all", "grouped"),
  ("coco_pose", "vpd"): (8, 64, "of all", "a plain mean"),
  ("coco_pose", "meta_prompts"): (8, 64, "of all", "a plain mean"),
  ("coco_pose", "iedp"): (8, 64, "of all", "a plain mean"),
}
OF_ONES_OWN = {"my_depth", "my_segmentation", "my_refer", "my_pose", "rooms"}  # no release; the whole batch


def test_every_config_has_a_release_or_is_of_ones_own():
  assert {name for name, _ in RELEASES} | OF_ONES_OWN == set(SHIPPED)


@pytest.mark.parametrize("config, method", RELEASES)
def test_loss_and_statistics_are_grouped_as_on_the_gpus_of_the_release(config, method):
  gpus, images, statistics, loss = RELEASES[config, method]
  made = loader.load(f"configs/{config}.py:{method}")
  assert made.data.batch_size == gpus * images
  assert made.optim.norm_group == (images if statistics == "of a GPU" else 0)
  assert made.optim.loss_group == (images if loss == "grouped" else 0)


@pytest.mark.parametrize("string", STEPPED)
def test_steps_and_evaluates_in_small(string):
  config = tiny.shrunk(loader.load(string))
  exp = experiment.assemble(config)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  batch = batch_for(exp, config)
  step = training_step.make_step(exp, loss_group=config.optim.loss_group, accumulation=config.optim.accumulation)
  new, logs = jax.jit(step).lower(state, batch).compile(QUICK)(state, batch)
  assert int(new.step) == 1 and np.isfinite(logs["train/loss"])
  moments = new.opt_state[1].mu
  assert set(moments) == set(new.params)
  # One token of context: queries and keys of cross-attention have no gradient; neither has, with 32 channels in 32
  # groups, a bias or time embedding before a norm.
  reached = [name for name, value in moments.items() if np.any(value)]
  assert len(reached) > 0.8 * len(moments)
  predict = (
    evaluate.make_scores(exp)  # of one window
    if exp.task.test_time_protocol == "sliding"
    else evaluate.make_predict(exp, config.eval.test_time, config.eval.coverage)
  )

  def score(weights, batch):
    return exp.task.measure(predict(weights, {n: batch[n] for n in ("image", *exp.method.needs)}), batch)

  weights = (new.params, new.frozen, new.stats)
  rows = jax.jit(score).lower(weights, batch).compile(QUICK)(weights, batch)
  truth = {"truth": people(config.data.batch_size)} if exp.task.needs_truth else {}
  scores = exp.task.summarize({name: np.asarray(values) for name, values in rows.items()}, **truth)
  assert np.isfinite(scores[exp.task.best_metric])
  assert config.data.batch_size in (scores.get("images"), scores.get("sentences"), scores.get("people"))


def people(count):
  """One person in each of that many pictures, as pycocotools reads it."""
  person = {"category_id": 1, "iscrowd": 0, "num_keypoints": 17, "area": 100.0, "bbox": [0.0, 0.0, 10.0, 10.0]}
  person["keypoints"] = [5.0, 5.0, 2] * 17
  return {
    "images": [{"id": i} for i in range(count)],
    "annotations": [{"id": i + 1, "image_id": i, **person} for i in range(count)],
    "categories": [{"id": 1}],
  }
