"""python -m vpd_jax.demo [--config=configs/nyu_depth.py] [--workdir=RUN] [--port=7860] [--host=127.0.0.1]

A web page that shows the prediction for an image and offers its files for download. Requires the extra `demo`
(Gradio). Without a config, it serves the tiny networks of the rooms for all four tasks. All fields of the config can be
set, as for vpd_jax.main.
"""

import importlib.util
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from vpd_jax.config import command_line, loader, stored
from vpd_jax.distributed import multiprocess
from vpd_jax.errors import UserError
from vpd_jax.monitoring import progress

FLAGS = flags.FlagValues()  # separate, because vpd_jax.main defines flags with the same names
CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file and words; default: that of the run in --workdir, else the tiny networks of the rooms.",
  lock_config=True,
  flag_values=FLAGS,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run; default: runs/<config name>.", flag_values=FLAGS)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0: all of them.", flag_values=FLAGS)
PORT = flags.DEFINE_integer("port", None, "Port; default: the first free one from 7860.", 1, 65535, flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this.", flag_values=FLAGS)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=FLAGS)


def main(arguments: list[str]) -> None:
  """Serves the page until Ctrl-C; a user error is printed as one line, with exit code 2."""
  arguments = command_line.parse(FLAGS, arguments, _with_config)
  if HELP.value:
    print(f"{__doc__}\n{FLAGS.get_help()}")
    return
  logging.set_verbosity(logging.FATAL)
  with multiprocess.report_errors(DEBUG.value):
    if len(arguments) > 1:
      raise UserError(f"unexpected positional arguments: {arguments[1:]}; write --flag=value.")
    if importlib.util.find_spec("gradio") is None:
      raise UserError("the page needs Gradio, which is not installed; run pip install 'vpd_jax[demo]'.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder is removed
    with tempfile.TemporaryDirectory(prefix="vpd_jax_demo_") as folder:
      # Set before Gradio is imported: uploads go to the temporary folder, and no analytics are sent.
      os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
      _serve(Path(folder))


def _serve(folder: Path) -> None:
  progress.show()
  with progress.phase("import"):
    from vpd_jax import experiment
    from vpd_jax.demo import page, results

  config, workdir, string = CONFIG.value, WORKDIR.value or "", ""
  if config is not None:
    flag = FLAGS["config"]
    # By vars, because the type stubs lack this function.
    config = experiment.with_chosen_parts(config, vars(config_flags)["get_override_values"](flag))
    string = config_flags.get_config_filename(flag)
    workdir = workdir or loader.workdir(string)
  networks = results.networks(config, workdir, string)
  first = next(iter(networks.values()))
  progress.write("\n".join(filter(None, (*first.predictor.origin, first.notice))))
  demo_page = page.Page(networks, folder / "sessions")
  progress.write(f"the page is at {demo_page.launch(HOST.value, PORT.value)}; Ctrl-C ends it")
  try:
    threading.Event().wait()
  finally:
    demo_page.blocks.close(verbose=False)


def _with_config(arguments: list[str]) -> list[str]:
  """The command line, with the config of the run in --workdir if --config is missing."""
  config, workdir = (loader.argument(arguments, flag) for flag in ("config", "workdir"))
  if config is None and workdir:
    return [arguments[0], f"--config={stored.config_string(workdir)}", *arguments[1:]]
  return arguments


if __name__ == "__main__":
  main(sys.argv)
