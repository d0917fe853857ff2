"""--mode=export: writes a trained network as a folder that runs without this package.

network.jax_export contains the program for all of PLATFORMS, weights.safetensors the weights, and network.json
describes inputs and outputs; load.py runs it.
"""

import importlib.metadata
import importlib.util
import platform as python_platform
from pathlib import Path

import jax
import jax.export
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from vpd_jax.errors import UserError, one_line
from vpd_jax.files import atomic, paths
from vpd_jax.models.backbones.platform import any_platform
from vpd_jax.monitoring import progress
from vpd_jax.prediction.predictor import Predictor, trained_weights
from vpd_jax.types import Batch, Fields, Outputs, ParamDict

PLATFORMS = ("cpu", "cuda", "tpu")
NETWORK, WEIGHTS, FACTS, LOADER = "network.jax_export", "weights.safetensors", "network.json", "load.py"
FORMAT = 1  # version of FACTS
BATCH = "batch"  # the symbolic batch size
SENTENCE = "the red car"  # an example
PACKAGES = ("vpd_jax", "jax", "jaxlib", "flax", "numpy", "safetensors")
ANYWHERE = ("auto", "chunked", "xla")  # attention implementations that all platforms support


def run(config: ConfigDict, workdir: str, *, output: str) -> Path:
  """--mode=export: writes the network of a run with its weights, and returns the folder.

  Args:
    config: of the run.
    workdir: whose checkpoint is read; without one, the weights are those of `config.init`.
    output: the folder, which must not exist.

  Raises:
    ValueError: if flatbuffers is not installed, the folder exists or cannot be created, there are no trained weights,
      or not all platforms support the attention implementation.
  """
  target = check_output(output)
  if importlib.util.find_spec("flatbuffers") is None:
    raise UserError("--mode=export needs flatbuffers, which is not installed; run pip install 'vpd_jax[export]'.")
  check_attention(config)  # before the weights are loaded
  predictor = Predictor.load(config, weights=trained_weights(config, workdir))
  progress.write("\n".join(predictor.origin))
  write(predictor, target)
  progress.write(f"network written to {output}; python {target / LOADER} runs it")
  return target


def write(predictor: Predictor, target: Path) -> None:
  """Writes the network of a predictor atomically, see the module docstring; raises as `check_attention`."""
  check_attention(predictor.config)
  with progress.phase("trace"):
    exported, fixed = _exported(predictor)
  if fixed:
    progress.write(f"the number of images is fixed to 1: the network does not leave it open ({fixed})")
  facts = _facts(predictor, exported, fixed)
  arrays = {name: np.asarray(x, order="C") for part in predictor.weights for name, x in part.items()}
  with progress.phase("write"), atomic.beside(target) as unfinished:
    unfinished.mkdir()
    (unfinished / NETWORK).write_bytes(exported.serialize())
    save_file(arrays, unfinished / WEIGHTS)
    atomic.write_json(unfinished / FACTS, facts)
    (unfinished / LOADER).write_text(Path(__file__).with_name("exported_loader.py").read_text())


def check_attention(config: ConfigDict) -> None:
  """Raises ValueError if not all platforms support the attention implementation."""
  if config.backbone.attention not in ANYWHERE:
    raise UserError(
      f"config.backbone.attention={config.backbone.attention!r} does not run on all of {', '.join(PLATFORMS)}; set "
      "config.backbone.attention='auto'."
    )


def check_output(output: str) -> Path:
  """The output folder, which must not exist and must be creatable."""
  target = paths.local(output, "--output")
  if not output:
    raise UserError("--mode=export needs a place for the network: give --output=FOLDER.")
  if target.exists():
    raise UserError(f"--output={output!r} exists already; give a folder that does not, it is created.")
  if not paths.is_writable(target):
    raise UserError(
      f"--output={output!r} cannot be made: {paths.nearest_existing(target)} is not a folder that can be written to; "
      "give another."
    )
  return target


def _batch(predictor: Predictor) -> dict[str, np.ndarray]:
  """A batch of one black image of the network's input size."""
  black = np.zeros((1, *predictor.input_size, 3), np.float32)
  return predictor.batch(black, sentences=[SENTENCE] if predictor.takes_sentence else None)


def _exported(predictor: Predictor) -> tuple[jax.export.Exported, str]:
  """The network as a function of {name: weight} and {name: input}, and why the batch size is fixed, if it is."""

  def network(weights: ParamDict, batch: Batch) -> Outputs:
    return predictor.network((weights,), batch)

  weight_shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for part in predictor.weights for name, x in part.items()
  }
  example = _batch(predictor)

  def traced(batch_size: object) -> jax.export.Exported:
    shapes = {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in example.items()}
    with any_platform():
      return jax.export.export(jax.jit(network), platforms=PLATFORMS)(weight_shapes, shapes)

  (batch_size,) = jax.export.symbolic_shape(BATCH)
  try:
    return traced(batch_size), ""
  except Exception as error:  # Code that depends on the batch size raises many errors; with 1 it must not.
    return traced(1), one_line(error)[:200]


def _facts(predictor: Predictor, exported: jax.export.Exported, fixed: str) -> Fields:
  """The content of FACTS."""
  config, task, classes = predictor.config, predictor.experiment.task, predictor.experiment.classes
  (_, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  array = lambda x: {"shape": [d if isinstance(d, int) else str(d) for d in x.shape], "dtype": str(x.dtype)}
  return {
    "format": FORMAT,
    "method": config.method.name,
    "task": config.task.name,
    "data": config.data.name,
    "classes": list(classes),
    "inputs": {name: {**array(x), **_input(predictor, name)} for name, x in inputs.items()},
    "outputs": {name: {**array(x), "meaning": task.output_descriptions[name]} for name, x in outputs.items()},
    "preprocessing": predictor.preprocessing,
    "test_time": list(config.eval.test_time),
    "postprocessing": task.output_descriptions["result"],
    "batch": f"fixed to 1 ({fixed})" if fixed else "any number of images",
    "platforms": list(exported.platforms),
    "x64": bool(jax.config.read("jax_enable_x64")),
    "weights": predictor.origin,
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
    | {"python": python_platform.python_version(), "calling convention": exported.calling_convention_version},
    "config": config.to_dict(),
  }


def _input(predictor: Predictor, name: str) -> Fields:
  """Range and meaning of an input."""
  if name == "image":
    return {"range": [0, 1], "meaning": "RGB, 0 black and 1 white: a uint8 image divided by 255"}
  if name == "class_id":
    last = len(predictor.experiment.classes) - 1
    unknown = "the class that CLIP predicts from the image" if predictor.predicts_class else "the mean of all"
    return {"range": [-1, last], "meaning": f"index of the image's class in `classes`; -1 is {unknown}"}
  tokens = _batch(predictor)[name][0].tolist()
  return {
    "range": [0, predictor.config.backbone.text.vocab_size - 1],
    "meaning": "token ids of a sentence about the image, from the tokenizer in config.method.tokenizer or in the "
    "weights, truncated or padded to this length",
    "example": {"sentence": SENTENCE, "tokens": tokens},
  }
