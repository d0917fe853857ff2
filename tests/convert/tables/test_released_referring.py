"""The authors' checkpoints of referring segmentation: in, and out again."""

import jax
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers.released_states import layout, state_dict
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released, released_referring

STEP = 12345
PAIRS = {
  "gamma": "method/gamma",
  "encoder_vq.post_quant_conv.weight": "method/vae/post_quant_conv/kernel",
  "unet.unet.diffusion_model.time_embed.0.weight": "method/unet/time_embed/0/kernel",
  "unet.unet.diffusion_model.input_blocks.1.1.norm.weight": "method/unet/input_blocks/1/1/norm/scale",
  "unet.unet.diffusion_model.out.2.weight": "method/unet/out/2/kernel",
  "text_adapter.fc.2.weight": "method/text_adapter/fc/2/kernel",
  "classifier.conv1_4.weight": "head/conv1_4/kernel",
  "classifier.bn2_3.running_var": "head/bn2_3/var",
  "classifier.bn1_2.weight": "head/bn1_2/scale",
  "classifier.conv1_1.bias": "head/conv1_1/bias",
}


@pytest.fixture(params=["vpd_refer_40", "vpd_refer_77"])
def setup(request):
  return request.param


@pytest.fixture
def order(monkeypatch):
  """The table's names as part of the order of all releases."""
  known = dict(released._RANK)
  for word in released_referring.ORDER.split():
    known.setdefault(word, len(known))
  monkeypatch.setattr(released, "_RANK", known)


def shapes_of(state):
  """Shapes of the model, from the manifest alone."""
  shapes = {}
  for name, value in state.items():
    for rule in released_referring.vpd_refer():
      if isinstance(rule, rules.Rule) and (found := rule.to_target(name, value.ndim)):
        shapes[found[0]] = jax.ShapeDtypeStruct(layout(name, value).shape, np.float32)
  return shapes


def test_a_release_fills_the_model_and_comes_out_bit_for_bit(setup, order):
  state, table = state_dict(setup=setup), released_referring.vpd_refer()
  targets = shapes_of(state)
  assert len(targets) == 839 - 6
  named, report = rules.convert(state, table, targets)
  assert named.keys() == targets.keys() and report.fresh == ()
  for source, target in PAIRS.items():
    np.testing.assert_array_equal(named[target], layout(source, state[source]), err_msg=source)
  exported = rules.export(named, table, released.manifest(targets, table), STEP)
  assert list(exported) == list(state)
  for name, value in state.items():
    back = np.asarray(exported[name])
    assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_the_table_implies_the_authors_manifest(setup, size, order):
  entries, table = oracle.manifest(setup, size), released_referring.vpd_refer()
  phantoms = {entry["name"]: np.broadcast_to(np.float32(0), entry["shape"]) for entry in entries}
  implied = released.manifest(dict(sorted(shapes_of(phantoms).items())), table)
  assert implied == [{key: entry[key] for key in ("name", "shape", "dtype")} for entry in entries]


def test_a_file_without_the_text_encoder_leaves_it_fresh_and_nothing_else(setup):
  state, table = state_dict(setup=setup), released_referring.vpd_refer()
  encoder = {"method/text_encoder/text_model/final_layer_norm/bias": jax.ShapeDtypeStruct((64,), np.float32)}
  outside = released.CLIP
  _, report = rules.convert(state, table, shapes_of(state) | encoder, fresh=outside)
  assert report.fresh == tuple(encoder)
  del state["classifier.conv1_1.bias"]
  with pytest.raises(rules.ConversionError, match="head/conv1_1/bias"):
    rules.convert(state, table, shapes_of(state_dict(setup=setup)), fresh=outside)


def test_its_sign_is_in_no_other_release(setup):
  assert any(name.startswith(released_referring.SIGN) for name in state_dict(setup=setup))
  for other in ("vpd_depth", "meta_depth"):
    assert not any(entry["name"].startswith(released_referring.SIGN) for entry in oracle.manifest(other))
