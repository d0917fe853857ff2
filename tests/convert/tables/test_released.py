"""The authors' depth checkpoints, of VPD and of MetaPrompts: in, and out again."""

import argparse
import os

import jax
import numpy as np
import pytest

from tests.helpers import oracle, pth
from tests.helpers.released_states import STEP, layout, skeleton, state_dict
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import weight_files, write
from vpd_jax.convert.tables import released


@pytest.fixture(scope="module", params=["vpd_depth", "meta_prompts_depth", "eco_depth_depth", "eco_depth_v2_depth"])
def release(request):
  """The release's name in released.TABLES."""
  return request.param


@pytest.fixture(scope="module")
def state(release):
  return state_dict(setup=SETUPS[release])


@pytest.fixture(scope="module")
def targets(release, state):
  return shapes_of(release, state)


def shapes_of(release, state):
  """Shapes of the model, from the manifest alone: this tests names only through the pairs below."""
  shapes = {}
  for name, value in state.items():
    for rule in released.TABLES[release]():
      if isinstance(rule, rules.Rule) and (found := rule.to_target(name, value.ndim)):
        shapes[found[0]] = jax.ShapeDtypeStruct(layout(name, value).shape, np.float32)
  return shapes


SETUPS = {
  "vpd_depth": "vpd_depth",
  "meta_prompts_depth": "meta_depth",
  "eco_depth_depth": "eco_depth",
  "eco_depth_v2_depth": "eco_depth_v2",
}  # names in tests/golden
HEAD = {
  "decoder.deconv_layers.0.weight": "head/deconv_layers/0/kernel",
  "decoder.deconv_layers.1.running_mean": "head/deconv_layers/1/mean",
  "decoder.conv_layers.0.weight": "head/conv_layers/0/kernel",
  "decoder.conv_layers.1.running_var": "head/conv_layers/1/var",
  "last_layer_depth.2.weight": "head/last_layer_depth/2/kernel",
}
VPD = {
  "encoder.gamma": "method/gamma",
  "encoder.class_embeddings": "method/class_vectors",
  "encoder.text_adapter.fc.2.weight": "method/text_adapter/fc/2/kernel",
  "encoder.encoder_vq.post_quant_conv.weight": "method/vae/post_quant_conv/kernel",
  "encoder.encoder_vq.encoder.down.0.block.0.norm1.weight": "method/vae/encoder/down/0/block/0/norm1/scale",
  "encoder.encoder_vq.encoder.mid.attn_1.q.weight": "method/vae/encoder/mid/attn_1/q/kernel",
  "encoder.unet.unet.diffusion_model.time_embed.0.weight": "method/unet/time_embed/0/kernel",
  "encoder.unet.unet.diffusion_model.input_blocks.1.0.in_layers.0.weight": (
    "method/unet/input_blocks/1/0/in_layers/0/scale"
  ),
  "encoder.unet.unet.diffusion_model.input_blocks.1.1.proj_in.weight": "method/unet/input_blocks/1/1/proj_in/kernel",
  "encoder.unet.unet.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (
    "method/unet/input_blocks/1/1/transformer_blocks/0/attn1/to_out/0/kernel"
  ),
  "encoder.layer1.1.bias": "neck/layer1/1/bias",
  "encoder.layer2.0.weight": "neck/layer2/0/kernel",
  "encoder.out_layer.1.weight": "neck/out_layer/1/scale",
}
META_PROMPTS = {
  "encoder.t1": "method/t/0",
  "encoder.t3": "method/t/2",
  "encoder.meta_prompts2": "method/meta_prompts/1",
  "encoder.text_adapter1.fc.2.weight": "method/text_adapter/0/fc/2/kernel",
  "encoder.text_adapter3.fc.0.bias": "method/text_adapter/2/fc/0/bias",
  "encoder.cross_unet_conv2.0.weight": "method/unet/out/0/scale",
  "encoder.cross_unet_conv2.2.weight": "method/unet/out/2/kernel",
  "encoder.encoder_vq.post_quant_conv.weight": "method/vae/post_quant_conv/kernel",
  "encoder.unet.unet.diffusion_model.output_blocks.11.1.norm.weight": "method/unet/output_blocks/11/1/norm/scale",
  "encoder.layer1.0.weight": "neck/layer1/0/kernel",
  "encoder.layer2.deconv_layers.0.weight": "neck/layer2/deconv_layers/0/kernel",
  "encoder.layer3.deconv_layers.4.running_mean": "neck/layer3/deconv_layers/4/mean",
  "encoder.layer4.conv_layers.0.weight": "neck/layer4/conv_layers/0/kernel",
  "encoder.layer4.conv_layers.1.running_var": "neck/layer4/conv_layers/1/var",
  "encoder.out_layer.1.bias": "neck/out_layer/1/bias",
}
CIDE = "encoder.cide_module."
ECO_DEPTH = {
  f"{CIDE}embeddings": "method/embeddings",
  f"{CIDE}gamma": "method/gamma",
  f"{CIDE}fc.2.weight": "method/fc/2/kernel",
  f"{CIDE}embedding_adapter.fc.0.weight": "method/text_adapter/fc/0/kernel",
  f"{CIDE}vit_model.vit.embeddings.cls_token": "method/vit_model/vit/embeddings/cls_token",
  f"{CIDE}vit_model.vit.embeddings.position_embeddings": "method/vit_model/vit/embeddings/position_embeddings",
  f"{CIDE}vit_model.vit.embeddings.patch_embeddings.projection.weight": (
    "method/vit_model/vit/embeddings/patch_embeddings/projection/kernel"
  ),
  f"{CIDE}vit_model.vit.encoder.layer.1.attention.attention.key.bias": (
    "method/vit_model/vit/encoder/layer/1/attention/attention/key/bias"
  ),
  f"{CIDE}vit_model.vit.encoder.layer.2.layernorm_after.weight": (
    "method/vit_model/vit/encoder/layer/2/layernorm_after/scale"
  ),
  f"{CIDE}vit_model.classifier.weight": "method/vit_model/classifier/kernel",
  "encoder.layer1.3.weight": "neck/layer1/3/kernel",
  "encoder.unet.unet.diffusion_model.time_embed.0.weight": "method/unet/time_embed/0/kernel",
}
ECO_DEPTH_V2 = {name.replace(".unet.unet.diffusion_model.", ".unet."): ours for name, ours in ECO_DEPTH.items()}
PAIRS = {
  "vpd_depth": VPD | HEAD,
  "meta_prompts_depth": META_PROMPTS | HEAD,
  "eco_depth_depth": ECO_DEPTH | HEAD,
  "eco_depth_v2_depth": ECO_DEPTH_V2 | HEAD,
}


@pytest.mark.parametrize("wrap", ["module", "model", "bare"])
def test_a_release_fills_the_model(tmp_path, release, state, targets, wrap):
  prefix = "module." if wrap == "module" else ""
  content = {prefix + name: pth.tensor(value) for name, value in state.items()}
  path = pth.write_zip(
    tmp_path / "vpd.pth",
    content if wrap == "bare" else {"model": content, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=5e-4)},
  )
  named, report = load.load_pretrained(path, targets)
  assert named.keys() == targets.keys() and report.fresh == () and report.step == STEP
  assert report.table == f"released:{release}"
  for source, target in PAIRS[release].items():
    np.testing.assert_array_equal(named[target], layout(source, state[source]), err_msg=source)


def test_every_name_of_ours_has_its_own_pair(release, targets):
  # 839 entries, 4 of them counters; 912 entries, 13 of them counters and 8 repeated; 899 entries, 4 of them counters.
  assert (
    len(targets) == {"vpd_depth": 835, "meta_prompts_depth": 891, "eco_depth_depth": 895}[release.replace("_v2", "")]
  )
  method = {
    "vpd_depth": {"gamma", "class_vectors", "text_adapter"},
    "meta_prompts_depth": {"t", "meta_prompts", "text_adapter", "layer3", "layer4"},
    "eco_depth_depth": {"embeddings", "gamma", "vit_model", "fc", "text_adapter"},
  }
  assert {name.split("/")[1] for name in targets} == method[release.replace("_v2", "")] | {
    *("unet", "vae", "layer1", "layer2", "out_layer", "deconv_layers", "conv_layers", "last_layer_depth"),
  }


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_export_is_the_release_bit_for_bit(tmp_path, release, state, targets, ending):
  table = released.TABLES[release]()
  named, _ = rules.convert(state, table, targets)
  exported = rules.export(named, table, released.manifest(targets, table), STEP)
  write.write(tmp_path / f"out{ending}", exported)
  back = weight_files.open_file(tmp_path / f"out{ending}").tensors
  assert list(back) == list(state) if ending == ".pth" else back.keys() == state.keys()
  for name, value in state.items():
    read = np.asarray(back[name])
    assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_the_table_implies_the_authors_manifest(release, size):
  entries, table = oracle.manifest(SETUPS[release], size), released.TABLES[release]()
  phantoms = {entry["name"]: np.broadcast_to(np.float32(0), entry["shape"]) for entry in entries}
  implied = released.manifest(dict(sorted(shapes_of(release, phantoms).items())), table)
  alias = lambda entry: {"alias_of": entry["alias_of"]} if entry.get("alias_of") else {}
  assert implied == [{key: entry[key] for key in ("name", "shape", "dtype")} | alias(entry) for entry in entries]


def test_a_file_of_the_later_ecodepth_may_hold_a_class_token_in_place_of_the_mixture(tmp_path):
  """Under Lightning's "state_dict", beside what Lightning keeps."""
  state = state_dict(setup="eco_depth_v2")
  mixture = tuple(f"{CIDE}{part}" for part in ("fc.", "embeddings", "gamma", "embedding_adapter."))
  kept = {name: value for name, value in state.items() if not name.startswith(mixture)}
  targets = shapes_of("eco_depth_v2_depth", kept)
  content = {"state_dict": {name: pth.tensor(value) for name, value in kept.items()}, "epoch": 3, "global_step": 9}
  lightning = {"pytorch-lightning_version": "2.1", "hyper_parameters": argparse.Namespace(lr=5e-4), "loops": {}}
  path = pth.write_zip(tmp_path / "weights_indoor.ckpt", content | lightning)
  named, report = load.load_pretrained(path, targets)
  assert len(state) - len(kept) == 10 and named.keys() == targets.keys()
  assert report.table == "released:eco_depth_v2_depth" and released.of("eco_depth", "depth", "v2") in released.TABLES
  with pytest.raises(rules.ConversionError, match="are filled by nothing and may not stay fresh: method/embeddings"):
    load.load_pretrained(path, shapes_of("eco_depth_v2_depth", state))


def test_the_shared_block_of_meta_prompts_stands_under_three_names():
  entries = {e["name"]: e.get("alias_of") for e in oracle.manifest("meta_depth")}
  state = state_dict(setup="meta_depth")
  table = released.meta_prompts_depth()
  named, report = rules.convert(state, table, shapes_of("meta_prompts_depth", state))
  aliases = {name: origin for name, origin in entries.items() if origin}
  assert {name.split(".")[1] for name in aliases} == {"cross_unet_conv3", "unet"} and len(aliases) == 8
  assert {report.dropped[name] for name in aliases} == {"the same module as cross_unet_conv2"}
  changed = named | {"method/unet/out/2/bias": np.arange(4, dtype=np.float32)}
  exported = rules.export(changed, table, released.manifest(changed, table), STEP)
  for name, origin in aliases.items():
    np.testing.assert_array_equal(exported[name], exported[origin])
  np.testing.assert_array_equal(exported["encoder.unet.unet.diffusion_model.out.2.bias"], np.arange(4))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_meta_prompts_of_other_numbers_of_steps_have_their_names(steps):
  """One step has no block between passes."""
  state = state_dict(setup="meta_depth")
  table = released.meta_prompts_depth()
  named, _ = rules.convert(state, table, shapes_of("meta_prompts_depth", state))
  kept = {
    n: x
    for n, x in named.items()
    if not any(
      f"/{i}/" in f"{n}/" and "/unet/" not in n
      for i in range(steps, 3)
      if n.split("/")[1] in ("t", "meta_prompts", "text_adapter")
    )
  }
  if steps == 4:
    kept |= {
      n.replace("/2", "/3", 1): x for n, x in named.items() if n.split("/")[1:3] in (["t", "2"], ["meta_prompts", "2"])
    }
  if steps == 1:
    kept = {n: x for n, x in kept.items() if not n.startswith("method/unet/out/")}
  exported = rules.export(kept, table, released.manifest(kept, table), STEP)
  blocks = {name.split(".")[1] for name in exported if "cross_unet_conv" in name}
  assert blocks == {f"cross_unet_conv{i}" for i in range(2, steps + 1)}
  back, _ = rules.convert(exported, table, {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in kept.items()})
  assert all((back[n] == x).all() for n, x in kept.items())


def test_a_release_must_fill_everything(tmp_path):
  state = state_dict()
  targets = shapes_of("vpd_depth", state)
  partial = {name: pth.tensor(value) for name, value in state.items() if "last_layer" not in name}
  path = pth.write_zip(tmp_path / "vpd.pth", partial | {"decoder.extra.weight": pth.tensor(np.ones(2, np.float32))})
  with pytest.raises(rules.ConversionError) as caught:
    load.load_pretrained(path, targets)
  message = str(caught.value)
  assert "1 match no rule: decoder.extra.weight [2]" in message
  assert "4 are filled by nothing and may not stay fresh: head/last_layer_depth/0/kernel" in message
  assert "without effect (the source lacks what they describe): last_layer_depth" in message


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torch_loads_the_export_strictly(tmp_path, release, state, targets):
  import torch

  table = released.TABLES[release]()
  named, _ = rules.convert(state, table, targets)
  write.write(tmp_path / "out.pth", rules.export(named, table, released.manifest(targets, table), STEP))
  loaded = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
  module = skeleton(torch, oracle.manifest(SETUPS[release]))
  assert list(loaded) == list(module.state_dict()) == list(state)
  module.load_state_dict(loaded, strict=True)
  for name, value in module.state_dict().items():
    assert value.numpy().tobytes() == state[name].tobytes(), name


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_itself_are_read(tmp_path, release, state, targets, zipped):
  import torch

  module = skeleton(torch, oracle.manifest(SETUPS[release]))
  module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
  optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
  content = {"model": {f"module.{n}": v for n, v in module.state_dict().items()}, "optimizer": optimizer.state_dict()}
  content |= {"args": _Arguments(), "rng": torch.get_rng_state(), "device": torch.device("cpu"), "dtype": torch.float16}
  torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
  named, _ = load.load_pretrained(tmp_path / "last.ckpt", targets)
  for source, target in PAIRS[release].items():
    np.testing.assert_array_equal(named[target], layout(source, state[source]), err_msg=source)


class _Arguments:
  """A training object that a file may hold; it must not be made."""

  def __setstate__(self, state):
    os.abort()

  def __getstate__(self):
    return {"lr": 1}


ALIASES = {
  "meta_depth": ("encoder.cross_unet_conv2", "encoder.cross_unet_conv3", "encoder.unet.unet.diffusion_model.out"),
  "meta_seg_ade": ("cross_unet_conv2", "cross_unet_conv3", "unet.unet.diffusion_model.out"),
}


@pytest.mark.parametrize("setup, kept", [(setup, name) for setup, names in ALIASES.items() for name in names])
def test_a_block_with_several_names_may_be_stored_under_any_one_of_them(tmp_path, setup, kept):
  """safetensors' save_model keeps one name of each shared tensor; so does who saves distinct tensors only."""
  state = state_dict(setup=setup)
  others = tuple(f"{name}." for name in ALIASES[setup] if name != kept)
  alone = {name: value for name, value in state.items() if not name.startswith(others)}
  assert len(state) - len(alone) == 8
  release = {"meta_depth": "meta_prompts_depth", "meta_seg_ade": "meta_prompts_segmentation"}[setup]
  targets = shapes_of(release, state)
  write.write(tmp_path / "once.safetensors", alone)
  named, report = load.load_pretrained(tmp_path / "once.safetensors", targets)
  np.testing.assert_array_equal(named["method/unet/out/2/kernel"], layout("x", state[f"{kept}.2.weight"]))
  assert named.keys() == targets.keys() and report.fresh == ()


@pytest.mark.parametrize(
  "count, step",
  [
    (None, 0),
    (np.array([7]), 7),
    (np.float16(np.inf), 0),
    (np.float16(9), 9),
    (np.array([1, 2]), 0),
    (np.int32(-1), 0),
  ],
)
def test_counters_may_be_absent_or_of_any_form(tmp_path, count, step):
  state = {name: value for name, value in state_dict().items() if not name.endswith(rules.COUNTER)}
  counters = [name for name in state_dict() if name.endswith(rules.COUNTER)]
  assert len(counters) == 4
  given = state | ({} if count is None else dict.fromkeys(counters, np.asarray(count)))
  write.write(tmp_path / "w.safetensors", given)
  _, report = load.load_pretrained(tmp_path / "w.safetensors", shapes_of("vpd_depth", state))
  assert report.step == step


def test_every_table_takes_a_file_without_counters():
  for release, table in released.TABLES.items():
    (row,) = (row for row in table() if isinstance(row, rules.Drop) and rules.COUNTER in row.pattern)
    assert row.optional, release


def test_counters_of_shape_one_are_written_as_a_list_of_names_says():
  entries = [{"name": "net.num_batches_tracked", "shape": [1], "dtype": "int64"}]
  exported = rules.export({}, [], entries, 5)
  np.testing.assert_array_equal(exported["net.num_batches_tracked"], [5])
