"""Errors meant for users are told from errors of the program."""

import ast

import pytest

from tests.helpers.paths import ROOT
from vpd_jax import errors
from vpd_jax.convert import rules
from vpd_jax.convert.formats import lazy_tensor
from vpd_jax.distributed import multiprocess


def test_an_error_for_users_is_one_line_and_exit_code_2(capsys):
  for error in (errors.UserError("give another\nname"), errors.NotFiniteError("the loss"), OSError(28, "disk full")):
    with pytest.raises(SystemExit) as caught, multiprocess.report_errors():
      raise error
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "Traceback" not in printed


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
  with pytest.raises(SystemExit) as caught, multiprocess.report_errors():
    raise KeyboardInterrupt
  assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("shapes (2,) and (3,)"), FloatingPointError("a bug"), TypeError("a bug")])
def test_any_other_error_keeps_its_traceback(error):
  with pytest.raises(type(error)) as caught, multiprocess.report_errors():
    raise error
  assert caught.value is error


def test_users_errors_are_value_errors_as_before():
  assert issubclass(errors.UserError, ValueError)
  assert issubclass(errors.NotFiniteError, (errors.UserError, FloatingPointError))
  assert issubclass(rules.ConversionError, errors.UserError) and issubclass(lazy_tensor.NotRead, errors.UserError)


def test_our_checks_raise_errors_for_users():
  """A plain ValueError in our own code would be shown to the user as a fault of the program."""
  found = []
  for path in [*ROOT.glob("vpd_jax/**/*.py"), *ROOT.glob("scripts/*.py")]:
    if path.name == "exported_loader.py":  # runs without this package
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
      name = made.func if isinstance(made, ast.Call) else made
      bases = node.bases if isinstance(node, ast.ClassDef) and path.name != "errors.py" else []
      if any(isinstance(x, ast.Name) and x.id == "ValueError" for x in (name, *bases)):
        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert not found
