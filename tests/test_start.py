"""Where the arrays of a run come from."""

import numpy as np
import pytest

from tests import oracle, test_class_vectors
from vpd_jax import assemble, config_file, start
from vpd_jax.convert import write


def config_of(source, **changes):
  config = config_file.load("configs/nyu_depth.py:tiny").unlock()
  config.init.pretrained = str(source)
  config.update_from_flattened_dict(changes)
  return start.complete(config.lock(), config.init.pretrained)


@pytest.fixture(scope="module")
def compvis(tmp_path_factory):
  """A Stable Diffusion file of the tiny sizes, the VAE's decoder and the schedule's buffers among its tensors."""
  path = tmp_path_factory.mktemp("sd") / "tiny.safetensors"
  state = oracle.weights("sd_unet_hier") | oracle.weights("sd_vae_encoder")
  write.write(path, state | {"betas": np.zeros(1000, np.float32), "model_ema.decay": np.ones((), np.float32)})
  return path


def test_a_stable_diffusion_file_fills_unet_and_vae_and_leaves_the_rest_fresh(compvis):
  config = config_of(compvis)
  product = assemble.assemble(config)
  named, lines = start.weights(config, product)
  source = oracle.weights("sd_unet_hier")["model.diffusion_model.input_blocks.0.0.weight"]
  np.testing.assert_array_equal(named["method/unet/input_blocks/0/0/kernel"], source.transpose(2, 3, 1, 0))
  assert named.keys() == product.parts.shapes.keys()
  assert any("class vectors: random numbers of seed 0" in line for line in lines)
  (fresh,) = (line for line in lines if line.startswith("fresh"))
  assert "head/last_layer_depth" in fresh and "unet" not in fresh and "vae" not in fresh
  np.testing.assert_array_equal(named["method/gamma"], np.full(64, 1e-4, np.float32))


def test_a_file_without_tokenizer_needs_class_vectors(compvis):
  config = config_of(compvis, **{"method.class_vectors": ""})
  with pytest.raises(ValueError, match="brings no tokenizer") as caught:
    start.weights(config, assemble.assemble(config))
  assert "\n" not in str(caught.value)


def test_fresh_arrays_follow_the_seed(compvis):
  first, second, third = (
    start.weights(config, assemble.assemble(config))[0]["head/last_layer_depth/0/kernel"]
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
  test_class_vectors.write_diffusers(tmp_path)
  config = config_of(tmp_path, **{"method.class_vectors": ""})
  assert config.backbone.unet.channel_mult == (1, 1, 2, 2) and config.backbone.unet.context_dim == 16
  product = assemble.assemble(config)
  named, lines = start.weights(config, product)
  assert named.keys() == product.parts.shapes.keys()
  assert any("27 x 16 from the names" in line for line in lines)
  assert named["method/class_vectors"].shape == (27, 16) and np.ptp(named["method/class_vectors"], axis=0).min() > 0
