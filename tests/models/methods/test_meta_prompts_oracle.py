"""MetaPrompts depth against the authors' code: outputs and taps of every refinement step; groups of the optimizer.

Gradients, statistics and steps are compared in float64, in test_meta_prompts_float64.py.
"""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers.meta_prompts import batch_of, config, everything, state_of
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.backbones import layers, unet
from vpd_jax.models.context import adapters
from vpd_jax.tasks.depth.task import silog

# The authors' own distance between float32 and float64 is 1.7e-5 of the largest value: errors grow from pass to pass.
LIMIT = 5e-5


def tapped(exp, named, batch):
  """(results of the parts by the authors' names, depth); "#1" and "#2" mark the second and third pass.

  Their adapters see the prompts once per image.
  """
  taps, calls = {}, {"block": 0, "adapter": 0, "noise": 0}
  with pytest.MonkeyPatch.context() as patch:

    def watch(owner, name, record):
      original = getattr(owner, name)
      patch.setattr(owner, name, lambda *args, **options: record(args, original(*args, **options)))

    model = exp.spec.merge(*named)
    down, count = len(model.method.unet.input_blocks), 1 + 2 * len(model.method.unet.input_blocks)

    def block(args, result):
      step, i = divmod(calls["block"], count)
      name = f"input_blocks.{i}" if i < down else "middle_block" if i == down else f"output_blocks.{i - down - 1}"
      taps[f"unet.{name}" + (f"#{step}" if step else "")] = result[0]
      calls["block"] += 1
      return result

    def adapter(args, result):
      calls["adapter"] += 1
      taps[f"text_adapter{calls['adapter']}"] = jnp.stack([result, result])
      return result

    def chain(args, result):
      for part in ("deconv_layers", "conv_layers", "last_layer_depth"):
        if args[0] is getattr(model.head, part):
          taps[f"decoder.{part}".replace("decoder.last", "last")] = result
      for part in ("layer1", "out_layer"):
        if args[0] is getattr(model.neck, part):
          taps[part] = result
      if args[0] is model.method.unet.out:
        taps["cross_unet_conv2" + ("#1" if calls["noise"] else "")] = result
        calls["noise"] += 1
      return result

    def raised(args, result):
      (name,) = (name for name in ("layer2", "layer3", "layer4") if getattr(model.neck, name) is args[0])
      taps[name] = result
      return result

    watch(unet.UNet, "_run", block)
    watch(adapters.TextAdapter, "__call__", adapter)
    watch(layers, "chain", chain)
    watch(type(model.neck.layer2), "__call__", raised)
    watch(type(model.neck), "products", lambda args, result: taps.setdefault("encoder", result))
    depth = model(batch, training=False)["depth"]
  return taps, depth


@pytest.fixture(scope="module", params=["nyu", pytest.param("kitti", marks=pytest.mark.slow)])
def case(request):
  """(data, the authors' arrays, our taps, our depth)."""
  exp = experiment.assemble(config(request.param))
  run = jax.jit(lambda named, batch: tapped(exp, named, batch))
  taps, depth = run(everything(state_of(exp)), batch_of(request.param))
  return request.param, oracle.golden(f"meta_depth_{request.param}.tiny.npz"), taps, depth


def test_taps_of_every_refinement_step_are_the_authors(case):
  _, arrays, taps, _ = case
  for name, value in taps.items():
    oracle.compare(value if value.ndim == 3 else oracle.nchw(value), arrays, f"tap/{name}", LIMIT)
  held = {key.split("@")[0].removeprefix("tap/") for key in arrays if key.startswith("tap/")}
  assert held == taps.keys()
  assert sum(name.startswith("unet.") for name in taps) == 3 * 25


def test_depth_is_the_authors(case):
  data, arrays, _, depth = case
  oracle.compare(depth[:, None], arrays, "output/pred_d", LIMIT)
  loss, _ = silog(depth, batch_of(data)["depth"])
  np.testing.assert_allclose(loss, arrays["output/eval_loss"], atol=2e-5)


@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_every_parameter_of_the_full_network_is_in_the_authors_group(data):
  with gzip.open(oracle.GOLDEN / "optimizer_groups.meta_depth.json.gz", "rt") as f:
    authors = json.load(f)[f"meta_depth_{data}"]
  made = config(data, tiny_network=False)
  exp = experiment.assemble(made)
  assert authors["base_lr"] == made.optim.lr and authors["trainable_but_in_no_group"] == []
  expected = {}
  for key, group in authors["groups"].items():
    fields = dict(field.split("=") for field in key.split())
    assert fields["trainable"] == "True" and group["count"] == len(group["names"])
    expected |= {name: (float(fields["lr_mult"]), float(fields["weight_decay"])) for name in group["names"]}
  groups, table = exp.groups, released.meta_prompts_depth()
  phantom = lambda name: np.broadcast_to(np.float32(0), exp.spec.shapes[name].shape)
  source = lambda name: next(iter(rules.to_source({name: phantom(name)}, table)))
  assert {source(n): (x, made.optim.decay * groups.decay[n]) for n, x in groups.lr.items()} == expected
  assert len(expected) == 29 + 44 + 402 + 280
  # The rest is the VAE and the statistics.
  others = {source(name) for name in exp.spec.shapes.keys() - groups.lr.keys()}
  kinds = {e["name"]: e["kind"] for e in oracle.manifest("meta_depth", "full") if not e.get("alias_of")}
  assert others == {n for n, kind in kinds.items() if kind != "param" and not n.endswith("num_batches_tracked")}
