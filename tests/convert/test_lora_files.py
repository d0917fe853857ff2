"""LoRA files: written and merged, in the three ways of naming; read by diffusers' own loader."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import tiny
from tests.helpers.buckets import bucket
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.convert import load, lora_files
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.models import lora

__all__ = ["bucket"]  # a fixture

RANK, ALPHA = 3, 2.0
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SIZES = loader.load("configs/nyu_depth.py:tiny").backbone.unet


def kernels(named):
  return [name for name, x in named.items() if name.startswith(lora.UNET) and x.ndim > 1]


def adapted(named):
  """The arrays, and A and B for every kernel of the UNet."""
  rng = np.random.default_rng(0)
  pairs = {}
  for name in kernels(named):
    *rest, out = named[name].shape
    pairs[f"{lora.PREFIX}{name}/a"] = rng.standard_normal((int(np.prod(rest)), RANK), np.float32) / 8
    pairs[f"{lora.PREFIX}{name}/b"] = rng.standard_normal((RANK, out), np.float32) / 8
  return named | pairs


@pytest.fixture(scope="module")
def named():
  return adapted(tiny.depth_weights())


@pytest.fixture(scope="module")
def file(named, tmp_path_factory):
  path = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
  write.write(path, lora_files.state_dict(named, ALPHA, SIZES))
  return path


def base(named):
  return {name: x for name, x in named.items() if not name.startswith(lora.PREFIX)}


def assert_merged(found, named, alpha=ALPHA):
  expected = lora.merged(named, alpha)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6, err_msg=name)


def test_what_is_written_is_read_again_for_every_kernel(named, file):
  assert load_file(file)[f"{QUERY}.lora_A.weight"].shape == (RANK, SIZES.model_channels)
  found, line = lora_files.merged(base(named), file, SIZES)
  assert_merged(found, named)
  assert line == f"LoRA: {file}: merged into {len(kernels(named))} kernels of the UNet"


def renamed(state, kind):
  """The tensors of a file under other names, and an alpha of each module."""
  result = {}
  for name, x in state.items():
    module, part = name.removeprefix("unet.").removesuffix(".weight").rsplit(".lora_", 1)
    end = "down" if part == "A" else "up"
    if kind == "kohya":
      result[f"lora_unet_{module.replace('.', '_')}.lora_{end}.weight"] = x
      result[f"lora_unet_{module.replace('.', '_')}.alpha"] = np.array(ALPHA * RANK, np.float32)
    elif ".attn" in module:
      path, _, last = module.removesuffix(".0").rpartition(".")
      result[f"unet.{path}.processor.{last}_lora.{end}.weight"] = x
    else:
      result[f"unet.{module}.lora.{end}.weight"] = x
  return result


@pytest.mark.parametrize("kind, alpha", [("kohya", ALPHA * ALPHA), ("older", ALPHA)])
def test_other_names_and_alphas_are_read(named, file, tmp_path, kind, alpha):
  text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.ones((2, 2), np.float32)}
  save_file(renamed(load_file(file), kind) | text, tmp_path / "other.safetensors")
  found, line = lora_files.merged(base(named), tmp_path / "other.safetensors", SIZES)
  assert_merged(found, named, alpha)
  assert line.endswith("kernels of the UNet, 1 tensors of the text encoder left out")


def test_alphas_in_the_metadata_of_peft_are_read(named, file, tmp_path):
  told = {"unet.lora_alpha": RANK / 2, "unet.alpha_pattern": {QUERY.removeprefix("unet."): float(RANK)}}
  save_file(load_file(file), tmp_path / "peft.safetensors", {lora_files.METADATA: json.dumps(told)})
  found, _ = lora_files.merged(base(named), tmp_path / "peft.safetensors", SIZES)
  half, whole = lora.merged(named, ALPHA / 2), lora.merged(named, ALPHA)
  one = next(n for n in kernels(named) if n.endswith("input_blocks/1/1/transformer_blocks/0/attn1/to_q/kernel"))
  for name in kernels(named):
    np.testing.assert_allclose(found[name], (whole if name == one else half)[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_file_is_found_as_weights_are(named, file, bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(file.parent))
  for source in (f"~/{file.name}", f"gs://bucket/{file.name}"):
    bucket[0].mkdir(exist_ok=True)
    shutil.copy(file, bucket[0])
    found, line = lora_files.merged(base(named), source, SIZES)
    assert_merged(found, named)
    assert line.startswith(f"LoRA: {source}: merged into")
  with pytest.raises(ValueError, match=r"^LoRA ~ is a folder; give its file, from the hub as hf://ORG/NAME/FILE\."):
    lora_files.merged(base(named), "~", SIZES)


@pytest.mark.parametrize(
  "change, message",
  [
    ({f"{QUERY}.lora_B.weight": None}, r"1 of \d+ tensors are no LoRA of this UNet, like \['down.*without its other"),
    ({"unet.mid_block.attn9.lora_A.weight": np.ones((1, 1), np.float32)}, r"like \['unet\.mid_block\.attn9"),
    ({f"{QUERY}.lora_A.weight": np.ones((RANK, 5), np.float32)}, r"to_q changes \[5, \d+\], method/unet/.* is \["),
  ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(named, file, tmp_path, change, message):
  state = {name: x for name, x in (load_file(file) | change).items() if x is not None}
  save_file(state, tmp_path / "bad.safetensors")
  with pytest.raises(ValueError, match=message) as told:
    lora_files.merged(base(named), tmp_path / "bad.safetensors", SIZES)
  assert "\n" not in str(told.value)


def test_there_must_be_a_unet_to_merge_into(file):
  with pytest.raises(ValueError, match=r"^LoRA .* is merged into weights of a UNet, .*config\.init\.pretrained or"):
    lora_files.merged({}, file, SIZES)


def test_a_run_without_lora_has_none_to_write(named):
  with pytest.raises(ValueError, match="was trained without LoRA, so there is none to write"):
    lora_files.state_dict(base(named), ALPHA, SIZES)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linear", [False, True])
def test_diffusers_own_loader_reads_what_is_written(tmp_path, linear):
  import torch
  from diffusers import StableDiffusionPipeline, UNet2DConditionModel

  torch.manual_seed(0)
  options = {"layers_per_block": 1, "attention_head_dim": 8, "use_linear_projection": linear, "cross_attention_dim": 32}
  net = UNet2DConditionModel(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 64),
    **options,
  )
  sizes = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (0,)}
  named = ours(net, sizes)
  both = adapted(named)
  write.write(tmp_path / "pytorch_lora_weights.safetensors", lora_files.state_dict(both, ALPHA, sizes))
  state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
  net.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
  net.fuse_lora()
  net.unload_lora()
  found = ours(net, sizes)
  for name, x in lora.merged(both, ALPHA).items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.abs(found[name] - named[name]).max() > 1e-3 or named[name].ndim == 1, name


def ours(net, sizes):
  """The UNet of diffusers in our names."""
  table, named = stable_diffusion.unet_of(sizes), {}
  for name, x in net.state_dict().items():
    ((target, leaf),) = [match for rule in table if (match := rule.to_target(f"unet.{name}", x.ndim))]
    named[target] = leaf.forward(x.detach().numpy().copy())
  return named


def test_a_run_can_start_from_a_file(file, tmp_path, monkeypatch):
  config = loader.changed(tiny.depth_config(), {"init.lora": str(file), "init.pretrained": "released"})
  shapes = tiny.depth_shapes()
  held = tiny.depth_weights()
  report = load.Report("made up", {}, {}, ())
  monkeypatch.setattr(load, "load_pretrained", lambda source, shapes, **options: (dict(held), report))

  class Exp:
    """As far as `weights` asks."""

    class spec:
      initialize = staticmethod(lambda names: {})

    classes = ()

  Exp.spec.shapes = Exp.spec.paths = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}
  for source in ("", "given by the user"):
    named, lines = initialize.weights(config, Exp, source)
    assert any(line.startswith("LoRA: ") for line in lines)
    assert_merged(named, adapted(held))


def test_rank_stabilized_changes_are_scaled_by_the_root_of_the_rank(named, file, tmp_path):
  told = {"unet.lora_alpha": RANK, "unet.use_rslora": True}
  save_file(load_file(file), tmp_path / "peft.safetensors", {lora_files.METADATA: json.dumps(told)})
  found, _ = lora_files.merged(base(named), tmp_path / "peft.safetensors", SIZES)
  assert_merged(found, named, ALPHA * np.sqrt(RANK))


def test_a_pattern_of_alphas_means_whole_names():
  """As in peft, "proj" does not match "time_emb_proj"."""
  stated = lora_files._StatedOptions({"proj": 7.0, "attn1.to_q": 3.0}, None, False)
  names = ("time_emb_proj", "net.0.proj", "proj", "blocks.0.attn1.to_q", "attn1.to_q", "attn11.to_q", "to_q")
  assert [stated.alpha(name, 4) for name in names] == [4, 7.0, 7.0, 3.0, 3.0, 4, 4]


def test_a_file_with_nan_is_refused(named, file, tmp_path):
  state = load_file(file)
  state[f"{QUERY}.lora_A.weight"][0] = np.nan
  save_file(state, tmp_path / "nan.safetensors")
  with pytest.raises(ValueError, match=r"LoRA .*nan\.safetensors.* 1 arrays hold NaN or infinity: .*to_q/kernel"):
    lora_files.merged(base(named), tmp_path / "nan.safetensors", SIZES)
