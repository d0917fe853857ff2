"""What is built from a config: the class of pictures that have none, sources, options, and what is shared."""

import pytest

from tests.helpers import tiny
from vpd_jax import experiment
from vpd_jax.config import loader


def assembled(string, **changes):
  config = tiny.shrunk(loader.load(string)).unlock()
  config.update_from_flattened_dict(changes)
  return experiment.assemble(config.lock())


SMALL = "configs/kitti_depth.py:meta_prompts,tiny"


def test_one_model_is_described_once():
  """Also from an equal config that was made anew, and whatever it says of data and optimizer."""
  first, second = assembled(SMALL), assembled(SMALL, **{"optim.lr": 0.25, "data.batch_size": 6})
  assert first.spec.graphdef is second.spec.graphdef
  assert first.groups != second.groups or first.rate(0) != second.rate(0)


@pytest.mark.parametrize(
  "change",
  [
    {"seed": 7},
    {"method.prompts": 4},
    {"head.width": 64},
    {"backbone.attention": "chunked"},
    {"optim.norm_group": 2},
    {"task.max_depth": 70.0},
    {"param_dtype": "bfloat16"},
  ],
  ids=lambda change: next(iter(change)),
)
def test_another_model_is_described_anew(change):
  first, second = assembled(SMALL), assembled(SMALL, **change)
  differs = lambda x: (x.spec.graphdef, x.spec.shapes, x.spec.draws)
  assert differs(first) != differs(second)


@pytest.mark.parametrize("string", ["configs/kitti_depth.py:vpd,tiny", "configs/my_depth.py:vpd,tiny"])
def test_the_scene_is_the_one_class_of_the_product(string):
  exp = assembled(string, **{"data.scene": "country_road"})
  assert exp.classes == ("country_road",)
  assert exp.spec.shapes["method/class_vectors"].shape[0] == 1


@pytest.mark.parametrize(
  "method, message",
  [
    (
      "vpd",
      r"^method\.prompt='scene_class' chooses among the classes of the data set, which names none; set config",
    ),
    (
      "iedp",
      r"^method\.sentence='a photo of a \{\}' names the class of an image, but the data set names none; set config",
    ),
  ],
)
def test_a_method_that_is_told_a_class_is_refused_at_assembly_where_there_is_none(method, message):
  with pytest.raises(ValueError, match=message) as caught:
    assembled(f"configs/kitti_depth.py:{method},tiny", **{"data.scene": ""})
  assert "\n" not in str(caught.value) and "data.scene" in str(caught.value)


@pytest.mark.parametrize(
  "words, changes",
  [
    ("meta_prompts", {}),
    ("iedp", {"method.sentence": "a photo of a street"}),
    ("iedp", {"method.branch_mode": "implicit"}),
  ],
)
def test_without_a_scene_methods_that_are_told_no_class_go_on(words, changes):
  exp = assembled(f"configs/kitti_depth.py:{words},tiny", **{"data.scene": ""}, **changes)
  assert exp.classes == () and "class_id" not in exp.keys


@pytest.mark.parametrize(
  "config, field, value",
  [
    ("configs/nyu_depth.py:meta_prompts,tiny", "init.clip", "random:0"),
    ("configs/ade20k_seg.py:vpd,tiny", "init.clip", "random:0"),
    ("configs/refcoco_refer.py:tiny", "method.class_vectors", "random:0"),
    ("configs/refcoco_refer.py:tiny", "method.templates", "a photo of a {}"),
    ("configs/nyu_depth.py:meta_prompts,tiny", "method.tokenizer", "characters"),
  ],
)
def test_a_source_that_nothing_reads_is_refused(config, field, value):
  with pytest.raises(
    ValueError, match=rf"^config\.{field}='.*': nothing of method '.*' reads this; leave it out"
  ) as caught:
    assembled(config, **{field: value})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "config, field",
  [("configs/nyu_depth.py:tiny", "init.clip"), ("configs/refcoco_refer.py:meta_prompts,tiny", "init.clip")],
)
def test_a_source_that_is_read_in_prediction_or_for_sentences_is_taken(config, field):
  assembled(config, **{field: "random:0"})


def test_a_head_chosen_on_the_command_line_leaves_fields_of_the_one_before_out():
  config = tiny.shrunk(loader.load("configs/coco_pose.py:meta_prompts,tiny"))
  chosen = loader.changed(config, {"head.name": "simple"})
  with pytest.raises(ValueError, match=r"config\.head of name 'simple' does not take"):
    experiment.assemble(chosen)
  exp = experiment.assemble(experiment.with_chosen_parts(chosen, {"head.name"}))
  assert exp.spec.model.head.__class__.__name__ == "ViTPoseSimpleHead"
  foreign = {"head.name", *(f"head.{field}" for field in chosen.head)}
  with pytest.raises(ValueError, match=r"config\.head of name 'simple' does not take"):
    experiment.assemble(experiment.with_chosen_parts(chosen, foreign))
  assert experiment.with_chosen_parts(config, set()).to_dict() == config.to_dict()


@pytest.mark.parametrize("config, field, value, message", [
  ("rooms.py:depth,tiny", "blend", "linear", r"^eval\.blend='linear' is unknown; choose one of \('mean', 'smooth'\)"),
  ("rooms.py:pose,tiny", "blend", "smooth", r"^eval\.blend='smooth': no effect with task 'pose'; leave it at"),
  ("rooms.py:referring,tiny", "blend", "smooth", r"^eval\.blend='smooth': no effect with task 'referring'"),
  ("coco_pose.py:tiny", "coverage", "released", r"^eval\.coverage='released': no effect with task 'pose'"),
  ("rooms.py:referring,tiny", "coverage", "released", r"^eval\.coverage='released': no effect .* default\.$"),
  ("rooms.py:depth,tiny", "checkpoint", "last", r"^eval\.checkpoint='last' is unknown; choose one of \('newest', '"),
])  # fmt: skip
def test_an_option_of_evaluation_that_does_not_fit_is_refused(config, field, value, message):
  changed = loader.changed(loader.load(f"configs/{config}"), {f"eval.{field}": value})
  with pytest.raises(ValueError, match=message):
    experiment.assemble(changed)
