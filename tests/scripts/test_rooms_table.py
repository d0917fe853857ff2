"""The script of the rooms' table: reading a run, writing the table; no training."""

import concurrent.futures
import json
import os
import sys
import time

import pytest

from tests.helpers.loaded_scripts import load

METHODS = ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp")


@pytest.fixture(scope="module")
def script():
  return load("scripts/rooms_table.py")


def results(rows, seeds=(0, 1), **changes):
  """Made-up results of every method; a score is the method's number plus a tenth of the seed; 5 more untrained."""
  common = {"task": rows.task, "device": "some CPU, 2 cores"}
  trivial = {name: 1.5 for name in rows.baselines}
  networks = [
    {"method": m, "parameters": 12_345_678, "gflop": 7.25, "seconds": 0.0421, "crop": [96, 96], "batch_size": 6}
    for m in METHODS
  ]
  runs = [
    {"method": m, "seed": s, "steps": 40, "score": i + s / 10 + more, "trivial": trivial, "config": "", "minutes": 4.6}
    | {"start": start, "peak_gib": 1.25 + s, "step_gib": 0.5}
    for i, m in enumerate(METHODS)
    for start, more in (("small", 0), ("small_scratch", 5))
    for s in seeds
  ]
  return {"networks": [common | n for n in networks], "runs": [common | r | changes for r in runs]}


def test_the_table_has_a_row_per_method_and_per_trivial_predictor(script):
  rows = script.TASKS[0]
  lines = script.table(results(rows), rows).splitlines()
  assert lines[0] == (
    "| depth | RMSE, m, from the weights | RMSE, m, from random initialization "
    "| parameters | GFLOP | ms | peak memory |"
  )
  scores = "1.050 (1.000 to 1.100, 2 seeds) | 6.050 (6.000 to 6.100, 2 seeds)"
  assert lines[3] == f"| MetaPrompts | {scores} | 12.3 M | 7.2 | 42 | 2.2 GiB, step 0.5 |"
  assert [line.split(" | ")[1] for line in lines[7:10]] == ["1.500"] * 3
  assert len({line.count("|") for line in lines[:10]}) == 1
  assert lines[10] == "" and "40 steps of 6 images" in lines[11] and "some CPU, 2 cores" in lines[11]
  assert "--seeds 0 1`" in lines[11]


def test_a_row_that_is_not_there_yet_is_not_yet_run(script):
  rows, made = script.TASKS[0], results(script.TASKS[0], seeds=(0,))
  made["runs"] = [r for r in made["runs"] if r["method"] != "iedp" and (r["method"], r["start"]) != ("vpd", "small")]
  lines = script.table(made, rows).splitlines()
  assert lines[2].startswith("| VPD | not yet run | 5.000 (1 seed) | 12.3 M |")
  assert lines[4] == "| IEDP | not yet run | not yet run | | | | |"
  assert len(script.table({"networks": [], "runs": []}, rows).splitlines()) == 7


def test_runs_may_come_from_several_processors(script):
  rows, made = script.TASKS[0], results(script.TASKS[0])
  made["runs"][0]["device"] = "another CPU, 4 cores"
  assert "trained on another CPU, 4 cores and some CPU, 2 cores;" in script.table(made, rows).splitlines()[11]


def test_rows_that_cannot_be_compared_are_refused(script):
  rows, made = script.TASKS[0], results(script.TASKS[0])
  made["runs"][0]["steps"] = 41
  made["networks"][0]["device"] = "another"
  with pytest.raises(ValueError, match=r"differ in steps \[40, 41\]; device \['another', 'some CPU, 2 cores'\]: take"):
    script.table(made, rows)


def test_only_what_stands_between_the_markers_is_replaced(script):
  made = results(script.TASKS[0])
  text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
  new = script.write(text, made, script.TASKS[:1])
  assert new.startswith(f"before\n{script.BEGIN}\n| depth |") and new.endswith(f"\n{script.END}\nafter\n")
  assert "old" not in new and script.write(new, made, script.TASKS[:1]) == new
  for wrong in ("none", f"{script.END}\n{script.BEGIN}", text + text):
    with pytest.raises(ValueError, match="once each"):
      script.write(wrong, made, script.TASKS[:1])


def test_the_page_holds_the_table_of_the_stored_results(script):
  page = script.PAGE.read_text()
  assert script.write(page, script.load()) == page, "python scripts/rooms_table.py --write"
  assert "not yet run" not in page
  steps = {rows.task: rows.steps for rows in script.TASKS}
  assert all(run["steps"] == steps[run["task"]] for run in script.load()["runs"])


def test_scores_and_losses_are_read_from_the_metrics(script):
  rows = script.TASKS[0]
  lines = [{"step": i, "train/loss": 20.0 - i, "train/implicit/silog": 2.0} for i in range(20)]
  lines += [{"step": 20, "eval/rooms/rmse": 0.9}, {"step": 20, "eval/rooms/rmse": 0.8, "eval/trivial/constant": 1.1}]
  read = script.read_scores(lines, rows)
  assert read["score"] == 0.8 and read["trivial"] == {"constant": 1.1}
  assert read["losses"] == {"train/loss": [19.5, 1.5], "train/implicit/silog": [2.0, 2.0]}


def test_a_record_replaces_that_of_the_same_run_only(script, tmp_path, monkeypatch):
  monkeypatch.setattr(script, "RESULTS", tmp_path / "table.json")
  monkeypatch.setattr(script, "LOCK", tmp_path / "lock")
  for seed, score in ((1, 0.9), (0, 0.8), (1, 0.7)):
    script.save("runs", {"task": "depth", "method": "vpd", "seed": seed, "score": score})
  script.save("networks", {"task": "depth", "method": "vpd"})
  assert [(run["seed"], run["score"]) for run in script.load()["runs"]] == [(0, 0.8), (1, 0.7)]
  assert json.loads((tmp_path / "table.json").read_text())["networks"] == [{"task": "depth", "method": "vpd"}]


def test_commands_that_save_at_the_same_time_lose_no_record(script, tmp_path, monkeypatch):
  monkeypatch.setattr(script, "RESULTS", tmp_path / "table.json")
  monkeypatch.setattr(script, "LOCK", tmp_path / "runs" / "lock")
  slow = script.load
  monkeypatch.setattr(script, "load", lambda: (slow(), time.sleep(0.02))[0])
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda seed: script.save("runs", {"task": "depth", "method": "vpd", "seed": seed}), range(8)))
  assert [run["seed"] for run in slow()["runs"]] == list(range(8))


def test_a_child_that_fails_ends_the_program_with_its_words_and_none_is_left_behind(script, tmp_path, monkeypatch):
  with pytest.raises(SystemExit, match=r"exited with 3; the end of .*:\nsome words"):
    script.child([sys.executable, "-c", "import sys; print('some words'); sys.exit(3)"], tmp_path / "log")
  started = []

  def interrupted(pid, _):
    started.append(pid)
    raise KeyboardInterrupt

  monkeypatch.setattr(script.os, "wait4", interrupted)
  with pytest.raises(KeyboardInterrupt):
    script.child([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
  with pytest.raises(ProcessLookupError):
    os.kill(started[0], 0)


def test_a_row_of_another_config_is_named(script):
  rows = script.TASKS[0]
  made = results(rows)["runs"]
  for run in made:
    run["config"] = script.digest(rows, run["method"], run["start"], run["seed"])
  assert script.stale({"runs": made}) == []
  made[1]["config"] = "other"
  assert script.stale({"runs": made}) == ["depth vpd small 1"]


def test_writing_the_page_refuses_flags_that_choose_runs(script, monkeypatch, capsys):
  monkeypatch.setattr(script.atomic, "write", lambda *_: pytest.fail("written"))
  monkeypatch.setattr(sys, "argv", ["rooms_table.py", "--write", "--tasks=depth", "--seeds", "0", "--again"])
  with pytest.raises(SystemExit) as ended:
    script.main()
  error = capsys.readouterr().err
  assert ended.value.code == 2 and error.count("\n") == 1
  assert error.startswith("rooms_table: --tasks, --seeds, --again choose runs, and --write starts none")
