"""Where the arrays of a run come from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import one_convolution, oracle, text_folders, tiny
from tests.helpers.iedp import iedp_config
from vpd_jax import experiment
from vpd_jax.checkpoints import clip_towers, initialize
from vpd_jax.config import loader
from vpd_jax.convert import tokenizer
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import clip
from vpd_jax.distributed import sharding
from vpd_jax.planning import plan
from vpd_jax.training import train


def config_of(source, **changes):
  config = loader.load("configs/nyu_depth.py:tiny").unlock()
  config.init.pretrained = str(source)
  config.update_from_flattened_dict(changes)
  return initialize.with_backbone_sizes(config.lock(), config.init.pretrained)


@pytest.fixture(scope="module")
def compvis(tmp_path_factory):
  """A Stable Diffusion file of the tiny sizes, the VAE's decoder and the schedule's buffers among its tensors."""
  path = tmp_path_factory.mktemp("sd") / "tiny.safetensors"
  state = oracle.weights("sd_unet_hier") | oracle.weights("sd_vae_encoder")
  write.write(path, state | {"betas": np.zeros(1000, np.float32), "model_ema.decay": np.ones((), np.float32)})
  return path


def test_a_stable_diffusion_file_fills_unet_and_vae_and_leaves_the_rest_fresh(compvis):
  config = config_of(compvis)
  exp = experiment.assemble(config)
  named, lines = initialize.weights(config, exp)
  source = oracle.weights("sd_unet_hier")["model.diffusion_model.input_blocks.0.0.weight"]
  np.testing.assert_array_equal(named["method/unet/input_blocks/0/0/kernel"], source.transpose(2, 3, 1, 0))
  assert named.keys() == exp.spec.shapes.keys()
  assert any("class vectors: random (seed 0)" in line for line in lines)
  (fresh,) = (line for line in lines if line.startswith("randomly"))
  assert "head/last_layer_depth" in fresh and "unet" not in fresh and "vae" not in fresh
  np.testing.assert_array_equal(named["method/gamma"], np.full(64, 1e-4, np.float32))


def test_a_file_without_tokenizer_needs_class_vectors(compvis):
  config = config_of(compvis, **{"method.class_vectors": ""})
  with pytest.raises(ValueError, match="brings no tokenizer") as caught:
    initialize.weights(config, experiment.assemble(config))
  assert "\n" not in str(caught.value)


def test_fresh_arrays_follow_the_seed(compvis):
  first, second, third = (
    initialize.weights(config, experiment.assemble(config))[0]["head/last_layer_depth/0/kernel"]
    for config in (config_of(compvis), config_of(compvis), config_of(compvis, seed=1))
  )
  np.testing.assert_array_equal(first, second)
  assert not np.array_equal(first, third)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_diffusers_folder_brings_sizes_weights_and_class_vectors(tmp_path):
  from diffusers import AutoencoderKL, UNet2DConditionModel

  cross, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
  UNet2DConditionModel(
    down_block_types=(cross[0],) * 3 + (plain[0],), up_block_types=(plain[1],) + (cross[1],) * 3,
    block_out_channels=(32, 32, 64, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
  ).save_pretrained(tmp_path / "unet")  # fmt: skip
  AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32,) * 4, layers_per_block=1,
  ).save_pretrained(tmp_path / "vae")  # fmt: skip
  text_folders.write_diffusers(tmp_path)
  config = config_of(tmp_path, **{"method.class_vectors": ""})
  assert config.backbone.unet.channel_mult == (1, 1, 2, 2) and config.backbone.unet.context_dim == 16
  exp = experiment.assemble(config)
  named, lines = initialize.weights(config, exp)
  assert named.keys() == exp.spec.shapes.keys()
  assert any("27 x 16 from the names" in line for line in lines)
  assert named["method/class_vectors"].shape == (27, 16) and np.ptp(named["method/class_vectors"], axis=0).min() > 0


def test_what_would_not_be_trained_as_it_is_told_is_refused():
  config = loader.load("configs/nyu_depth.py:tiny")
  exp = experiment.assemble(config)
  check = lambda changed: initialize.check_training(changed, exp)
  check(config)
  check(loader.changed(config, {"dtype": "bfloat16"}))
  for changes, message in (
    ({"param_dtype": "bfloat16"}, r"^config\.param_dtype='bfloat16' cannot be trained: .*param_dtype='float32'\.$"),
    ({"param_dtype": "bfloat16", "optim.ema_decay": 0.9999}, "moving average would be rounded away"),
    ({"num_steps": 10**6}, "ends at step"),
  ):
    changed = loader.changed(config, changes)
    for begin in (check, plan.run, lambda config: train.run(config, "nowhere")):
      with pytest.raises(ValueError, match=message):
        begin(changed)
  for dtype in ("float32", "bfloat16"):  # what is evaluated may be kept in either
    exp = experiment.assemble(loader.changed(config, {"param_dtype": dtype}), training=False)
    assert {x.dtype.name for x in exp.spec.shapes.values()} == {dtype}


WORDS = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
WORDS |= {"intermediate_size": 256, "max_position_embeddings": 77}
VISION = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
VISION |= {"image_size": 56, "patch_size": 14}


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory):
  """A folder as transformers saves a whole CLIP: both towers of the oracle, a projection of texts, a tokenizer."""
  folder = tmp_path_factory.mktemp("clip") / "folder"
  text_folders.write_tokenizer(folder)
  projection = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
  state = oracle.weights("clip_text") | oracle.weights("clip_vision") | {"text_projection.weight": projection}
  write.write(folder / "model.safetensors", state)
  content = {"model_type": "clip", "text_config": WORDS, "vision_config": VISION, "projection_dim": 48}
  (folder / "config.json").write_text(json.dumps(content))
  return folder


def with_clip(source, folder, **changes):
  config = loader.load("configs/nyu_depth.py:tiny").copy_and_resolve_references().unlock()
  config.init.update(pretrained=str(source), clip=str(folder))
  config.update_from_flattened_dict(changes)
  return initialize.with_backbone_sizes(config.lock(), config.init.pretrained)


def test_a_class_is_predicted_by_the_clip_of_init(compvis, whole_clip):
  config = with_clip(compvis, whole_clip, **{"method.prompt": "predicted"})
  assert config.backbone.image.width == 64 and config.backbone.image.projection == 48
  exp = experiment.assemble(config)
  named, lines = initialize.weights(config, exp)
  assert f"classes predicted by CLIP: {whole_clip}" in lines
  names = named["method/class_predictor/names"]
  assert names.shape == (27, 48)
  np.testing.assert_allclose(np.linalg.norm(names, axis=1), 1, rtol=1e-5)
  assert np.ptp(names, axis=0).max() > 1e-3
  source = oracle.weights("clip_vision")["visual_projection.weight"]
  np.testing.assert_array_equal(named["method/class_predictor/image_encoder/visual_projection/kernel"], source.T)
  (fresh,) = (line for line in lines if line.startswith("randomly"))
  assert "class_predictor" not in fresh


def test_a_prediction_without_clip_names_what_to_give(compvis):
  config = with_clip(compvis, "", **{"method.prompt": "predicted", "backbone.image": dict(width=16, heads=2)})
  with pytest.raises(ValueError, match=r"there is no CLIP image encoder: config\.init\.clip is empty") as caught:
    initialize.weights(config, experiment.assemble(config))
  assert "\n" not in str(caught.value)


def iedp_of(**changes):
  """IEDP's smallest network with towers of the oracle's sizes."""
  sizes = {f"backbone.text.{k}": v for k, v in {"vocab_size": 1000, "width": 64, "layers": 3, "heads": 4}.items()}
  sizes |= {"backbone.text.mlp_width": 256, "backbone.text.positions": 77, "backbone.unet.context_dim": 64}
  return initialize.with_backbone_sizes(iedp_config(**sizes, **changes), "")


def test_towers_come_from_a_whole_clip_and_training_gets_its_tokenizer(whole_clip):
  config = iedp_of(**{"init.clip": str(whole_clip), "method.tokenizer": "", "method.num_queries": 77})
  exp = experiment.assemble(config)
  named, lines = initialize.weights(config, exp)
  assert [f"CLIP {which} encoder: {whole_clip}" in lines for which in ("text", "image")] == [True, True]
  kernel = oracle.weights("clip_text")["text_model.encoder.layers.0.mlp.fc1.weight"].T
  np.testing.assert_array_equal(named["method/text_encoder/text_model/encoder/layers/0/mlp/fc1/kernel"], kernel)
  kernel = oracle.weights("clip_vision")["vision_model.encoder.layers.2.mlp.fc1.weight"].T
  np.testing.assert_array_equal(named["method/image_encoder/vision_model/encoder/layers/2/mlp/fc1/kernel"], kernel)
  tokens = exp.method.prepare({"class_id": np.int32(6)})["tokens"]
  words = tokenizer.load(whole_clip)("a photo of a kitchen", padding="max_length", max_length=77)["input_ids"]
  assert tokens.tolist() == words


def test_evaluation_never_opens_the_text_encoder(whole_clip, monkeypatch):
  config = iedp_of(**{"init.clip": str(whole_clip), "method.tokenizer": ""})
  exp = experiment.assemble(config, training=False)

  def opened(*args, **options):
    raise AssertionError("evaluation has opened it")

  for place, name in ((clip, "load_text"), (clip_towers, "text_encoder"), (tokenizer, "load")):
    monkeypatch.setattr(place, name, opened)
  named, lines = initialize.weights(config, exp)
  assert named.keys() == exp.spec.shapes.keys() and not any("text_encoder" in name for name in named)
  assert not any("text encoder" in line for line in lines)


def test_a_text_encoder_inside_stable_diffusion_goes_before_that_of_clip(tmp_path, whole_clip):
  text = {f"cond_stage_model.transformer.{n}": 2 * x for n, x in oracle.weights("clip_text").items()}
  write.write(tmp_path / "sd.safetensors", text)
  exp = experiment.assemble(iedp_of(**{"init.clip": str(whole_clip)}))
  shapes = {
    n.removeprefix(initialize.TEXT_ENCODER): s for n, s in exp.spec.shapes.items() if initialize.TEXT_ENCODER in n
  }
  found, line = clip_towers.text_encoder(shapes, pretrained=str(tmp_path / "sd.safetensors"), source=str(whole_clip))
  name = "text_model/final_layer_norm/scale"
  np.testing.assert_array_equal(found[name], 2 * oracle.weights("clip_text")["text_model.final_layer_norm.weight"])
  assert line.endswith("sd.safetensors")
  found, line = clip_towers.text_encoder(shapes, pretrained="", source=str(whole_clip))
  np.testing.assert_array_equal(found[name], oracle.weights("clip_text")["text_model.final_layer_norm.weight"])


def test_the_best_checkpoint_is_that_of_the_scores_of_the_run(tmp_path):
  with one_convolution.known():
    config = one_convolution.rooms(**{"eval.checkpoint": "best"})
    exp = experiment.assemble(config)
    state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
    for folder, scores in (("scored", (1.0, 2.0)), ("unscored", ())):
      with initialize.checkpoints(config, exp, str(tmp_path / folder)) as held:
        for step in (1, 2):
          metrics = {"eval/rooms/rmse": scores[step - 1]} if scores else {"other": 0.0}
          held.save(step, state, initialize.to_json(config), metrics, force=True)
    elsewhere = loader.changed(config, {"data.name": "another"})
    for evaluated in (config, elsewhere):
      _, lines = initialize.weights(evaluated, exp, str(tmp_path / "scored"))
      assert lines[0].endswith("scored, checkpoint of step 1")
      with pytest.raises(ValueError, match=r"the score eval/rooms/rmse, .*unscored holds none; set .*='newest'\.$"):
        initialize.weights(evaluated, exp, str(tmp_path / "unscored"))


def test_rules_for_arrays_of_training_do_not_prevent_an_evaluation():
  with one_convolution.known():
    config = one_convolution.rooms(**{"mesh.rules": (("^/lora/", ()),)})
    exp = experiment.assemble(config, training=False)
    initialize.weights_on_mesh(config, exp, sharding.make_mesh(1, 1, devices=jax.devices()[:1]), complete=False)
    with pytest.raises(ValueError, match=r"mesh\.rules: rules that match no array: \['\^/lora/'\]; remove or correct"):
      initialize.check_training(config, exp)


@pytest.fixture(scope="module")
def iedp_run(tmp_path_factory):
  """A workdir with one checkpoint of IEDP, and the arrays in it."""
  workdir = str(tmp_path_factory.mktemp("run"))
  config = iedp_config()
  exp = experiment.assemble(config)
  named = tiny.filled(exp.spec.shapes)
  with initialize.checkpoints(config, exp, workdir) as held:
    held.save(1, tiny.train_state(exp, named), initialize.to_json(config), {}, force=True)
  return workdir, config, named


def test_a_run_is_evaluated_without_what_only_training_uses(iedp_run):
  workdir, config, saved = iedp_run
  config = initialize.with_backbone_sizes(config, workdir)
  exp = experiment.assemble(config, training=False)
  named, lines = initialize.weights(config, exp, workdir)
  assert len(lines) == 1 and named.keys() == exp.spec.shapes.keys() < saved.keys()
  for name, value in named.items():
    np.testing.assert_array_equal(value, saved[name], err_msg=name)
  whole, _ = initialize.weights(config, experiment.assemble(config), workdir)
  assert whole.keys() == saved.keys()


def test_the_encoders_of_a_run_need_not_be_where_they_were(iedp_run, monkeypatch, tmp_path):
  """A relative path of another folder is like an id of the hub."""
  workdir, config, _ = iedp_run
  monkeypatch.setattr(initialize, "newest_config", lambda _: config.to_dict() | {"init": {"clip": "weights/clip"}})
  monkeypatch.setattr(clip, "sizes", lambda source: pytest.fail(f"looked for {source}"))
  given = loader.changed(config, {"init.clip": "weights/clip"})
  assert initialize.with_backbone_sizes(given, workdir).backbone == config.backbone


def test_a_method_needs_no_options_of_class_vectors(compvis):
  config = config_of(compvis).copy_and_resolve_references().unlock()
  exp = experiment.assemble(config)
  del config.method.class_vectors, config.method.tokenizer
  with pytest.raises(ValueError, match="brings no tokenizer"):
    list(initialize._prompt_arrays(config, exp, {}, str(compvis)))


NOT_OF_THIS = (
  r"is not of this config: method\.output_norm is '\w*' in the run and 'ln' here, and \d+ arrays are missing, "
  r"unknown or of another shape, like method/.*; give the config it was trained with, or no config"
)


def test_a_run_of_another_method_is_refused(iedp_run):
  workdir, config, _ = iedp_run
  changed = config.copy_and_resolve_references().unlock()
  changed.method.output_norm = "ln"
  with pytest.raises(ValueError, match=NOT_OF_THIS):
    initialize.weights(changed.lock(), experiment.assemble(changed, training=False), workdir)


def test_options_that_change_predictions_but_no_array_are_told(iedp_run):
  workdir, config, _ = iedp_run
  changed = loader.changed(config, {"task.max_depth": 80.0})
  _, lines = initialize.weights(changed, experiment.assemble(changed, training=False), workdir)
  assert lines[1] == "not as in the run: task.max_depth is 10.0 in the run and 80.0 here"


def test_a_run_that_was_told_the_class_may_predict_it(tmp_path, whole_clip):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny"))
  exp = experiment.assemble(config)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  with initialize.checkpoints(config, exp, str(tmp_path)) as held:
    held.save(1, state, initialize.to_json(config), {}, force=True)
  assert initialize.with_predicted_class(config).method.prompt == "scene_class"
  config = config.copy_and_resolve_references().unlock()
  config.init.clip = str(whole_clip)
  config = initialize.with_predicted_class(initialize.with_backbone_sizes(config.lock(), str(tmp_path)))
  assert config.method.prompt == "predicted"
  exp = experiment.assemble(config, training=False)
  named, lines = initialize.weights(config, exp, str(tmp_path))
  assert named.keys() == exp.spec.shapes.keys()
  assert lines == [f"weights: {tmp_path}, checkpoint of step 1", f"classes predicted by CLIP: {whole_clip}"]
  assert jnp.asarray(named["method/class_predictor/names"]).dtype == jnp.float32


def test_nan_in_weights_is_refused_from_every_source(tmp_path, compvis, iedp_run):
  state = oracle.weights("sd_unet_hier") | oracle.weights("sd_vae_encoder")
  name = "model.diffusion_model.input_blocks.0.0.bias"
  write.write(tmp_path / "sd.safetensors", state | {name: np.full_like(state[name], np.nan)})
  config = config_of(tmp_path / "sd.safetensors")
  with pytest.raises(ValueError, match=rf"sd\.safetensors.*: 1 arrays hold NaN.*{name}"):
    initialize.weights(config, experiment.assemble(config))
  _, config, named = iedp_run
  exp = experiment.assemble(config)
  name = next(n for n in exp.groups.lr if n.startswith("head/"))
  damaged = tiny.train_state(exp, named | {name: np.full_like(named[name], np.inf)})
  with initialize.checkpoints(config, exp, str(tmp_path / "run")) as held:
    held.save(1, damaged, initialize.to_json(config), {}, force=True)
    with pytest.raises(ValueError, match=rf"checkpoint 1 of the workdir: 1 arrays hold NaN or infinity.*{name}"):
      initialize.resume_or_start(config, exp, sharding.make_mesh(), held)
  with pytest.raises(ValueError, match=rf"checkpoint 1 of .*run: 1 arrays hold NaN or infinity: {name}"):
    initialize.weights(config, exp, str(tmp_path / "run"))


def test_the_start_places_all_arrays_in_one_call(iedp_run, monkeypatch):
  """With several processes, one by one each of them is sent to all, and different ones would not be told."""
  workdir, config, named = iedp_run
  exp, mesh = experiment.assemble(config), sharding.make_mesh()
  calls, place = [], sharding.place

  def noted(arrays, where, **options):
    calls.append(jax.tree.map(lambda x: x, arrays))  # a copy of the dicts, which are emptied
    return place(arrays, where, **options)

  monkeypatch.setattr(sharding, "place", noted)
  monkeypatch.setattr(initialize, "weights", lambda *_, **options: (named, []))
  state, _ = initialize.new_state(config, exp, mesh)
  (placed,) = calls
  assert {n for field in ("params", "frozen", "stats") for n in placed[field]} == named.keys() and placed["step"] == 0
  where = initialize.state_shardings(config, exp, mesh)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, w: x.sharding == w, state, where)))
  initialize.weights_on_mesh(config, exp, mesh, workdir, complete=True)
  assert {n for field in calls[1].values() for n in field} == named.keys() and len(calls) == 2
