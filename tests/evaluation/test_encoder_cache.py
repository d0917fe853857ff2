"""Latents and text states ahead of the network: the same bits whatever is kept, computed as often as needed."""

import inspect
import itertools

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.referring_rooms import small
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.data.readers import referring
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import encoder_cache
from vpd_jax.planning import plan


@pytest.fixture(scope="module")
def made():
  config = small()
  exp = experiment.assemble(config)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  return config, exp, state


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def encodings(made, mesh, kind="off", folder=""):
  config, exp, _ = made
  dataset = experiment.dataset(config, exp)
  dataset.encoder_cache = referring.check_cache(kind, str(folder))
  return encoder_cache.EncoderCache(config, exp, dataset, mesh)


def evaluation(made, batch_size=2):
  config, exp, _ = made
  dataset = experiment.dataset(config, exp)
  keys = (*exp.keys, "image_id")
  return pipeline.eval_batches(dataset, batch_size=batch_size, keys=keys, prepare=exp.method.prepare)


def results(encodings, made, count=None):
  """(batches with results, rows that had to be computed) of the evaluation split, or of its first batches."""
  encoded = encodings(evaluation(made), made[2].frozen)
  batches = list(itertools.islice(encoded, count))
  encoded.close()
  return batches, encoded.computed


def equal(first, second):
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def plain(made, mesh):
  return results(encodings(made, mesh), made)


def test_a_picture_is_encoded_once_in_a_pass_and_as_the_network_would(made, mesh, plain):
  batches, computed = plain
  rows = [(int(i), batch["real"][place]) for batch in batches for place, i in enumerate(batch["image_id"])]
  assert computed["latents"] == len({i for i, _ in rows}) < sum(real for _, real in rows) <= len(rows)
  _, exp, state = made
  model = exp.spec.merge(state.params, state.frozen, state.stats)
  raw = next(evaluation(made))
  assert set(batches[0]) == {*raw, "latents", "text_states"} - {"tokens"}
  for name in ("latents", "text_states"):
    expected = np.asarray(getattr(model.method, name)(raw))
    np.testing.assert_allclose(batches[0][name], expected, atol=1e-5 * np.abs(expected).max())


def test_kept_in_memory_or_on_disk_all_bits_are_the_same(made, mesh, plain, tmp_path):
  expected, computed = plain
  for kind, folder in (("memory", ""), ("disk", tmp_path)):
    keeping = encodings(made, mesh, kind, folder)
    first, again = results(keeping, made), results(keeping, made)
    equal(first[0], expected)
    equal(again[0], expected)
    assert first[1]["latents"] == computed["latents"] and set(again[1].values()) == {0}
  # Another process: nothing is computed.
  restarted, computed = results(encodings(made, mesh, "disk", tmp_path), made)
  equal(restarted, expected)
  assert set(computed.values()) == {0}


def test_damaged_and_unfinished_files_are_made_anew(made, mesh, plain, tmp_path):
  results(encodings(made, mesh, "disk", tmp_path), made, 1)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert files and not [path for path in files if path.suffix == ".unfinished"]
  whole = {path: path.read_bytes() for path in files}
  for path, content in whole.items():
    path.write_bytes(content[: len(content) // 2] if path.stat().st_size % 2 else bytes(len(content)))
    path.with_name(path.name + ".7.unfinished").write_bytes(content[:5])
  batches, computed = results(encodings(made, mesh, "disk", tmp_path), made, 1)
  equal(batches, plain[0][:1])
  assert all(computed.values()) and {path: path.read_bytes() for path in files} == whole


def test_other_weights_and_other_pictures_meet_no_old_result(made, mesh, tmp_path):
  _, _, state = made
  keeping = encodings(made, mesh, "disk", tmp_path)
  raw = next(evaluation(made))
  first = next(keeping(iter([raw]), state.frozen))
  darker = next(keeping(iter([raw | {"image": raw["image"] // 2}]), state.frozen))
  assert (first["latents"] != darker["latents"]).any()
  changed = {n: x * 1.01 if n.endswith("quant_conv/kernel") else x for n, x in state.frozen.items()}
  other = keeping(iter([raw]), changed)
  batch = next(other)
  assert other.computed["latents"] and not other.computed["text_states"]
  assert (first["latents"] != batch["latents"]).any()


def test_where_the_vae_is_trained_nothing_is_kept(made, mesh):
  config = made[0].copy_and_resolve_references().unlock()
  config.optim.lr_groups = ((r"", 1.0),)
  exp = experiment.assemble(config.lock())
  trained = (config, exp, None)
  encoding, batches = encodings(trained, mesh), iter(())
  assert not encoding.active and encoding.lines() == [] and encoding(batches, {}) is batches
  with pytest.raises(ValueError, match=r"data.cache='memory' caches .*lr_groups trains the VAE; freeze"):
    encodings(trained, mesh, "memory")


def test_where_latents_are_drawn_nothing_is_kept(mesh):
  config = small().copy_and_resolve_references().unlock()
  config.method = {"name": "tadp", "token_length": 8, "tokenizer": "words"}
  for latents, active in (("sample", False), ("mode", True)):
    config.method.latents = latents
    drawn = (config, experiment.assemble(config.copy_and_resolve_references().lock()), None)
    assert encodings(drawn, mesh).active == active
    if not active:
      with pytest.raises(
        ValueError, match=r"data.cache='memory' caches .*samples new latents in every step; use the mode"
      ):
        encodings(drawn, mesh, "memory")


def test_options_that_cannot_be():
  for kind, folder, message in (
    ("ram", "", "'ram' is unknown"),
    ("disk", "", "name a folder"),
    ("memory", "x", "leave it empty"),
  ):
    with pytest.raises(ValueError, match=message):
      referring.check_cache(kind, folder)


def test_a_folder_that_cannot_be_made(made, mesh, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot be created or written to"):
    encodings(made, mesh, "disk", tmp_path / "file")(iter(()), made[2].frozen)


def test_what_a_step_is_given_is_known_without_the_data(made, plain):
  config, exp, state = made
  raw = plan.batch_shapes(config, (*exp.keys, "image"), "eval")
  batch, held = encoder_cache.encoded_batch_shapes(config, exp, raw)
  seen = plain[0][0]
  names = {"latents", "text_states", "image"}
  assert "tokens" in raw and "tokens" not in batch and names <= batch.keys()
  assert all(batch[n].shape[1:] == seen[n].shape[1:] and batch[n].dtype == seen[n].dtype for n in names)
  encoders = tuple(encoder_cache.ENCODERS.values())
  assert held == sum(np.asarray(x).nbytes for n, x in state.frozen.items() if n.startswith(encoders)) > 0


def test_a_network_that_encodes_its_pictures_itself_is_planned_so():
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny"))
  exp = experiment.assemble(config)
  raw = plan.batch_shapes(config, exp.keys, "train")
  assert encoder_cache.encoded_batch_shapes(config, exp, raw) == (raw, 0)


def test_data_sets_say_alike_whether_pictures_are_encoded_ahead(made, mesh):
  depth = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny"))
  for config, exp in ((made[0], made[1]), (depth, experiment.assemble(depth))):
    dataset = experiment.dataset(config, exp)
    assert dataset.info(config.data).only_resizes == (dataset.encoder_cache is not None)
  for name, kind in experiment.DATASETS.items():
    if name != "rooms":
      options = {"classes": ("a",), "keypoints": ("a",)}
      assert kind.info(options).only_resizes == ("cache" in inspect.signature(kind.__init__).parameters), name
