"""The authors' three tiny segmentation networks: configs, weights, inputs, and names of what they compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import fill, oracle, tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers, unet
from vpd_jax.models.heads import conv_module, fpn
from vpd_jax.models.necks import unet_features
from vpd_jax.types import Features

CONFIGS = {
  "vpd_seg": "configs/ade20k_seg.py:vpd",
  "meta_seg_ade": "configs/ade20k_seg.py:meta_prompts",
  "meta_seg_cityscapes": "configs/cityscapes_seg.py:meta_prompts",
}
CLASSES = {"vpd_seg": 150, "meta_seg_ade": 150, "meta_seg_cityscapes": 19}
LAST_BLOCK = {"vpd_seg": "unet.unet.diffusion_model.out.", "meta_seg_ade": "cross_unet_conv2."}


def config(setup, **changes):
  """As the oracle ran it: batch 2, statistics and loss over both images, no dropout, 3 of 10 steps to warm up."""
  made = loader.load(CONFIGS[setup] + ",tiny").unlock()
  made.data.batch_size = 2
  made.optim.norm_group = made.optim.loss_group = 0
  made.head.dropout = 0.0
  made.optim.schedule.update(num_steps=10, warmup=3)
  made.update_from_flattened_dict(changes)
  return made.lock()


def table(setup):
  return released.TABLES["vpd_segmentation" if setup == "vpd_seg" else "meta_prompts_segmentation"]()


def named_as_by_the_authors(setup, named):
  """Our arrays by the first of the names under which the authors' model has them."""
  back, block = rules.to_source(named, table(setup)), LAST_BLOCK.get(setup, LAST_BLOCK["meta_seg_ade"])
  return {name.replace(LAST_BLOCK["vpd_seg"], block): value for name, value in back.items()}


def state_of(setup, exp, dtype=np.float32, seed=0):
  """The authors' rebuilt weights under our names, before the first step."""
  named, _ = rules.convert(oracle.weights(setup, seed=seed), table(setup), exp.spec.shapes)
  return tiny.train_state(exp, {name: np.asarray(x, dtype) for name, x in named.items()})


def picture(name, shape, seed=0):
  """Made-up images [B, 3, H, W] of the oracle, in [-1, 1], as ours: float64 [B, H, W, 3] in [0, 1]."""
  image = fill.uniform(name, tuple(int(side) for side in shape), seed, -1, 1).astype(np.float64)
  return (image.transpose(0, 2, 3, 1) + 1) / 2


def batch_of(setup, dtype=np.float32, seed=0):
  size = (2, 1, 128, 128)
  label = fill.integers("input/label", (2, 1, 16, 16), CLASSES[setup], seed).repeat(8, axis=2).repeat(8, axis=3)
  fine = fill.integers("input/label_fine", size, CLASSES[setup], seed)
  label = np.where(fill.uniform("input/label_mix", size, seed) < 0.3, fine, label)
  label = np.where(fill.uniform("input/label_valid", size, seed) < 0.1, 255, label)
  image = picture("input/image", (2, 3, 128, 128), seed)
  return {"image": jnp.asarray(image, dtype), "label": jnp.asarray(label[:, 0], jnp.int32)}


def everything(state):
  return state.params, state.frozen, state.stats


def check_logs(logs, arrays, batch):
  """Losses and accuracies of a step in training against those stored, which are of float32."""
  expected = {key.removeprefix("train/log/"): x for key, x in arrays.items() if key.startswith("train/log/")}
  assert logs.keys() == expected.keys()
  pixel = 100 / int((batch["label"] != 255).sum())
  for name, value in logs.items():
    # In percent; one pixel may have two classes that only rounding tells apart.
    limit = 1.01 * pixel if "acc" in name else 2e-5
    np.testing.assert_allclose(value, expected[name], rtol=0, atol=limit, err_msg=name)


@functools.cache
def assembled(setup, **changes):
  return experiment.assemble(config(setup, **changes))


class Tapped:
  """Results of a network's parts by the authors' names; "#1" and "#2" mark the second and third time."""

  def __init__(self, model):
    self.taps, self._calls, self._blocks = {}, {}, 0
    self._down = len(model.method.unet.input_blocks)
    self._watched = {id(part): name for name, part in self.parts(model)}

  @staticmethod
  def parts(model):
    """(name, module) of what the oracle has taps of; a list is tapped at its end."""
    method, neck, head = model.method, model.neck, model.head
    yield "vae.quant_conv", method.vae.quant_conv
    if isinstance(neck, unet_features.Fusion):
      return
    if isinstance(neck, fpn.Fpn):
      for name in ("lateral_convs", "fpn_convs"):
        yield from ((f"neck.{name}.{i}", conv) for i, conv in enumerate(getattr(neck, name)))
      yield from ((f"decode_head.scale_heads.{i}", steps[-1]) for i, steps in enumerate(head.decode_head.scale_heads))
    else:
      yield "cross_unet_conv2", method.unet.out[-1]
      yield from ((f"upconv{i}.relu", getattr(neck, f"upconv{i}")[-1]) for i in range(1, 5))
      decode = head.decode_head
      yield from ((f"decode_head.psp_modules.{i}", steps[-1]) for i, steps in enumerate(decode.psp_modules))
      for name in ("lateral_convs", "fpn_convs"):
        yield from ((f"decode_head.{name}.{i}", conv) for i, conv in enumerate(getattr(decode, name)))
      yield from ((f"decode_head.{name}", getattr(decode, name)) for name in ("bottleneck", "fpn_bottleneck"))
      yield "auxiliary_head.conv_seg", head.auxiliary_head.conv_seg
    yield "decode_head.conv_seg", head.decode_head.conv_seg

  def record(self, name, value):
    count = self._calls[name] = self._calls.get(name, -1) + 1
    self.taps[f"{name}#{count}" if count else name] = value

  def __enter__(self):
    self._patch = pytest.MonkeyPatch()
    for owner in (nnx.Conv, layers.ReLU, conv_module.ConvModule, fpn.BiasedConv, fpn.Doubling):
      self._watch(owner)
    original = unet.UNet._run

    def run(*args):
      result = original(*args)
      i = self._blocks % (2 * self._down + 1)
      self._blocks += 1
      down, up = f"input_blocks.{i}", f"output_blocks.{i - self._down - 1}"
      self.record(f"unet.{down if i < self._down else 'middle_block' if i == self._down else up}", result[0])
      return result

    self._patch.setattr(unet.UNet, "_run", run)
    return self

  def _watch(self, owner):
    original = owner.__call__

    def call(module, *args, **options):
      result = original(module, *args, **options)
      if id(module) in self._watched:
        self.record(self._watched[id(module)], result)
      return result

    self._patch.setattr(owner, "__call__", call)

  def __exit__(self, *error):
    self._patch.undo()


class Forward:
  """The network in evaluation mode, in two programs: method and neck of `features_of`, and the head of `setup`.

  MetaPrompts' method and neck are the same for ADE20K and Cityscapes, and so is their program.
  """

  def __init__(self, setup, features_of):
    self.experiment, self.state = assembled(setup), state_of(setup, assembled(setup))
    self._features, self._head, self._shared = _features(features_of), _head(setup), everything(self.state)
    if features_of == setup:
      return
    self._shared = everything(forward(features_of).state)
    mine = {n: x for part in everything(self.state) for n, x in part.items() if not n.startswith("head/")}
    theirs = {n: x for part in self._shared for n, x in part.items() if not n.startswith("head/")}
    assert mine.keys() == theirs.keys() and all((np.asarray(mine[n]) == theirs[n]).all() for n in mine)
    made = config(setup)
    assert (made.method, made.neck) == (config(features_of).method, config(features_of).neck)

  def __call__(self, image):
    """(taps, maps as `extract_feat` returns them, outputs)."""
    taps, features = self._features(self._shared, image)
    size = tuple(image.shape[1:3])
    more, maps, outputs = self._head(everything(self.state), features["maps"], features["context"], size)
    return taps | more, features["extracted"] or maps, outputs

  def trained(self, batch):
    """(loss, logs, running statistics) of the head in training mode; the method and its neck have none."""
    _, features = self._features(self._shared, batch["image"])

    @jax.jit
    def run(named, maps, context, batch):
      model = self.experiment.spec.merge(*named)
      outputs = model.head(Features(maps, context, batch["image"].shape[1:3]), training=True)
      loss = self.experiment.task.loss(outputs, batch)
      return loss.value, loss.logs, parameters.stats(model)

    return run(everything(self.state), features["maps"], features["context"], batch)

  def logits(self, weights, batch):
    """As what evaluate.make_scores makes; `weights` are those given at first."""
    del weights
    return self(batch["image"])[2]["logits"]


@functools.cache
def forward(setup):
  """The Forward of a setup, made once."""
  return Forward(setup, "vpd_seg" if setup == "vpd_seg" else "meta_seg_ade")


@functools.cache
def _features(setup):
  made = assembled(setup)
  neck_is_of_the_method = setup != "vpd_seg"  # as the authors divide them

  @jax.jit
  def run(named, image):
    model = made.spec.merge(*named)
    with Tapped(model) as tapped:
      features = model.method({"image": image}, training=False)
      if not neck_is_of_the_method:
        tapped.record("text_adapter", features.context)
      extracted = None if neck_is_of_the_method else features.maps
      features = model.neck(features, training=False)
    return tapped.taps, {"maps": features.maps, "context": features.context, "extracted": extracted}

  return run


@functools.cache
def _head(setup):
  made = assembled(setup)

  @functools.partial(jax.jit, static_argnums=3)
  def run(named, maps, context, size):
    model = made.spec.merge(*named)
    with Tapped(model) as tapped:
      outputs = model.head(Features(maps, context, size), training=False)
    return tapped.taps, maps, outputs

  return run
