"""Runs the commands of docs/first_session.md again, and writes what they print.

python scripts/first_session.py            # prints the page with the new output
python scripts/first_session.py --write    # writes it

The ```console blocks of the page hold commands after "$ ", each with its output; the ```python block is session.py. All
run in a fresh folder, in the order of the page. On two cores this takes about ten minutes, most of it compiling.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

from vpd_jax.errors import Parser

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first_session.md"
BLOCK = re.compile(r"```(console|python)\n(.*?)```\n", re.DOTALL)
LONGEST = 400  # letters of a line of output that are kept


def program(page: str) -> str:
  """The Python program of the page."""
  return next(match[2] for match in BLOCK.finditer(page) if match[1] == "python")


def output(command: str, folder: pathlib.Path) -> str:
  """What a command prints, stdout and stderr together, in `folder`."""
  run = command.replace("python ", f"{sys.executable} ", 1).replace(" scripts/", f" {ROOT}/scripts/")
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(run, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  lines = done.stdout.decode().replace(f"{folder}/", "").splitlines()
  return "".join(f"{line[:LONGEST]}{' ..' * (len(line) > LONGEST)}\n" for line in lines)


def again(page: str, folder: pathlib.Path) -> str:
  """The page with the output of its commands, run in `folder`."""
  (folder / "session.py").write_text(program(page))

  def block(match: re.Match) -> str:
    if match[1] == "python":
      return match[0]
    commands = [line for line in match[2].splitlines() if line.startswith("$ ")]
    return "```console\n" + "".join(f"{line}\n{output(line[2:], folder)}" for line in commands) + "```\n"

  return BLOCK.sub(block, page)


def main() -> None:
  parser = Parser(description="Run the commands of docs/first_session.md again.")
  parser.add_argument("--write", action="store_true", help="write the page; default: print it")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    page = again(PAGE.read_text(), pathlib.Path(folder))
  if options.write:
    PAGE.write_text(page)
  else:
    print(page, end="")


if __name__ == "__main__":
  main()
