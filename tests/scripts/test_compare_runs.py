"""scripts/compare_runs.py: two runs with known curves."""

import json
import sys

import pytest

from tests.helpers.loaded_scripts import load
from vpd_jax.errors import UserError

script = load("scripts/compare_runs.py")


def run(folder, losses, step_ms=(900.0, 100.0, 102.0, 101.0)):
  """A workdir with these losses at steps 10, 20, .., and times."""
  folder.mkdir()
  lines = [
    {"step": 10 * (i + 1), "train/loss": loss, "perf/step_ms": time}
    for i, (loss, time) in enumerate(zip(losses, step_ms, strict=True))
  ]
  lines.insert(1, {"step": 10, "eval/rooms/rmse": 1.0})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


LOSSES = (1.0, 0.5, 0.25, 0.125)


@pytest.mark.parametrize(
  "losses, step_ms, code, words",
  [
    (LOSSES, (900.0, 100.0, 102.0, 101.0), 0, "the losses are equal; no difference of speed beyond the spread"),
    (LOSSES, (900.0, 50.0, 51.0, 50.5), 0, "the losses are equal; the second is 2.00 times as fast"),
    (LOSSES, (900.0, 200.0, 204.0, 202.0), 1, "the losses are equal; the second is 0.50 times as fast"),
    (
      (1.0, 0.5, 0.25, 0.125 * (1 + 1e-7)),
      (9.0, 101.0, 101.0, 101.0),
      0,
      "agree: by at most 1.0e-07 of their size, at",
    ),
    ((1.0, 0.5, 0.2, 0.125), (9.0, 101.0, 101.0, 101.0), 1, "differ: by at most 2.0e-01 of their size, at step 30"),
    ((1.0, 0.5, None, 0.125), (9.0, 101.0, 101.0, 101.0), 1, "differ: by at most inf of their size, at step 30"),
  ],
)
def test_the_verdict_is_of_losses_and_speed(tmp_path, capsys, monkeypatch, losses, step_ms, code, words):
  first, second = run(tmp_path / "a", LOSSES), run(tmp_path / "b", losses, step_ms)
  monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(first), str(second)])
  with pytest.raises(SystemExit) as ended:
    script.main()
  printed = capsys.readouterr().out
  assert ended.value.code == code and f"verdict: the losses {words.removeprefix('the losses ')}" in printed
  assert "loss at step 40" in printed and "ms a step" in printed


def test_repeats_without_training_are_refused(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["compare_runs.py", "a", "b", "--repeats=3"])
  with pytest.raises(SystemExit) as ended:
    script.main()
  assert ended.value.code == 2
  assert capsys.readouterr().err == "compare_runs: --repeats has no effect without --train; leave it out.\n"


def test_steps_that_both_have_logged_are_compared(tmp_path):
  assert script.largest_difference({10: 1.0, 20: 2.0}, {20: 1.0, 30: 5.0}) == (0.5, 20)
  with pytest.raises(UserError, match="no logged step in common"):
    script.largest_difference({10: 1.0}, {20: 1.0})


def test_repeated_runs_are_one_and_must_agree():
  one, two = script.Run({1: 0.5}, [10.0]), script.Run({1: 0.5}, [12.0])
  assert script.joined([one, two]) == script.Run({1: 0.5}, [10.0, 12.0])
  with pytest.raises(UserError, match="two runs of the same commit have different losses"):
    script.joined([one, script.Run({1: 0.6}, [10.0])])


@pytest.mark.parametrize("content, message", [
  (None, r"has no metrics\.jsonl"), ("{", r"metrics\.jsonl, line 1 is not valid JSON"),
  ('{"step": 1}\n', r"holds no 'train/loss'"),
])  # fmt: skip
def test_a_run_that_cannot_be_read_is_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "metrics.jsonl").write_text(content)
  with pytest.raises(UserError, match=message):
    script.read(tmp_path)
