"""The weights "rooms/small": the small backbone, trained on procedural rooms for depth and segmentation at once.

python scripts/pretrain_rooms.py --workdir=runs/pretrain_rooms                   # trains, then writes the weights
python scripts/pretrain_rooms.py --workdir=runs/pretrain_rooms --output=FILE     # into this file

Every room is seen once, so that the losses of the log are those of unseen rooms. The rooms are those of seed 1; the
configs train and evaluate on those of seed 0. One network serves both tasks: half of each batch attends to the vector
of its scene, as VPD's depth does, the other half to those of all classes, as its segmentation does; the heads are
thrown away. The UNet's last block, which MetaPrompts reads between its passes, learns to repeat the latents.

After an interruption the same command continues, also with more steps: the learning rate is constant, and what is
written is a running mean of the parameters.
"""

import argparse
import concurrent.futures
import json
import time
from typing import cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from vpd_jax import experiment, optim
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.config import loader, presets
from vpd_jax.convert import rules
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.data.datasets import rooms
from vpd_jax.distributed import sharding
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.models import parameters
from vpd_jax.models.context.context import Context
from vpd_jax.models.heads.deconv import Deconv
from vpd_jax.models.heads.fpn import Fpn, SemanticFpn
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup
from vpd_jax.models.methods.image_input import PaddedInput
from vpd_jax.models.necks.unet_features import NoNeck
from vpd_jax.models.perception_model import PerceptionModel
from vpd_jax.monitoring import xla_cost
from vpd_jax.tasks.depth.task import Depth
from vpd_jax.tasks.segmentation.task import Segmentation
from vpd_jax.training import step as step_lib
from vpd_jax.types import Array, Batch, Features, Loss, MapInfo, Outputs, ParamDict, TrainState

SEED = 1  # of the rooms; the configs have those of seed 0
SIZE = (128, 128)
KEYS = frozenset({"image", "depth", "label", "class_id"})
WEIGHTS = {"depth": 3.0, "segmentation": 1.0, "latents": 0.05}  # of the losses
WARMUP = 100  # steps
EMA_DECAY = 0.99  # the running mean of the parameters, which is written, stands for a learning rate that falls
LOG_EVERY, SAVE_EVERY = 20, 100


class EitherPrompt(Context):
  """Even rows attend to the vector of their scene, as often as there are classes; odd rows to those of all classes."""

  needs = frozenset({"class_id"})

  def __init__(self, scenes: np.ndarray, classes: np.ndarray):
    """Vectors [scenes, D] and [K, D]: constants, those that the configs draw for "random:0"."""
    self.tokens, self.dtype = cast(tuple[int, int], classes.shape), jnp.float32
    self._scenes, self._classes = tuple(map(tuple, scenes.tolist())), tuple(map(tuple, classes.tolist()))

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, K, D]."""
    rows, classes = batch["class_id"].shape[0], jnp.asarray(self._classes, jnp.float32)
    shape = (rows, *classes.shape)
    scene = jnp.broadcast_to(jnp.asarray(self._scenes, jnp.float32)[batch["class_id"]][:, None], shape)
    return jnp.where((jnp.arange(rows) % 2 == 0)[:, None, None], scene, jnp.broadcast_to(classes, shape))


class WithLatents(DiffusionMethod):
  """The four maps, and behind them what the last block predicts and the latents that came in."""

  def passes(self, latents: Array, batch: Batch, *, training: bool) -> tuple[tuple[Array, ...], Array]:
    context = self.context(batch)
    out = self.unet(latents, context, predict_noise=True, **self.time(0))
    return (*out.features, cast(Array, out.noise), latents), context


class BothHeads(nnx.Module):
  """VPD's heads of both tasks on the same maps."""

  def __init__(self, maps: MapInfo, common: Common, depth: dict, segmentation: dict, neck: dict):
    self.depth = Deconv(maps, common, **depth)
    self.neck = Fpn(maps, common, **neck)
    self.segmentation = SemanticFpn(self.neck.map_info, common, **segmentation)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    *maps, predicted, latents = features.maps
    features = features._replace(maps=tuple(maps))
    outputs = self.depth(features, training=training)
    outputs |= self.segmentation(self.neck(features, training=training), training=training, key=key)
    return outputs | {"predicted": predicted, "latents": jax.lax.stop_gradient(latents)}


class BothTasks(Depth):
  """The weighted sum of the losses of depth, segmentation and latents."""

  def __init__(self, depth: Depth, segmentation: Segmentation):
    self._depth, self._segmentation = depth, segmentation

  def loss(self, outputs: Outputs, batch: Batch) -> Loss:
    silog, segmentation = self._depth.loss(outputs, batch), self._segmentation.loss(outputs, batch)
    error = jnp.square(outputs["predicted"] - outputs["latents"]).mean() / jnp.square(outputs["latents"]).mean()
    losses = {"depth": silog.value, "segmentation": segmentation.value, "latents": error}
    total = cast(Array, sum(WEIGHTS[name] * value for name, value in losses.items()))
    return Loss(total, jnp.ones(()), losses | {"accuracy": segmentation.logs["decode.acc_seg"]})


def assemble(lr: float) -> experiment.Experiment:
  """The experiment of both tasks, made of the parts of the two configs."""
  config = {task: loader.load(f"configs/rooms.py:{task},small_scratch") for task in ("depth", "segmentation")}
  # Half of the config's, as when the weights of the package were made.
  config["segmentation"] = loader.changed(config["segmentation"], {"neck.width": 32, "head.width": 32})
  exps = {task: experiment.assemble(config[task]) for task in config}
  name = initialize.CLASS_VECTORS
  vectors = {task: initialize.weights(config[task], exps[task])[0][name] for task in exps}
  common = Common(jnp.float32, jnp.float32, InitKeys(0))
  setup = MethodSetup(**experiment.sizes(config["depth"])._asdict(), common=common)
  options = {task: {k: v for k, v in config[task].head.items() if k != "name"} for task in config}
  heads = {task: options[task] | dict(exps[task].task.output) for task in config}
  neck = {k: v for k, v in config["segmentation"].neck.items() if k != "name"}

  def build() -> nnx.Module:
    context = EitherPrompt(vectors["depth"], vectors["segmentation"])
    method = WithLatents(
      setup,
      fit=PaddedInput(64, 0.0),
      context=context,
      time=ConstantTime(1),
      latent_scale=0.0,
      with_out=True,
    )
    return PerceptionModel(
      method, NoNeck(method.map_info, common), BothHeads(method.map_info, common, **heads, neck=neck)
    )

  spec = parameters.describe(build)
  groups = optim.groups(spec.params, ((r"", 1.0),), presets.no_decay_for_vectors())
  rate = lambda step: lr * jnp.minimum((step + 1) / WARMUP, 1.0)
  optimizer = optim.optimizer(rate, groups, decay=0.01, b1=0.9, b2=0.99, epsilon=1e-8, clip_norm=1.0)
  task = BothTasks(cast(Depth, exps["depth"].task), cast(Segmentation, exps["segmentation"].task))
  return experiment.Experiment(spec, task, groups, rate, optimizer, (), tuple(sorted(KEYS)))


def batch(step: int, size: int) -> dict[str, np.ndarray]:
  """The rooms of a step."""
  drawn = rooms.DrawnRooms(SEED, "train", (step + 1) * size, SIZE, KEYS)
  examples = [drawn[step * size + i] for i in range(size)]
  return {name: np.stack([example[name] for example in examples]) for name in sorted(KEYS)}


def train(exp: experiment.Experiment, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Trains from the newest checkpoint on; returns the parameters."""
  mesh = sharding.make_mesh(1, 1)
  settings = {"batch_size": args.batch_size, "lr": args.lr}
  with (
    Checkpoints(args.workdir, keep=2, keep_best=0) as checkpoints,
    concurrent.futures.ThreadPoolExecutor(1) as drawing,
    open(f"{args.workdir}/log.jsonl", "a") as log,
  ):
    fields = initialize.split(exp, exp.spec.initialize(exp.spec.paths))
    params = {name: jnp.asarray(x) for name, x in fields["params"].items()}
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      frozen={name: jnp.asarray(x) for name, x in fields["frozen"].items()},
      stats={name: jnp.asarray(x) for name, x in fields["stats"].items()},
      opt_state=exp.optimizer.init(params),
      ema={name: jnp.copy(x) for name, x in params.items()},
    )
    if (begin := checkpoints.latest_step() or 0) > 0:
      if (before := checkpoints.restore_config(begin)) != settings:
        raise UserError(f"{args.workdir} was made with {before}, not {settings}; give these, or another --workdir.")
      shapes = jax.eval_shape(lambda: state)
      everywhere = sharding.replicated(mesh)
      placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
      state = checkpoints.restore(begin, placed)
    if begin >= args.steps:
      return jax.device_get(cast(ParamDict, state.ema) | state.frozen)
    step_fn = jax.jit(step_lib.make_step(exp, loss_group=0, ema_decay=EMA_DECAY), donate_argnums=0)
    step_fn = step_fn.lower(state, batch(0, args.batch_size)).compile(xla_cost.compiler_options(mesh))
    coming = drawing.submit(batch, begin, args.batch_size)
    held, cpu = [], time.process_time()
    for step in range(begin, args.steps):
      now, coming = coming.result(), drawing.submit(batch, step + 1, args.batch_size)
      state, logs = step_fn(state, now)
      held.append(logs)
      done = step + 1
      if done % LOG_EVERY == 0 or done == args.steps:
        mean = {k: round(float(np.mean([h[k] for h in held])), 4) for k in held[0] if k.startswith(("train", "norm"))}
        line = {"step": done, **mean, "lr": float(exp.rate(step)), "cpu_seconds": round(time.process_time() - cpu, 1)}
        held, cpu = [], time.process_time()
        log.write(json.dumps(line) + "\n")
        log.flush()
        print(line, flush=True)
      if done % SAVE_EVERY == 0 or done == args.steps:
        checkpoints.save(done, state, settings, force=done == args.steps)
    return jax.device_get(cast(ParamDict, state.ema) | state.frozen)


def export(named: dict[str, np.ndarray], path: str) -> None:
  """Writes UNet and VAE in the names of Stable Diffusion's single file, in bfloat16."""
  held = {name: x for name, x in named.items() if name.startswith(("method/unet/", "method/vae/"))}
  source = rules.to_source(held, stable_diffusion.compvis(held))
  write.write(path, {name: x.astype(ml_dtypes.bfloat16) for name, x in source.items()})


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="for checkpoints and the log")
  parser.add_argument("--output", default="", help="a .safetensors file; default: in the workdir")
  parser.add_argument("--steps", type=int, default=1900)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--lr", type=float, default=1e-3)
  args = parser.parse_args()
  output = args.output or f"{args.workdir}/rooms_small.safetensors"
  try:
    if wrong := [
      f"--{name}={getattr(args, name)}" for name in ("steps", "batch_size", "lr") if getattr(args, name) <= 0
    ]:
      raise UserError(f"{', '.join(wrong)} must be above 0.")
    write.check_name(output)
    export(train(assemble(args.lr), args), output)
  except UserError as error:
    raise SystemExit(f"pretrain_rooms: {one_line(error)}") from error
  print(f"wrote {output}")


if __name__ == "__main__":
  main()
