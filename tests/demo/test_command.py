"""python -m vpd_jax.demo: what is wrong with it is one line, before anything is loaded."""

import importlib.util

import pytest

from vpd_jax.demo import __main__ as demo


@pytest.mark.parametrize(
  "words, message",
  [
    ([], "the page needs Gradio, which is not installed; run pip install 'vpd_jax[demo]'."),
    (["page"], "unexpected positional arguments: ['page']; write --flag=value."),
    (["--prot=3"], "Did you mean: port ?"),
    (["--workdir=none"], "config.json of --workdir='none' is missing"),
    (["--config=configs/rooms.py:dept"], "config argument 'dept' is unknown"),
  ],
)
def test_a_command_that_cannot_run_is_one_line(words, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="2"):
    demo.main(["demo", *words])
  printed = capsys.readouterr().err
  assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_help_names_the_flags(capsys):
  demo.main(["demo", "--help"])
  assert "--port" in (printed := capsys.readouterr().out) and "python -m vpd_jax.demo" in printed
