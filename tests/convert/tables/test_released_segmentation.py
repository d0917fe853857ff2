"""The authors' checkpoints of semantic segmentation: in, and out again."""

import collections

import jax
import numpy as np
import pytest

from tests.helpers import oracle, pth
from tests.helpers.released_states import layout, skeleton, state_dict
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import weight_files, write
from vpd_jax.convert.tables import released, released_segmentation

STEP = 12345
RELEASES = {
  "vpd_seg": "vpd_segmentation",
  "meta_seg_ade": "meta_prompts_segmentation",
  "meta_seg_cityscapes": "meta_prompts_segmentation",
}
UNET = "unet.unet.diffusion_model"
SHARED = {
  "encoder_vq.encoder.down.0.block.0.norm1.weight": "method/vae/encoder/down/0/block/0/norm1/scale",
  "encoder_vq.post_quant_conv.weight": "method/vae/post_quant_conv/kernel",
  f"{UNET}.time_embed.2.weight": "method/unet/time_embed/2/kernel",
  f"{UNET}.input_blocks.1.1.norm.weight": "method/unet/input_blocks/1/1/norm/scale",
  f"{UNET}.out.2.weight": "method/unet/out/2/kernel",
  "decode_head.conv_seg.weight": "head/decode_head/conv_seg/kernel",
}
META_PROMPTS = {
  "t1": "method/t/0",
  "t3": "method/t/2",
  "meta_prompts": "method/meta_prompts/0",
  "upconv1.0.weight": "neck/upconv1/0/kernel",
  "upconv4.1.weight": "neck/upconv4/1/scale",
  "decode_head.psp_modules.3.1.conv.weight": "head/decode_head/psp_modules/3/1/conv/kernel",
  "decode_head.fpn_bottleneck.bn.running_var": "head/decode_head/fpn_bottleneck/bn/var",
  "auxiliary_head.convs.0.bn.weight": "head/auxiliary_head/convs/0/bn/scale",
  "auxiliary_head.conv_seg.bias": "head/auxiliary_head/conv_seg/bias",
}
PAIRS = {
  "vpd_seg": SHARED
  | {
    "gamma": "method/gamma",
    "class_embeddings": "method/class_vectors",
    "text_adapter.fc.2.weight": "method/text_adapter/fc/2/kernel",
    "neck.lateral_convs.1.conv.weight": "neck/lateral_convs/1/conv/kernel",
    "neck.fpn_convs.3.conv.bias": "neck/fpn_convs/3/conv/bias",
    "decode_head.scale_heads.3.4.bn.running_mean": "head/decode_head/scale_heads/3/4/bn/mean",
    "decode_head.scale_heads.0.0.conv.weight": "head/decode_head/scale_heads/0/0/conv/kernel",
  },
  "meta_seg_ade": SHARED | META_PROMPTS,
  "meta_seg_cityscapes": SHARED | META_PROMPTS,
}
META = {
  "env_info": "sys.platform: linux\nCUDA available: True",
  "mmseg_version": "0.30.0",
  "CLASSES": ("wall", "building"),
  "PALETTE": [[120, 120, 120], [180, 120, 120]],
  "iter": 80000,
  "hook_msgs": {"best_score": 0.5583, "best_ckpt": "best_mIoU_iter_72000.pth"},
}


@pytest.fixture(scope="module", params=list(RELEASES))
def setup(request):
  return request.param


@pytest.fixture(scope="module")
def table(setup):
  return released.TABLES[RELEASES[setup]]()


@pytest.fixture(scope="module")
def state(setup):
  """All that the file holds, in its order, with the constants of Stable Diffusion's schedule."""
  held = state_dict(setup=setup) | released_segmentation.constants()
  return {entry["name"]: held[entry["name"]] for entry in oracle.manifest(setup)}


def shapes_of(state, table):
  """Shapes of the model, from the manifest alone."""
  shapes = {}
  for name, value in state.items():
    for rule in table:
      if isinstance(rule, rules.Rule) and (found := rule.to_target(name, value.ndim)):
        shapes[found[0]] = jax.ShapeDtypeStruct(layout(name, value).shape, np.float32)
  return shapes


@pytest.fixture(scope="module")
def targets(state, table):
  return shapes_of(state, table)


def bitwise_equal(actual, expected):
  assert list(actual) == list(expected)
  for name, value in expected.items():
    read = np.asarray(actual[name])
    assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


def test_a_release_beside_its_pickled_meta_fills_the_model(tmp_path, setup, state, targets):
  """mmsegmentation's file: names of classes, colors, versions and the optimizer beside the weights."""
  meta = META | {"seed": pth.Call("numpy.core.multiarray", "scalar", 3), "config": pth.Call("mmcv.utils", "Config", {})}
  content = {"meta": meta, "state_dict": {name: pth.tensor(value) for name, value in state.items()}, "optimizer": {}}
  path = pth.write_zip(tmp_path / "iter_80000.pth", content)
  named, report = load.load_pretrained(path, targets)
  assert named.keys() == targets.keys() and report.fresh == () and report.step == STEP
  assert report.table == f"released:{RELEASES[setup]}"
  for source, target in PAIRS[setup].items():
    np.testing.assert_array_equal(named[target], layout(source, state[source]), err_msg=source)
  dropped = collections.Counter(name.split(".")[0] for name in report.dropped)
  assert dropped["sd_model"] == 12 and dropped["cross_unet_conv3"] == (0 if setup == "vpd_seg" else 4)


def test_every_name_of_ours_has_its_own_pair(setup, targets):
  # 874 entries, 12 constants, 7 counters; 918 entries, 12 constants, 13 counters, 8 repeated.
  assert len(targets) == {"vpd_seg": 874 - 12 - 7}.get(setup, 918 - 12 - 13 - 8)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_export_is_the_release_bit_for_bit(tmp_path, state, table, targets, ending):
  named, _ = rules.convert(state, table, targets)
  write.write(tmp_path / f"out{ending}", released.state_dict(named, table, released.manifest(targets, table), STEP))
  tensors = weight_files.open_file(tmp_path / f"out{ending}").tensors
  # A .safetensors has no order: the library sorts the tensors.
  bitwise_equal(tensors if ending == ".pth" else {name: tensors[name] for name in state} | tensors, state)


def test_the_export_fills_a_list_of_entries_given(setup, state, table, targets):
  """Also one that says nothing of what is repeated."""
  named, _ = rules.convert(state, table, targets)
  bitwise_equal(released.state_dict(named, table, oracle.manifest(setup), STEP), state)
  bare = [{key: entry[key] for key in ("name", "shape", "dtype")} for entry in oracle.manifest(setup)]
  bitwise_equal(released.state_dict(named, table, bare, STEP), state)
  entries = [entry for entry in oracle.manifest(setup) if not entry["name"].startswith("sd_model.")]
  assert not [n for n in released.state_dict(named, table, entries, STEP) if n.startswith("sd_model.")]
  short = [e | {"shape": [100]} if e["name"] == "sd_model.betas" else e for e in oracle.manifest(setup)]
  with pytest.raises(rules.ConversionError, match=r"are in the manifest, but not in the weights: sd_model\.betas"):
    released.state_dict(named, table, short, STEP)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_the_table_implies_the_authors_manifest(setup, table, size):
  entries = oracle.manifest(setup, size)
  phantoms = {entry["name"]: np.broadcast_to(np.float32(0), entry["shape"]) for entry in entries}
  implied = released.manifest(dict(sorted(shapes_of(phantoms, table).items())), table)
  keys = ("name", "shape", "dtype")
  assert [{k: e[k] for k in keys} for e in implied] == [{k: entry[k] for k in keys} for entry in entries]
  # The same tensors are one, whichever of their names is called the first.
  one = lambda entries: {e["name"].split(".", e["name"].count(".") - 1)[-1] for e in entries if e.get("alias_of")}
  assert one(implied) == one(entries) == (set() if setup == "vpd_seg" else {"0.weight", "0.bias", "2.weight", "2.bias"})
  assert sum("alias_of" in e for e in implied) == sum(bool(e.get("alias_of")) for e in entries)


def test_a_changed_block_is_repeated_under_all_its_names(state, table, targets, setup):
  named, _ = rules.convert(state, table, targets)
  changed = named | {"method/unet/out/2/bias": np.arange(4, dtype=np.float32)}
  exported = released.state_dict(changed, table, released.manifest(changed, table), STEP)
  blocks = [UNET + ".out"] + ([] if setup == "vpd_seg" else ["cross_unet_conv2", "cross_unet_conv3"])
  for block in blocks:
    np.testing.assert_array_equal(exported[f"{block}.2.bias"], np.arange(4))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_meta_prompts_of_other_numbers_of_steps_have_their_names(steps):
  """One step, as for Cityscapes with its extra frames, has the last block under the UNet's name alone."""
  state, table = state_dict(setup="meta_seg_ade"), released_segmentation.meta_prompts_segmentation()
  named, _ = rules.convert(state, table, shapes_of(state, table))
  kept = {n: x for n, x in named.items() if not n.startswith("method/t/") or int(n.split("/")[2]) < steps}
  kept |= {"method/t/3": named["method/t/2"]} if steps == 4 else {}
  exported = released.state_dict(kept, table, released.manifest(kept, table), STEP)
  blocks = {name.split(".")[0] for name in exported if "cross_unet_conv" in name}
  assert blocks == {f"cross_unet_conv{i}" for i in range(2, steps + 1)}
  assert f"{UNET}.out.2.weight" in exported and list(exported)[:steps] == [f"t{i}" for i in range(1, steps + 1)]
  back, _ = rules.convert(exported, table, {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in kept.items()})
  assert all((back[n] == x).all() for n, x in kept.items())


def test_its_signs_are_in_no_other_release():
  setups = {"vpd_depth": "vpd_depth", "meta_depth": "meta_prompts_depth", **RELEASES}
  for setup, release in setups.items():
    names = [entry["name"] for entry in oracle.manifest(setup)]
    found = [kind for kind, sign in released.SIGNATURES.items() if any(name.startswith(sign) for name in names)]
    assert found[0] == release and set(found) & released_segmentation.SIGNATURES.keys() <= {release}


def test_the_constants_are_those_of_stable_diffusion():
  """Figures of its noise schedule that its users know, and what the others must be beside them."""
  held = {name.removeprefix("sd_model."): x.astype(np.float64) for name, x in released_segmentation.constants().items()}
  assert {x.shape for x in held.values()} == {(1000,)}
  np.testing.assert_allclose(held["betas"][[0, -1]], [0.00085, 0.012], rtol=1e-6)
  np.testing.assert_allclose(held["alphas_cumprod"][[0, -1]], [0.99915, 0.004660], rtol=1e-4)
  kept, before = held["alphas_cumprod"], held["alphas_cumprod_prev"]
  np.testing.assert_array_equal(before[1:], kept[:-1])
  np.testing.assert_allclose(kept / before, 1 - held["betas"], rtol=1e-6)
  squares = {name: x**2 for name, x in held.items() if name.startswith("sqrt")}
  np.testing.assert_allclose(squares["sqrt_alphas_cumprod"] + squares["sqrt_one_minus_alphas_cumprod"], 1, rtol=1e-6)
  odds = squares["sqrt_recip_alphas_cumprod"] - squares["sqrt_recipm1_alphas_cumprod"]
  np.testing.assert_allclose(odds, 1, rtol=1e-4)  # a difference of numbers up to 215
  np.testing.assert_allclose(held["log_one_minus_alphas_cumprod"], np.log(1 - kept), rtol=1e-4, atol=1e-6)
  assert held["posterior_variance"][0] == 0 and np.isclose(held["posterior_log_variance_clipped"][0], np.log(1e-20))
  # x_0 and x_t known, the mean of x_(t-1): exact for x_t = sqrt(kept) x_0.
  mean = held["posterior_mean_coef1"] + held["posterior_mean_coef2"] * held["sqrt_alphas_cumprod"]
  np.testing.assert_allclose(mean, np.sqrt(before), rtol=1e-5)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torch_loads_the_export_strictly_and_we_read_what_torch_saves(tmp_path, setup, state, table, targets):
  import torch

  named, _ = rules.convert(state, table, targets)
  write.write(tmp_path / "out.pth", released.state_dict(named, table, released.manifest(targets, table), STEP))
  loaded = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
  module = skeleton(torch, oracle.manifest(setup))
  assert list(loaded) == list(module.state_dict())
  module.load_state_dict(loaded, strict=True)
  torch.save({"meta": META | {"seed": np.float64(3)}, "state_dict": module.state_dict()}, tmp_path / "again.pth")
  again, report = load.load_pretrained(tmp_path / "again.pth", targets)
  assert report.step == STEP and all((again[n] == x).all() for n, x in named.items())
