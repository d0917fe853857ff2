"""Kinds of sources, our own directory, and the script."""

import hashlib
import json
import os
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import loaded_scripts, oracle, released_states, tiny
from vpd_jax import experiment
from vpd_jax.checkpoints import checkpointer, initialize
from vpd_jax.config import loader
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import weight_files, write
from vpd_jax.convert.tables import released
from vpd_jax.models import lora


def named_arrays():
  rng = np.random.default_rng(0)
  return {
    "method/unet/a/kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
    "method/vae/b/scale": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "method/gamma": np.float32(2) * np.ones(()),
  }


def described(named):
  return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in named.items()}


def report(table):
  return rules.Report(table, {"a": "method/unet/a/kernel"}, {"x": "unused"}, ("neck/x",), step=7)


@pytest.mark.parametrize("part_bytes", [1, 1 << 28])
def test_our_directory_gives_back_what_was_saved(tmp_path, monkeypatch, part_bytes):
  monkeypatch.setattr(load, "PART_BYTES", part_bytes)
  load.save(tmp_path / "w", named_arrays(), report("compvis"), {"v1.ckpt": "00"})
  assert len(list((tmp_path / "w" / "arrays").iterdir())) == (3 if part_bytes == 1 else 1)
  named, back = load.load_pretrained(tmp_path / "w", described(named_arrays()))
  assert back.step == 7 and back.table == "ours, from compvis"
  for name, value in named_arrays().items():
    assert (named[name].dtype, named[name].tobytes()) == (value.dtype, value.tobytes())


def test_the_manifest_says_where_weights_come_from(tmp_path):
  load.save(tmp_path / "w", named_arrays(), report("compvis"), {"v1.ckpt": "00"})
  content = load.manifest(tmp_path / "w")
  counts = {"table": "compvis", "step": 7, "used": 1, "dropped": 1, "fresh": ["neck/x"], "arrays": 3}
  assert counts.items() <= content.items()
  assert content["files"] == {"v1.ckpt": "00"} and set(content["versions"]) == set(load.PACKAGES)


def test_only_a_directory_from_stable_diffusion_may_leave_something_fresh(tmp_path):
  wanted = described(named_arrays()) | described({"neck/x": np.ones(2, np.float32)})
  for table in ("compvis", "released:vpd_depth"):
    load.save(tmp_path / table, named_arrays(), report(table), {})
  assert load.load_pretrained(tmp_path / "compvis", wanted)[1].fresh == ("neck/x",)
  with pytest.raises(rules.ConversionError, match="1 are filled by nothing and may not stay fresh: neck/x"):
    load.load_pretrained(tmp_path / "released:vpd_depth", wanted)


def test_a_failed_save_leaves_no_directory_under_the_name(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError("disk full")

  with monkeypatch.context() as patched:
    patched.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
      load.save(tmp_path / "w", named_arrays(), report("compvis"), {})
  assert not (tmp_path / "w").exists()
  load.save(tmp_path / "w", named_arrays(), report("compvis"), {})
  assert os.listdir(tmp_path) == ["w"]
  with pytest.raises(ValueError, match="exists already"):
    load.save(tmp_path / "w", named_arrays(), report("compvis"), {})


def test_unknown_sources_are_refused_in_one_line(tmp_path):
  (tmp_path / "folder").mkdir()
  write.write(tmp_path / "x.safetensors", {"a.weight": np.ones(2, np.float32)})
  (tmp_path / "bad" / "arrays").mkdir(parents=True)
  (tmp_path / "bad" / "manifest.json").write_text("{}")
  for name, message in {
    "absent": "does not exist; give a diffusers folder",
    "folder": "is a folder without unet/ and vae/",
    "x.safetensors": r"holds names of no known kind, like \['a.weight'\]",
    "bad": "is not the manifest of converted weights",
  }.items():
    with pytest.raises(ValueError, match=message) as caught:
      load.load_pretrained(tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_source_files_are_named_with_their_sha256(tmp_path):
  state = {"model.diffusion_model.a": np.ones(2, np.float32)}
  write.write(tmp_path / "x.safetensors", state)
  digest = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
  assert load.source_files(tmp_path / "x.safetensors") == {"x.safetensors": digest}
  for part in ("unet", "vae"):
    write.write(tmp_path / "sd" / part / "diffusion_pytorch_model.safetensors", state)
  assert load.source_files(tmp_path / "sd") == dict.fromkeys(
    (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")), digest
  )


@pytest.fixture(scope="module")
def release(tmp_path_factory):
  """A tiny release, and the shapes it fills."""
  path = tmp_path_factory.mktemp("release") / "vpd.pth"
  write.write(path, released_states.state_dict())
  return path


def test_loading_takes_less_than_twice_the_file(release):
  shapes = tiny.depth_shapes()
  load.load_pretrained(release, shapes)  # Imports and caches are not the loader's.
  tracemalloc.start()
  named, _ = load.load_pretrained(release, shapes)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert sum(array.nbytes for array in named.values()) <= peak < 1.5 * release.stat().st_size


def run(monkeypatch, *arguments):
  """The script in this process, sparing it the tracing of the model."""
  shapes = tiny.depth_shapes()
  monkeypatch.setattr(experiment, "model_shapes", lambda config: shapes)
  monkeypatch.setattr(
    sys, "argv", ["convert_checkpoint.py", "--config=configs/nyu_depth.py:tiny", *map(str, arguments)]
  )
  loaded_scripts.load("scripts/convert_checkpoint.py").main()


def test_the_script_goes_there_and_back_bit_for_bit(tmp_path, release, monkeypatch, capsys):
  run(monkeypatch, f"--source={release}", f"--output={tmp_path / 'ours'}")
  assert "released:vpd_depth: 835 tensors used, 0 arrays left fresh" in capsys.readouterr().out
  assert load.manifest(tmp_path / "ours")["files"] == load.source_files(release)
  entries = json.dumps(oracle.manifest("vpd_depth"))
  (tmp_path / "manifest.json").write_text(entries)
  for extra in ((), (f"--manifest={tmp_path / 'manifest.json'}",)):
    run(monkeypatch, f"--source={tmp_path / 'ours'}", f"--output={tmp_path / 'back.pth'}", "--reverse", *extra)
    back = weight_files.open_file(tmp_path / "back.pth").tensors
    state = released_states.state_dict()
    assert list(back) == list(state)
    assert all(np.asarray(back[name]).tobytes() == value.tobytes() for name, value in state.items())


def test_the_script_fails_in_one_line(tmp_path, monkeypatch):
  with pytest.raises(SystemExit, match=r"convert_checkpoint: weights .*does not exist"):
    run(monkeypatch, f"--source={tmp_path / 'absent'}", f"--output={tmp_path / 'x'}")


def test_the_script_refuses_before_it_reads(tmp_path, monkeypatch):
  with pytest.raises(SystemExit, match=r"convert_checkpoint: output='x\.txt' must end in one of"):
    run(monkeypatch, f"--source={tmp_path}", "--output=x.txt", "--reverse")
  monkeypatch.setattr(checkpointer, "is_workdir", lambda source: True)
  with pytest.raises(SystemExit, match=r"is the workdir of a run, which needs no conversion: .*export it with --rev"):
    run(monkeypatch, f"--source={tmp_path}", f"--output={tmp_path / 'x'}")


def test_the_script_names_the_options_of_a_run_that_are_others(tmp_path, monkeypatch):
  config = loader.load("configs/nyu_depth.py:tiny,meta_prompts")
  exp = experiment.assemble(tiny.shrunk(config))
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  with initialize.checkpoints(config, exp, str(tmp_path / "run")) as held:
    held.save(1, state, initialize.to_json(config), force=True)
  with pytest.raises(SystemExit, match=r"not of this config: method\.name is 'meta_prompts' in the run and 'vpd' here"):
    run(monkeypatch, f"--source={tmp_path / 'run'}", f"--output={tmp_path / 'x.pth'}", "--reverse")


def test_the_script_writes_the_lora_of_a_run_and_merges_it(tmp_path, monkeypatch, capsys):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny"))
  config = loader.changed(config, {"lora.rank": 2, "lora.targets": (r"/in_layers/2/kernel$",)})
  exp = experiment.assemble(config)
  with initialize.checkpoints(config, exp, str(tmp_path / "run")) as held:
    held.save(1, tiny.train_state(exp, tiny.filled(exp.spec.shapes)), initialize.to_json(config), force=True)
    saved = held.restore_weights(1)
    merged = held.evaluated(1, saved)
  run(monkeypatch, f"--source={tmp_path / 'run'}", f"--output={tmp_path / 'l.safetensors'}", "--reverse", "--only_lora")
  base = {name: saved["frozen"].get(name, x) for name, x in merged.items()}
  report = load.Report("made up", {}, {}, ())
  monkeypatch.setattr(load, "load_pretrained", lambda source, shapes: (base, report))
  monkeypatch.setattr(load, "source_files", lambda source: {})
  monkeypatch.setattr(initialize, "with_backbone_sizes", lambda *_: config)
  run(monkeypatch, "--source=base", f"--output={tmp_path / 'ours'}", f"--lora={tmp_path / 'l.safetensors'}")
  adapted = sum(name.startswith(lora.PREFIX) and name.endswith("/a") for name in exp.groups.lr)
  assert adapted > 10 and f"l.safetensors: merged into {adapted} kernels of the UNet" in capsys.readouterr().out
  assert list(load.manifest(tmp_path / "ours")["files"]) == ["LoRA l.safetensors"]
  found = load._restore(tmp_path / "ours")
  for name, x in merged.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "words, message",
  [
    (("--lora=x", "--reverse"), "--lora merges a file when converting to ours, --only_lora writes one with --reverse"),
    (("--only_lora",), "--lora merges a file when converting to ours, --only_lora writes one with --reverse"),
    (("--reverse", "--only_lora"), "is no workdir of a run, of which --only_lora writes the LoRA"),
  ],
)
def test_the_script_refuses_lora_where_it_has_no_effect(tmp_path, monkeypatch, words, message):
  with pytest.raises(SystemExit, match=message):
    run(monkeypatch, f"--source={tmp_path}", "--output=x.safetensors", *words)


@pytest.mark.parametrize(
  "words, message",
  [
    (("--manifest=m.json", "--version=v2", "--step=0"), "--manifest, --version, --step: no effect without --reverse"),
    (("--reverse", "--step=3"), r"--step=3 is of a workdir of a run, which --source='.*' is not; leave it out"),
    (("--reverse", "--only_lora", "--version=v2", "--step=3"), "--version: no effect with --only_lora; leave this out"),
    (("--reverse", "--only_lora", "--manifest=m.json"), "--manifest: no effect with --only_lora; leave this out"),
  ],
)
def test_the_script_refuses_flags_without_effect(tmp_path, monkeypatch, words, message):
  with pytest.raises(SystemExit, match=f"^convert_checkpoint: {message}"):
    run(monkeypatch, f"--source={tmp_path}", "--output=x.safetensors", *words)


def test_every_release_has_a_signature():
  assert released.SIGNATURES.keys() == released.TABLES.keys()


def test_a_directory_that_could_not_be_read_again_is_not_written(tmp_path):
  with pytest.raises(ValueError, match=r"output=.* holds \[ \], and arrays below such a name are never found again"):
    load.save(tmp_path / "w[1]", named_arrays(), report("compvis"), {})
  assert not list(tmp_path.iterdir())
  load.save(tmp_path / "w", named_arrays(), report("compvis"), {})
  (tmp_path / "w").rename(tmp_path / "w[1]")
  with pytest.raises(ValueError, match=r"weights=.*rename the folder"):
    load.load_pretrained(tmp_path / "w[1]", described(named_arrays()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads, after the error
def test_damaged_arrays_are_told_in_one_line(tmp_path):
  load.save(tmp_path / "w", named_arrays(), report("compvis"), {})
  (tmp_path / "w" / "arrays" / "000" / "manifest.ocdbt").write_bytes(b"")
  with pytest.raises(ValueError, match=r"weights .* is damaged .*remove .*w, and convert them again") as caught:
    load.load_pretrained(tmp_path / "w", described(named_arrays()))
  assert "\n" not in str(caught.value)
