"""A network as ONNX, beside what --mode=export writes, and checked with ONNX Runtime.

python scripts/export_onnx.py --weights=runs/nyu --output=network
python scripts/export_onnx.py --config=configs/nyu_depth.py --weights=vpd_depth_480x480.pth --output=network

Writes a folder as --mode=export does, and in it network.onnx, for one picture at a time, with the inputs and outputs of
network.json. That file says, under "onnx", how far ONNX Runtime is from this package on three drawn rooms.

The conversion is that of jax2onnx, whose pins exclude ours. So the first call makes an environment of its own from the
package index, .venv-onnx ($VPD_ONNX_VENV), and the script goes on in there.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

from vpd_jax.errors import Parser, UserError, one_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
JAX2ONNX = "jax2onnx==0.17.1"
JAX = "jax<0.12"  # with jax 0.12, this jax2onnx fails at import
# What it imports. It also asks for an orbax-checkpoint before ours, and for what it does without: hence --no-deps.
NEEDED = ("onnx>=1.20.1", "onnxruntime>=1.24.1", "onnx-ir>=0.2.1", "equinox>=0.13.1", "dm-pix>=0.4.4", "einops>=0.8.1")
NETWORK = "network.onnx"
PICTURES = 3


def has_jax2onnx(python: pathlib.Path) -> bool:
  """Whether an environment is complete: jax2onnx is installed last."""
  look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('jax2onnx') is None)"
  return python.exists() and not subprocess.run([python, "-c", look], check=False).returncode


def environment() -> pathlib.Path:
  """The Python of the environment that has jax2onnx, which is made, or completed after an interruption."""
  folder = pathlib.Path(os.environ.get("VPD_ONNX_VENV") or ROOT / ".venv-onnx").absolute()
  python = folder / "bin" / "python"
  if not has_jax2onnx(python):
    print(f"making {folder} with jax2onnx, once", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = (
      [sys.executable, "-m", "venv", folder],
      [*pip, "--editable", f"{ROOT}[export]", JAX, *NEEDED],
      [*pip, "--no-deps", JAX2ONNX],
    )
    for command in commands:
      if subprocess.run(command, check=False).returncode:
        raise UserError(f"{folder} could not be made, see above; remove it and try again, or install {JAX2ONNX} there.")
  return python


def parse(arguments: list[str]) -> dict[str, str]:
  parser = Parser(prog="export_onnx.py", description=__doc__)
  parser.add_argument("--config", help="config file and words; default: that of the run in --weights")
  parser.add_argument("--weights", default="", help="a run, or weights as --config.init.pretrained takes them")
  parser.add_argument("--output", required=True, help="the folder, which must not exist")
  return vars(parser.parse_args(arguments))


def pictures(predictor) -> list[dict]:
  """The network's inputs for a few drawn rooms, one at a time, with their own classes and sentences."""
  import numpy as np

  from vpd_jax.data.datasets import rooms

  made, classes = [], len(predictor.experiment.classes) if predictor.takes_class else 0
  for i in range(PICTURES):
    room = rooms.draw(1, "eval", i, predictor.input_size)
    words = {"sentences": [rooms.sentences(room)[0][0]]} if predictor.takes_sentence else {}
    words |= {"class_id": min(i, classes) - 1} if classes else {}
    made.append(predictor.batch(room.image[None].astype(np.float32) / 255, **words))
  return made


def add_onnx(predictor, folder: pathlib.Path) -> dict:
  """Writes NETWORK into a folder of an exported network, and returns what is known of it.

  Raises:
    ValueError: jax2onnx does not convert the network, or ONNX Runtime does not run it; says why.
  """
  import importlib.metadata

  import jax
  import jax2onnx
  import numpy as np
  import onnxruntime

  from vpd_jax.models.backbones.platform import any_platform

  given = pictures(predictor)
  weights = {name: np.asarray(x) for part in predictor.weights for name, x in part.items()}
  compiled = jax.jit(predictor.network)
  expected = [jax.device_get(compiled((weights,), batch)) for batch in given]
  inputs, outputs = list(given[0]), list(expected[0])

  def network(*arrays):
    found = predictor.network((weights,), dict(zip(inputs, arrays, strict=True)))
    return tuple(found[name] for name in outputs)

  shapes = [jax.ShapeDtypeStruct(given[0][name].shape, given[0][name].dtype) for name in inputs]
  try:
    with any_platform():
      jax2onnx.to_onnx(
        network,
        shapes,
        model_name="network",
        return_mode="file",
        output_path=folder / NETWORK,
        input_names=inputs,
        output_names=outputs,
      )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every constant that the conversion left unused
    session = onnxruntime.InferenceSession(str(folder / NETWORK), options, providers=["CPUExecutionProvider"])
  except Exception as error:  # Both report operations that they do not know in many ways.
    why = one_line(error, with_type=True)[:300]
    raise UserError(f"{JAX2ONNX} does not convert this network for ONNX Runtime ({why}).") from None
  difference, largest = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
  for batch, here in zip(given, expected, strict=True):
    for name, found in zip(outputs, session.run(outputs, batch), strict=True):
      difference[name] = max(difference[name], float(np.abs(found - here[name]).max()))
      largest[name] = max(largest[name], float(np.abs(here[name]).max()))
  return {
    "file": NETWORK,
    "batch": "fixed to 1",
    "pictures": f"{PICTURES} drawn rooms",
    "largest_difference": difference,
    "largest_value": largest,
    "versions": {name: importlib.metadata.version(name) for name in ("jax2onnx", "onnx", "onnxruntime", "jax")},
  }


def export(predictor, target: pathlib.Path) -> dict:
  """Writes a network as --mode=export does, with NETWORK; returns what is known of the latter."""
  import json

  from vpd_jax.files import atomic
  from vpd_jax.prediction import export as of_jax

  with atomic.beside(target) as unfinished:
    of_jax.write(predictor, unfinished)
    facts = json.loads((unfinished / of_jax.FACTS).read_text())
    facts["onnx"] = add_onnx(predictor, unfinished)
    atomic.write_json(unfinished / of_jax.FACTS, facts)
  return facts["onnx"]


def main(arguments: list[str]) -> None:
  options = parse(arguments)
  if importlib.util.find_spec("jax2onnx") is None:
    python = environment()
    os.execv(python, [str(python), __file__, *arguments])
  from vpd_jax.monitoring import progress
  from vpd_jax.prediction import export as of_jax
  from vpd_jax.prediction.predictor import Predictor

  progress.show()
  target = of_jax.check_output(options["output"])
  predictor = Predictor.load(options["config"], weights=options["weights"])
  found = export(predictor, target)
  for name, difference in found["largest_difference"].items():
    print(f"{name}: differs by at most {difference:.3g} of values up to {found['largest_value'][name]:.3g}")
  print(f"written to {target}; {target / NETWORK} takes one picture at a time")


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except UserError as error:
    sys.exit(f"error: {one_line(error)}")
