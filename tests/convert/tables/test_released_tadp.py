"""The authors' checkpoints of TADP: in, out again, and tensors that stand twice."""

import collections

import jax
import numpy as np
import pytest

from tests.helpers import oracle, pth
from tests.helpers.released_states import STEP, layout, state_dict
from vpd_jax.convert import load, rules
from vpd_jax.convert.tables import released, released_segmentation, released_tadp

TEXT = "sd_model.cond_stage_model.transformer.text_model"
OURS = "method/text_encoder/text_model"
RELEASES = {"tadp_depth_nyu": "tadp_depth", "tadp_seg_ade": "tadp_segmentation"}
PAIRS = {
  "tadp_depth_nyu": {
    "encoder.encoder_vq.quant_conv.weight": "method/vae/quant_conv/kernel",
    "encoder.unet.unet.diffusion_model.time_embed.0.weight": "method/unet/time_embed/0/kernel",
    f"encoder.{TEXT}.embeddings.position_embedding.weight": f"{OURS}/embeddings/position_embedding/embedding",
    f"encoder.{TEXT}.encoder.layers.2.mlp.fc1.weight": f"{OURS}/encoder/layers/2/mlp/fc1/kernel",
    "encoder.layer1.0.weight": "neck/layer1/0/kernel",
    "last_layer_depth.2.weight": "head/last_layer_depth/2/kernel",
  },
  "tadp_seg_ade": {
    "sd_model.first_stage_model.quant_conv.weight": "method/vae/quant_conv/kernel",
    "unet.unet.diffusion_model.out.2.weight": "method/unet/out/2/kernel",
    f"{TEXT}.final_layer_norm.weight": f"{OURS}/final_layer_norm/scale",
    f"{TEXT}.encoder.layers.0.self_attn.q_proj.bias": f"{OURS}/encoder/layers/0/self_attn/q_proj/bias",
    "neck.lateral_convs.1.conv.weight": "neck/lateral_convs/1/conv/kernel",
    "decode_head.conv_seg.bias": "head/decode_head/conv_seg/bias",
  },
}
UNUSED = ("encoder.gamma", "encoder.class_embeddings")
COPY = "encoder.sd_model.first_stage_model.quant_conv.bias"


@pytest.fixture(scope="module", params=RELEASES)
def setup(request):
  return request.param


@pytest.fixture(scope="module")
def table(setup):
  return released.TABLES[RELEASES[setup]]()


@pytest.fixture(scope="module")
def state(setup):
  """All that the file holds, in its order, with the constants of Stable Diffusion's schedule."""
  held = state_dict(setup=setup) | released_segmentation.constants() | released_tadp.constants()
  return {entry["name"]: held[entry["name"]] for entry in oracle.manifest(setup)}


def shapes_of(state, table):
  """Shapes of the model, from the manifest alone."""
  shapes = {}
  for name, value in state.items():
    for rule in table:
      if isinstance(rule, rules.Rule) and (found := rule.to_target(name, value.ndim)):
        shapes[found[0]] = jax.ShapeDtypeStruct(found[1].forward(value).shape, np.float32)
  return shapes


@pytest.fixture(scope="module")
def targets(state, table):
  return shapes_of(state, table)


def test_a_release_fills_the_model(tmp_path, setup, state, targets):
  wrapper = "model" if setup == "tadp_depth_nyu" else "state_dict"
  path = pth.write_zip(tmp_path / "tadp.ckpt", {wrapper: {name: pth.tensor(value) for name, value in state.items()}})
  named, report = load.load_pretrained(path, targets)
  assert named.keys() == targets.keys() and report.fresh == () and report.step == STEP
  assert report.table == f"released:{RELEASES[setup]}"
  for source, target in PAIRS[setup].items():
    value = state[source] if "embedding" in source else layout(source, state[source])
    np.testing.assert_array_equal(named[target], value, err_msg=source)
  why = collections.Counter(report.dropped.values())
  repeated = {reason: count for reason, count in why.items() if reason.startswith("repeated")}
  assert why["constants of the noise schedule"] == 12
  assert sum(repeated.values()) == (792 if setup == "tadp_depth_nyu" else 0)


def test_the_export_is_the_release_bit_for_bit_but_for_what_no_caption_needs(setup, state, table, targets):
  named, _ = rules.convert(state, table, targets)
  for entries in (released.manifest(targets, table), bare(oracle.manifest(setup))):
    exported = released.state_dict(named, table, entries, STEP)
    expected = {name: value for name, value in state.items() if name not in UNUSED}
    assert list(exported) == list(expected)
    for name, value in expected.items():
      assert (exported[name].dtype, exported[name].tobytes()) == (value.dtype, value.tobytes()), name


def bare(entries):
  """Without a word on what is repeated."""
  return [{key: e[key] for key in ("name", "shape", "dtype")} for e in entries if e["name"] not in UNUSED]


@pytest.fixture(scope="module")
def depth():
  """(tensors, table, shapes) of the release for depth."""
  table, state = released.tadp_depth(), state_dict(setup="tadp_depth_nyu")
  return state, table, shapes_of(state, table)


def test_copies_that_differ_are_refused(depth):
  state, table, targets = depth
  wrong = state | {COPY: state[COPY] + 1}
  message = rf"1 differ from what they should repeat: {COPY} from encoder\.encoder_vq\.quant_conv\.bias"
  with pytest.raises(rules.ConversionError, match=message):
    rules.convert(wrong, table, targets)


def test_copies_may_be_absent_but_not_stand_alone(depth):
  state, table, targets = depth
  short = {name: value for name, value in state.items() if ".first_stage_model." not in name}
  named, _ = rules.convert(short, table, targets)
  assert named.keys() == targets.keys()
  alone = {name: value for name, value in state.items() if name != "encoder.encoder_vq.quant_conv.bias"}
  with pytest.raises(rules.ConversionError, match=r"method/vae/quant_conv/bias"):
    rules.convert(alone, table, targets)


def test_position_ids_of_older_files_do_not_matter(depth):
  state, table, targets = depth
  name = f"encoder.{TEXT}.embeddings.position_ids"
  _, report = rules.convert(state | {name: np.arange(77)[None]}, table, targets)
  assert name in report.dropped


def test_its_signs_are_in_no_other_release_and_are_asked_for_first():
  setups = {"vpd_depth": "vpd_depth", "vpd_seg": "vpd_segmentation", "vpd_refer_77": "vpd_refer", **RELEASES}
  for setup, release in setups.items():
    names = [entry["name"] for entry in oracle.manifest(setup)]
    found = [kind for kind, sign in released.SIGNATURES.items() if any(name.startswith(sign) for name in names)]
    assert found[0] == release, setup
