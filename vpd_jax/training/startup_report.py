"""Start-up report: devices, weights, parameter groups, parameters, config."""

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vpd_jax import optim
from vpd_jax.checkpoints import initialize
from vpd_jax.experiment import Experiment
from vpd_jax.files import atomic
from vpd_jax.monitoring import writers


def describe(
  config: ConfigDict,
  exp: Experiment,
  mesh: Mesh,
  writer: writers.Writer,
  workdir: str,
  lines: list[str],
  begin: int,
) -> None:
  """Prints the report, and writes its files from process 0.

  Args:
    config, exp, mesh: of the run.
    writer: for config, groups and parameters, if the run is new.
    workdir: for config.json and, if the run is new, parameters.txt.
    lines: about weights and data.
    begin: number of finished steps.
  """
  devices = jax.devices()
  local = config.data.batch_size // mesh.size
  writers.log(
    f"jax {jax.__version__}, {len(devices)} {devices[0].device_kind} devices, mesh {dict(mesh.shape)}, "
    f"batch {config.data.batch_size} = {mesh.size} x {local}, workdir {workdir}"
  )
  writers.log("\n".join([*lines, *exp.method.notes]))
  groups = writers.table(
    [("group", "lr x", "decay x", "arrays", "numbers", "first"), *optim.table(exp.groups, exp.spec.shapes)]
  )
  writers.log(groups)
  if jax.process_index() == 0:
    atomic.write(epath.Path(workdir) / "config.json", initialize.to_json(config) + "\n")
  if jax.process_index() == 0 and begin == 0:
    overview = writers.parameter_overview(exp.spec.shapes)
    writer.write_hparams(config.to_dict())
    texts = {"config": initialize.to_json(config), "groups": groups, "parameters": overview}
    writer.write_texts(0, {name: f"```\n{text}\n```" for name, text in texts.items()})
    atomic.write(epath.Path(workdir) / "parameters.txt", overview + "\n")
