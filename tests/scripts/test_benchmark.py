"""scripts/benchmark.py: what it counts and prints; and that the PyTorch side does the same work."""

import json
import types

import jax
import numpy as np
import pytest

from tests.helpers import planned_rooms, tiny
from tests.helpers.loaded_scripts import load
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.training import compilation

QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def benchmark():
  """The script, with flags to time two steps of synthetic batches."""
  module = load("scripts/benchmark.py")
  module.FLAGS(["benchmark", "--steps=2", "--warm_up=1", "--synthetic"])
  return module


def config_of(**changes):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:vpd,tiny")).unlock()
  config.update_from_flattened_dict(changes)
  return config.lock()


def model_flops(benchmark, config):
  return compilation.model_flops(config, benchmark.step_shapes(config, experiment.assemble(config)))


def test_rates_follow_from_the_times(benchmark):
  result = {"step_times_ms": [10.0, 20.0, 30.0], "device": "TPU v5 lite", "devices": 2}
  result = benchmark.with_rates(result, batch=8, flops=4e12)
  assert result["step_ms"] == 20 and result["step_ms_p95"] == pytest.approx(29)
  assert result["images_per_sec_per_chip"] == pytest.approx(8 / 2 / 0.02)
  assert result["model_tflops_per_sec_per_chip"] == pytest.approx(100)
  assert result["share_of_peak"] == pytest.approx(100 / 197) and result["model_tflop_per_image"] == 0.5


def test_times_are_those_of_the_steps_after_the_warm_up(benchmark, monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock) ** 2)
  assert benchmark.timed(lambda batch: batch, iter(lambda: 0, None), 3, 2) == [3000.0, 5000.0, 7000.0]


@pytest.mark.slow
def test_the_work_of_a_step_does_not_depend_on_how_it_is_done(benchmark):
  plain = model_flops(benchmark, config_of())
  other = {"backbone.remat": True, "backbone.attention": "chunked", "dtype": "bfloat16", "optim.accumulation": 2}
  assert model_flops(benchmark, config_of(**other)) == plain
  assert model_flops(benchmark, config_of(**{"data.batch_size": 12})) == pytest.approx(2 * plain, rel=1e-3)


@pytest.mark.slow
def test_our_side_runs_and_is_told(benchmark, capsys):
  # The program of planning/test_plan.py, which need not be compiled twice.
  result = benchmark.with_rates(benchmark.ours(planned_rooms.config_of()), 6, 1e9)
  assert len(result["step_times_ms"]) == 2 and np.isfinite(result["losses"]).all()
  assert result["losses"][0] != result["losses"][-1]  # it learns
  text = benchmark.report(json.loads(json.dumps(result)))
  assert "ms median" in text and "peak not known" in text and "batch 6" in text


@pytest.mark.reference
class TestTorchSide:
  """The same weights give the same depth, loss and count of operations."""

  @pytest.fixture(scope="class")
  def sides(self):
    import torch

    from vpd_jax.convert import rules

    torch.manual_seed(0)
    side = load("benchmarks/torch_depth.py")
    config = config_of()
    model = side.VpdDepth(config.to_dict()).eval()
    with torch.no_grad():
      for name, p in model.named_parameters():
        if "decoder" in name and p.ndim > 1:
          p.mul_(3)  # signals that are seen in the depth
    return side, config, model, experiment.assemble(config), rules

  def named(self, sides):
    """The PyTorch weights by our names."""
    from vpd_jax.convert.tables import released, stable_diffusion

    _, _, model, exp, rules = sides
    source, ours = {}, {}
    for name, value in model.state_dict().items():
      part = name.removeprefix("encoder.")
      (ours if part.startswith(("unet.", "vae.")) else source)[part if part.startswith(("unet.", "vae.")) else name] = (
        value.numpy()
      )
    shapes = exp.spec.shapes
    backbone = {n: s for n, s in shapes.items() if n.startswith(("method/unet/", "method/vae/"))}
    first, _ = rules.convert(ours, stable_diffusion.diffusers(ours, backbone), backbone)
    rest = {n: s for n, s in shapes.items() if n not in backbone}
    table = [r for r in released.vpd_depth() if not getattr(r, "target", "").startswith(("method/unet", "method/vae"))]
    second, _ = rules.convert(
      source,
      [r for r in table if "class_embeddings" not in getattr(r, "source", "")]
      + [rules.Rule("encoder.class_embeddings", "method/class_vectors", (rules.plain,))],
      rest,
    )
    return first | second

  def test_depth_and_loss_are_ours(self, sides):
    import torch

    side, config, model, exp, _ = sides
    batch = side.synthetic_batch(3, tuple(config.data.crop), torch.device("cpu"))
    with torch.no_grad():
      theirs = model(batch["image"], batch["class_id"])
    inputs = {"image": batch["image"].permute(0, 2, 3, 1).numpy(), "class_id": batch["class_id"].numpy()}
    ours = jax.jit(lambda named, batch: exp.spec.merge(named)(batch, training=False)["depth"])
    ours = np.asarray(ours.lower(self.named(sides), inputs).compile(QUICK)(self.named(sides), inputs))
    assert theirs.std() > 1e-3
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4 * ours.max())
    from vpd_jax.tasks.depth.task import silog

    expected = silog(ours, batch["depth"].numpy())[0]
    np.testing.assert_allclose(side.silog(torch.tensor(ours), batch["depth"], 3), expected, rtol=1e-5)

  def test_it_trains_as_many_parameters_and_counts_as_many_operations(self, sides, benchmark):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side, config, model, exp, _ = sides
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(np.prod(exp.spec.shapes[name].shape, dtype=int) for name in exp.groups.lr)
    batch = side.synthetic_batch(6, tuple(config.data.crop), torch.device("cpu"))
    model.train()
    with FlopCounterMode(display=False) as counter:
      side.silog(model(batch["image"], batch["class_id"]), batch["depth"], 3).backward()
    assert counter.get_total_flops() == pytest.approx(model_flops(benchmark, config), rel=0.01)

  def test_it_measures_steps(self, sides, tmp_path):
    side, config, *_ = sides
    settings = {"config": config.to_dict(), "batch": 3, "steps": 1, "warm_up": 1, "forward": True, "compile": "off"}
    result = side.measure(json.loads(json.dumps(settings)))
    assert len(result["step_times_ms"]) == 1 and np.isfinite(result["losses"]).all() and result["forward_ms"] > 0


def test_a_step_of_referring_is_given_latents_and_text_states(benchmark):
  config = tiny.shrunk(loader.load("configs/refcoco_refer.py:refcoco,tiny"))
  exp = experiment.assemble(config)
  batch = benchmark.synthetic_batch(config, exp, sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
  rows = config.data.batch_size
  assert batch["latents"].shape[0] == batch["text_states"].shape[0] == rows and "tokens" not in batch
  assert abs(np.asarray(batch["latents"]).std() - 1) < 0.1


def test_a_step_of_segmentation_is_given_the_size_of_the_images(benchmark, monkeypatch):
  config = loader.load("configs/ade20k_seg.py:vpd,tiny")
  exp = types.SimpleNamespace(keys=("image", "label"))
  monkeypatch.setattr(benchmark.encoder_cache, "encoded_batch_shapes", lambda config, exp, shapes: (shapes, ()))
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  batch = benchmark.synthetic_batch(config, exp, mesh)
  assert batch.keys() == {"image", "label", "valid_size"}
  assert np.asarray(batch["valid_size"]).tolist() == [list(config.data.crop)] * config.data.batch_size


def test_the_sizes_of_the_weights_are_those_of_the_network(monkeypatch):
  script = load("scripts/benchmark.py")
  words = ["--config=configs/nyu_depth.py:vpd,tiny", "--synthetic", "--config.init.pretrained=FOLDER"]
  monkeypatch.setattr(script.sys, "argv", ["benchmark", *words])
  sizes = lambda config, source: loader.changed(config, {"backbone.unet.layers_per_block": 7, "init.clip": source})

  def ours(config):
    raise ZeroDivisionError(config.backbone.unet.layers_per_block, config.init.clip)

  monkeypatch.setattr(script.initialize, "with_backbone_sizes", sizes)
  monkeypatch.setattr(script, "ours", ours)
  with pytest.raises(ZeroDivisionError, match=r"\(7, 'FOLDER'\)"):
    script.main()


def test_a_batch_that_groups_cut_is_refused_in_one_line(monkeypatch, capsys):
  script = load("scripts/benchmark.py")
  words = ["--config=configs/nyu_depth.py:vpd,tiny", "--synthetic", "--batch=4"]
  monkeypatch.setattr(script.sys, "argv", ["benchmark", *words])
  with pytest.raises(SystemExit) as ended:
    script.main()
  error = capsys.readouterr().err
  assert ended.value.code == 2 and error.count("\n") == 1
  assert "a batch of 4 is not cut by config.optim.loss_group=3, config.optim.norm_group=3" in error


@pytest.mark.parametrize(
  "words, told",
  [
    (["a"], "unexpected positional"),
    ([], "give a --config"),
    (["--steps=x"], "steps"),
    (["--config=configs/nyu_depth.py:tiny", "--torch_compile=on"], "--torch_compile has no effect without --versus"),
  ],
)
def test_a_wrong_command_is_one_line(words, told, capsys):
  with pytest.raises(SystemExit) as ended:
    load("scripts/benchmark.py").parse(["benchmark", *words])
  error = capsys.readouterr().err
  assert ended.value.code == 2 and told in error and error.count("\n") == 1


def test_the_other_side_is_written_for_one_network_only():
  pytest.importorskip("diffusers")
  side = load("benchmarks/torch_depth.py")
  with pytest.raises(ValueError, match="written for VPD depth only"):
    side.measure({"config": loader.load("configs/nyu_depth.py:iedp,tiny").to_dict()})
