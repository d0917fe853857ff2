"""--mode=plan: shapes without data, reports of compiled steps, what is kept, what is said."""

import errno
import inspect
import json
import types

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.batches import batch_for
from tests.helpers.planned_rooms import config_of
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.planning import plan, topologies

MIB = 2**20


STRINGS = ("nyu_depth.py:vpd,tiny", "nyu_depth.py:iedp,tiny", "coco_pose.py:vpd,tiny", "refcoco_refer.py:refcoco,tiny")


@pytest.mark.parametrize("string", [f"configs/{name}" for name in STRINGS])
def test_a_batch_has_the_shapes_of_the_pipelines(string):
  config = tiny.shrunk(loader.load(string))
  exp = experiment.assemble(config)
  planned = plan.batch_shapes(config, exp.keys, "train")
  assert planned == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_for(exp, config))


def test_a_batch_of_rooms_is_as_it_is_drawn():
  config = config_of(**{"data.size": (64, 96)})
  keys = ("image", "depth", "class_id")
  dataset = experiment.DATASETS["rooms"](size=(64, 96), crop=(64, 64), train_count=1, eval_count=1)
  rng = np.random.default_rng(0)
  drawn = {
    "train": dataset.train_transform(dataset.source("train")[0], rng, 0),
    "eval": dataset.eval_transform(dataset.source("eval")[0]),
  }
  for step, example in drawn.items():
    rows = {"train": config.data.batch_size, "eval": config.eval.batch_size}[step]
    for key, x in plan.batch_shapes(config, keys, step).items():
      value = np.asarray(example[key])
      assert (x.shape, x.dtype) == ((rows, *value.shape), value.dtype), (step, key)


@pytest.mark.parametrize(
  "string, size",
  [
    ("configs/nyu_depth.py", (480, 640)),
    ("configs/kitti_depth.py", (352, 1216)),
    ("configs/nyu_depth.py:tiny", (96, 128)),
  ],
)
def test_pictures_of_an_evaluation_have_the_size_of_the_data(string, size):
  assert plan.picture_size(loader.load(string)) == size


@pytest.mark.parametrize("task", ["pose", "referring"])
def test_crops_and_squeezed_pictures_have_the_size_of_the_crop_in_evaluation_too(task):
  config = loader.load(f"configs/rooms.py:{task},tiny")
  assert plan.picture_size(config) == tuple(config.data.crop) != tuple(config.data.size)


@pytest.mark.parametrize("path", sorted(loader.PROJECT.glob("configs/[!_]*.py")), ids=lambda path: path.stem)
def test_every_config_can_be_planned(path):
  config = loader.load(f"configs/{path.name}")
  exp = experiment.assemble(config)
  for step in ("train", "eval"):
    assert plan.batch_shapes(config, exp.keys, step).keys() == {*exp.keys}


# Options of each task that are words or choices, but for what its data set says.
CHOICES = {
  "depth": {
    "max_depth": (10.0, 80.0),
    "min_depth": (1e-3,),
    "eval_crop": ("none", "eigen_nyu", "eigen_nyu_scaled", "garg", "eigen_kitti"),
    "variance_focus": (0.5, 0.85),
    "png_scale": (0, 256),
    "loss_scale": (1.0, 10.0),
    "clip_prediction": (False, True),
    "benchmark_silog": (False, True),
    "contours": (0.0, 1.0),
  },
  "segmentation": {
    "lovasz": (0.0, 1.0),
    "auxiliary": (0.0, 0.4),
    "avg_non_ignore": (False, True),
    "ignore_label": (255, 254),
    "merge": ((), ("front=floor+wall",)),
  },
  "referring": {"class_weights": ((0.9, 1.1),), "eval_at": ("network", "original")},
  "pose": {
    "sigma": (1, 2),
    "blur": (0, 3),
    "shift_flipped": (False, True),
    "score_above": (0.2,),
    "nms": (0.9,),
  },
}
FACTS = {"classes", "class_names", "palette", "label_ids", "keypoints", "udp"}


def test_the_choices_are_all_that_a_task_takes():
  for name, maker in experiment.TASKS.items():
    taken = set(inspect.signature(maker.__init__).parameters) - {"self"} - FACTS
    assert taken == CHOICES[name].keys(), name


@pytest.mark.parametrize(
  "task, field, value",
  [(task, field, value) for task, fields in CHOICES.items() for field, values in fields.items() for value in values],
)
def test_every_option_of_every_task_is_planned(task, field, value):
  """What its measurements read in evaluation has a shape, and they can be traced."""
  config = loader.load(f"configs/rooms.py:{task},tiny").copy_and_resolve_references().unlock()
  config.task[field] = value
  data = experiment.DATASETS[config.data.name]
  info = data.info(config.data)
  made, classes = experiment._task(config.lock(), info), info.classes
  exp = types.SimpleNamespace(task=made, keys=("image", *sorted(made.needs)))
  rows, (height, width) = config.eval.batch_size, plan.picture_size(config)
  shape = {
    "windows": (height, width),
    "sliding": (height, width, len(classes)),
    "squeezed": (height, width, 2),
    "crops": (height // 4, width // 4, 17),
  }[made.test_time_protocol]
  prediction = jax.ShapeDtypeStruct((rows, *shape), np.float32)
  measured = jax.eval_shape(made.measure, prediction, plan.step_shapes(config, exp, "eval"))
  assert all(x.shape[0] == rows for x in measured.values())
  assert plan.step_shapes(config, exp, "train").keys() == {*exp.keys}


def test_the_evaluation_of_referring_at_the_size_of_the_pictures_is_planned():
  config = tiny.shrunk(loader.load("configs/rooms.py:referring,tiny")).unlock()
  config.task.eval_at = "original"
  exp = experiment.assemble(config.lock(), training=False)
  mesh = plan.mesh_for(config, jax.devices()[:1])
  batch, _ = plan.encoder_cache.encoded_batch_shapes(config, exp, plan.step_shapes(config, exp, "eval"))
  assert batch["full_mask"].shape == (2, *config.data.size) and batch["full_size"].shape == (2, 2)
  rows, _ = plan.evaluate.lower_step(config, exp, mesh, batch).out_info
  assert rows["intersection"].shape == (2,)


WRONG = {
  "a side that is no whole number": ({"data.crop": (96.5, 96)}, r"crop=\(96\.5, 96\) must be \(height, width\)"),
  "one number": ({"data.crop": 96}, r"crop=96 must be \(height, width\)"),
  "one side": ({"data.crop": (96,)}, r"crop=\(96,\) must be \(height, width\)"),
  "a word for bad records": ({"data.on_bad_record": "ignore"}, "on_bad_record='ignore' is unknown"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", sorted(loader.PROJECT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_what_training_refuses_of_the_data_is_refused_without_its_files(path, wrong, monkeypatch):
  monkeypatch.setattr(experiment, "assemble", lambda config, training=True: exp)
  needs = types.SimpleNamespace(prepare_inputs=frozenset(), prepare_outputs=frozenset())
  task = types.SimpleNamespace(eval_needs=frozenset())
  exp = types.SimpleNamespace(keys=("image",), method=needs, task=task, groups=types.SimpleNamespace(lr={}))
  config = loader.load(str(path)).copy_and_resolve_references().unlock()
  plan.check_data(config, exp)
  fields, message = WRONG[wrong]
  for field, value in fields.items():
    del config.data[field.split(".")[1]]
    config.data[field.split(".")[1]] = value
  with pytest.raises(ValueError, match=message) as told:
    plan.run(config.lock())
  assert "\n" not in str(told.value)


@pytest.mark.parametrize("captions", ["", "/nowhere/captions.json"])
def test_captions_and_depth_need_not_be_there(captions, tmp_path):
  config = loader.load("configs/kitti_depth.py:tadp,tiny")
  given = {"data.root": "/nowhere", "data.depth_root": "/nowhere/depth", "data.captions": captions}
  method = types.SimpleNamespace(prepare_inputs=frozenset({"sentence"}), prepare_outputs=frozenset({"tokens"}))
  task = types.SimpleNamespace(eval_needs=frozenset())
  exp = types.SimpleNamespace(keys=("image", "depth", "tokens"), method=method, task=task)
  plan.check_data(loader.changed(config, given), exp)
  (tmp_path / "damaged.json").write_text("{")
  with pytest.raises(ValueError, match=r"damaged\.json"):
    plan.check_data(loader.changed(config, given | {"data.captions": str(tmp_path / "damaged.json")}), exp)
  plan.check_data(loader.load("configs/rooms.py:depth,tadp,tiny"), exp)  # writes its own captions


def test_options_that_do_not_go_together_are_refused_as_in_training():
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.data.crop = (128, 128)
  with pytest.raises(ValueError, match=r"crop=\(128, 128\) does not fit into resize"):
    plan.run(config.lock())
  config = tiny.shrunk(loader.load("configs/rooms.py:referring,tiny")).unlock()
  config.data.cache = "memory"
  with pytest.raises(ValueError, match=r"data\.cache='memory' caches .*lr_groups trains the VAE"):
    plan.run(config.lock())


def test_an_incomplete_schedule_is_refused_as_in_training():
  config = config_of().copy_and_resolve_references().unlock()
  config.optim.schedule = {"name": "triangular_poly", "min_lr": 0.0}
  with pytest.raises(ValueError, match=r"config\.optim\.schedule of name 'triangular_poly' needs \['half'\]"):
    plan.run(config.lock())


def test_keys_without_a_shape_are_named():
  with pytest.raises(ValueError, match=r"shapes of \['sound'\] in a batch are not known"):
    plan.batch_shapes(config_of(), ("image", "sound"), "train")


@pytest.mark.parametrize(
  "message, asked",
  [
    (
      "Ran out of memory on HBM, the total memory required for HLO temporaries (31.30G) exceeds available HBM",
      31.3 * 2**30 + 4096,
    ),
    ("Ran out of memory in memory space hbm. Used 34.50G of 15.75G hbm. Exceeded hbm capacity", 34.5 * 2**30),
    ("Used 512.00M of 16.00M vmem", 512 * MIB),
    ("too large", None),
  ],
)
def test_what_a_program_asked_for_is_read_from_the_message(message, asked):
  found = plan.requested_bytes(f"RESOURCE_EXHAUSTED: {message}", 4096)
  assert found is None if asked is None else found == int(asked)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  """The reports of the smallest network on one device, compiled once, and the folder that keeps them."""
  workdir = tmp_path_factory.mktemp("plan")
  device = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda: device)
    return plan.run(config_of(), workdir=str(workdir)), workdir


@pytest.mark.slow
def test_a_report_says_what_the_steps_cost(reports):
  found, _ = reports
  config = config_of()
  exp = experiment.assemble(config)
  shapes = initialize.state_shapes(config, exp)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  training = found["train"]
  assert training["state"]["params"] == size(shapes.params) and training["state"]["opt_state"] == size(shapes.opt_state)
  state, batch = size(shapes), size(plan.batch_shapes(config, exp.keys, "train"))
  assert training["arguments"] == pytest.approx(state + batch, rel=0.01)
  assert training["aliased"] == pytest.approx(state, rel=0.01)  # donated
  assert training["peak"] >= training["arguments"] + training["temporaries"] > state
  assert training["flops"] > 1.5 * found["eval"]["flops"]  # 6 crops there and back, and 8 windows there
  assert training["collectives"] == {} and training["fits"] is None and training["limit"] is None
  assert found["eval"]["batch"] == 2 and found["eval"]["aliased"] == 0


@pytest.mark.slow
def test_finished_compilations_are_kept(reports, monkeypatch, capsys):
  found, workdir = reports
  held = json.loads((workdir / "plan.json").read_text())
  assert len(held) == 2
  monkeypatch.setattr(plan, "compiled_report", lambda *_: pytest.fail("compiled again"))
  monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
  again = plan.run(config_of(), workdir=str(workdir))
  assert json.loads(json.dumps(again)) == json.loads(json.dumps(found))
  text = capsys.readouterr().out
  assert "train step" in text and "eval step" in text and "optimizer state" in text and "no limit known" in text


@pytest.mark.slow
def test_another_config_is_another_compilation(reports, monkeypatch):
  _, workdir = reports
  seen = []
  monkeypatch.setattr(plan, "compiled_report", lambda config, *_: seen.append(config) or {})
  kept = plan._ReportCache(str(workdir))
  kept.report(config_of(**{"optim.lr": 1.0}), "train", jax.devices(), "", "default", 0)
  assert len(seen) == 1


def made_up(config, step, devices, topology, effort, limit):
  """A report without a compiler: 100 MiB an image, 30 with recomputation."""
  images = config.data.batch_size / config.optim.accumulation if step == "train" else 1
  peak = int(images * 100 * MIB * (0.3 if config.backbone.remat else 1))
  return {
    **{"step": step, "devices": len(devices), "kind": "cpu", "topology": topology, "effort": effort, "limit": limit},
    **{"mesh": {"data": 1, "fsdp": 1}, "batch": config.data.batch_size, "accumulation": config.optim.accumulation},
    **{"attention": "xla", "remat": config.backbone.remat, "dtype": "float32", "state": {"params": 0}},
    **{
      "trace_seconds": 0,
      "compile_seconds": 0,
      "compiler": "none",
      "encoders": 0,
      "peak": peak,
      "fits": peak <= limit,
    },
  }


def test_settings_that_fit_are_found_and_told(monkeypatch, capsys):
  monkeypatch.setattr(plan, "compiled_report", made_up)
  monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
  found = plan.run(config_of(**{"optim.norm_group": 1, "optim.loss_group": 1}), limit=250 * MIB)
  assert found["train"]["fits"] is False and found["fitting"]["fits"]
  text = capsys.readouterr().out
  assert "does not fit" in text and "fits with --config.backbone.remat=True" in text
  plan.run(config_of(), limit=MIB)
  assert "nothing that was tried fits" in capsys.readouterr().out


def test_what_cannot_be_planned_is_told_in_one_line(monkeypatch):
  with pytest.raises(ValueError, match="--effort='high' is unknown"):
    plan.run(config_of(), effort="high")
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs libtpu.*pip install 'vpd_jax\[plan\]'"):
    plan.run(config_of(), "v5e:2x4")


@pytest.mark.multidevice
def test_a_spread_state_is_told_by_the_device():
  rules = ((r"head/conv_layers/0/kernel$", (None, None, None, "fsdp")),)  # all others are too small to be split
  config = config_of(**{"data.batch_size": 24, "mesh.fsdp": 4, "mesh.rules": rules})
  exp = experiment.assemble(config)
  one = config_of(**{"data.batch_size": 24})
  whole = plan.state_bytes(one, exp, plan.mesh_for(one, jax.devices()[:1]))
  spread = plan.state_bytes(config, exp, plan.mesh_for(config, jax.devices()))
  saved = 3 * exp.spec.shapes["head/conv_layers/0/kernel"].size * 4 // 4
  assert whole["params"] - spread["params"] == saved and whole["opt_state"] - spread["opt_state"] == 2 * saved
  assert whole["frozen"] == spread["frozen"]
  with pytest.raises(ValueError, match="batch_size=6 must be a positive multiple of the 8 devices"):
    plan.compiled_report(config_of(), "train", jax.devices(), "", "default", 0)


@pytest.mark.slow
@pytest.mark.skipif(
  not topologies.importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install 'vpd_jax[plan]'"
)
def test_a_slice_that_is_not_there(capsys):
  """Minutes: TPUs compile slowly, however small the network."""
  config = config_of(**{"data.batch_size": 24, "eval.batch_size": 8, "mesh.fsdp": 4, "dtype": "bfloat16"})
  found = plan.run(config, "v5e:2x4")
  assert found["train"]["fits"] and found["train"]["devices"] == 8 and found["train"]["kind"] == "TPU v5 lite"
  assert found["train"]["optimal_seconds"] > 0 and found["train"]["collectives"]
  with pytest.raises(ValueError, match="is unknown; known are v5e"):
    plan.run(config, "v5e:3x5")


def test_weights_can_be_split_over_part_of_a_side_of_the_network():
  pytest.importorskip("libtpu")
  devices = topologies.topology_devices("v6e:16x16")
  assert dict(sharding.make_mesh(-1, 8, devices=devices).shape) == {"data": 32, "fsdp": 8}


@pytest.mark.parametrize("damaged", ['{"0123": {"st', "", "[]", "\x00\x00"])
def test_a_damaged_plan_is_made_anew(tmp_path, monkeypatch, capsys, damaged):
  (tmp_path / "plan.json").write_text(damaged)
  monkeypatch.setattr(plan, "compiled_report", lambda *_: {"step": "train"})
  kept = plan._ReportCache(str(tmp_path))
  assert "plan.json is damaged" in capsys.readouterr().out
  kept.report(config_of(), "train", jax.devices(), "", "default", 0)
  assert list(json.loads((tmp_path / "plan.json").read_text()).values()) == [{"step": "train"}]


def test_a_report_that_cannot_be_kept_is_still_given(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(plan, "compiled_report", lambda *_: {"step": "train"})
  monkeypatch.setattr(plan.atomic, "write_json", refuse)
  report = plan._ReportCache(str(tmp_path)).report(config_of(), "train", jax.devices(), "", "default", 0)
  assert report == {"step": "train"}
  assert "plan.json cannot be written ([Errno 30] Read-only file system)" in capsys.readouterr().out
