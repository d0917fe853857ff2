"""Links between the pages, and the commands in them."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from tests.helpers import text_folders
from tests.helpers.paths import ROOT
from vpd_jax import main
from vpd_jax.config import loader

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
MARK = "<!-- not run: "  # above a block of commands that no test runs; the reason follows
FENCE = re.compile(rf"(?ms)^(?:{MARK}([^\n]*) -->\n)?```(\w*)\n(.*?)^```")
REASON = re.compile(r"needs \w.*?(?:; see (\S+))?|takes \d+ minutes; see (\S+)")
SHELL = ("", "console")  # languages of blocks of commands; a block of files, flags, or output is "text"
PROGRAMS = {"srun", "bash", "cp", "gcloud", "hf", "ls", "mv", "pip", "python", "sha256sum"}
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
# Flags of `main` as a command has them, without those of absl and of the tests.
OWN = [holder for holder in vars(main).values() if isinstance(holder, flags.FlagHolder) and holder is not main.CONFIG]
# Words of each config that, together, have every section.
WORDS = {
  "nyu_depth": ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp"),
  "refcoco_refer": ("refcoco", "refcoco,meta_prompts"),
  "rooms": ("depth", "segmentation", "referring", "pose"),
}

# Commands that run here, in this order and in one folder, with what their page promises: a file, or what is printed.
EMBED = "python scripts/embed_class_names.py --weights=DIFFUSERS_FOLDER"
LARGE = "python benchmarks/large_pictures.py"
MAIN = "python -m vpd_jax.main"
NAMES = r"""python -c "from vpd_jax.data.datasets import nyu; print(*nyu.CLASSES, sep='\n')" > names.txt"""
SCORES = "of trivial predictors, and ours as a share of it"
SESSION = {
  "bash scripts/quickstart.sh": Path("runs/quickstart/contact_sheet.png"),
  f"{MAIN} --config=configs/rooms.py:depth,small --workdir=runs/small": SCORES,
  f"{MAIN} --config=configs/rooms.py:depth,small_scratch --workdir=runs/scratch": SCORES,
  f"{MAIN} --mode=export --workdir=runs/nyu --output=network": Path("network/network.jax_export"),
  "python network/load.py": "depth float32 (1, ",
  "python scripts/make_rooms_pictures.py --output=pictures --count=4 --size 192 256": Path("pictures/room_03_*.png"),
  f"{LARGE} --height=3000 --width=4000": "150 classes, 3000 x 4000: 0.",
  f"{LARGE} --measure=programs --small=few_shapes --ratios=0.5,0.75,1,1.25,1.5,1.75,2 --flip": ": 9 shapes of windows",
  f"{MAIN} --mode=weights": "rooms/small: present",
  NAMES: Path("names.txt"),
  f"{EMBED} --names=names.txt --output=vectors.npz": "wrote vectors.npz: 27 names, width 16, 80 templates",
  f'{EMBED} --names=wall,floor,dining_table --output=vectors.npz --templates="a photo of a {{}}"': "npz: 3 names",
}
# Pages and commands that something else runs.
ELSEWHERE = {
  "first_session.md": "tests/scripts/test_first_session.py::test_every_command_prints_what_the_page_says",
  "bash scripts/test.sh": ".ci/run",
}


def anchor(heading):
  """What a heading is called in a link, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def blocks(page):
  """(reason of its mark, language, lines) of each fence; commands are one line each, without prompts and comments."""
  for reason, language, text in FENCE.findall(page.read_text()):
    lines = [re.sub(r"\s+#\s.*$", "", line) for line in re.sub(r"\\\n *", "", text).splitlines()]
    if language == "console":
      lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    yield reason, language, [line for line in lines if line]


def commands(page):
  """The shell commands of a page, without where their output goes."""
  for _, language, lines in blocks(page):
    if language in SHELL:
      yield from (re.sub(r"\s>\s.*$", "", line).strip() for line in lines)


def program(command):
  """The name of the program that a command starts; empty for a line of flags."""
  return next((word.rpartition("/")[2] for word in command.split() if "=" not in word), "")


def faults(page):
  """What is wrong with the marks of a page: every block of commands is run by a test, or says why not."""
  found = list(blocks(page))
  if len(re.findall(rf"(?m)^\s*{MARK.strip()}", page.read_text())) != sum(bool(reason) for reason, _, _ in found):
    yield f"{page.name}: a mark has no reason, or is not directly above a block"
  for reason, language, lines in found:
    names = {page.name} if language == "console" else set()  # a session on a page is run as a whole
    run = [line for line in lines if (names | {line}) & (SESSION.keys() | ELSEWHERE.keys())]
    known = [line for line in lines if program(line) in PROGRAMS]
    place = f"{page.name}, ```{language} {lines[0] if lines else ''}"
    if language in SHELL and not (lines and known == lines):
      yield f"{place}: not only commands; name another language, like text, or add the program to PROGRAMS"
    elif language not in SHELL and (known or reason):
      yield f"{place}: a command or a mark in a block that is not of commands"
    elif language in SHELL and reason and run:
      yield f"{place}: marked as not run, but a test runs {run}"
    elif language in SHELL and not reason and run != lines:
      yield f"{place}: neither run by a test nor marked: {[line for line in lines if line not in run]}"
    if reason:
      stated = REASON.fullmatch(reason)
      if not stated or not all((ROOT / path).exists() for path in stated.groups() if path):
        yield f"{place}: {reason!r} is not of the form of REASON, or what it refers to is missing"


def main_commands():
  """(page, arguments) of every call of vpd_jax.main; a copy of a config is named by its original."""
  for page in PAGES:
    copied = {}
    for line in commands(page):
      if found := re.match(r"cp (configs/\S+) (\S+)", line):
        copied["--config=" + found[2]] = "--config=" + found[1]
      if found := re.match(r"(?:[A-Z_]+=\S+ )*python -m vpd_jax\.main (.*)", line):
        yield page.name, [copied.get(word, word) for word in shlex.split(found[1]) if set(word) != {"."}]


COMMANDS = list(main_commands())


def parsed(arguments, config):
  """The flags of a command, parsed as `main` does."""
  given = [] if any(word.startswith("--config=") for word in arguments) else [f"--config={config}"]
  argv, values = loader.resolve_argv(["main", *given, *arguments]), flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=argv)
  for holder in OWN:
    values[holder.name] = copy.deepcopy(flags.FLAGS[holder.name])
  assert values(argv) == ["main"]
  return values


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
  lost = []
  for target, place in LINK.findall(page.read_text()):
    if target.startswith(("https://", "http://")):
      continue
    path = (page.parent / target).resolve() if target else page
    if not path.exists():
      lost.append(target)
    elif place and place not in {anchor(heading) for heading in re.findall(r"(?m)^#+ (.*)", path.read_text())}:
      lost.append(f"{target}#{place}")
  assert lost == []


def test_every_page_is_three_clicks_from_the_readme():
  clicks, left = {ROOT / "README.md": 0}, [ROOT / "README.md"]
  while left:
    page = left.pop(0)
    for target in {target for target, _ in LINK.findall(page.read_text()) if target and "://" not in target}:
      path = (page.parent / target).resolve()
      if path.suffix == ".md" and path not in clicks:
        clicks[path] = clicks[page] + 1
        left.append(path)
  assert {page.name: clicks.get(page) for page in PAGES if not clicks.get(page, 9) <= 3} == {}


def test_every_page_is_in_the_navigation_of_the_site():
  navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
  assert sorted(re.findall(r"(\S+\.md)", navigation)) == sorted({page.name for page in PAGES} - {"README.md"})


def test_badges_and_citation_say_what_the_project_is():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  readme, tested = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
  versions = re.search(r"!\[Python ([\d., ]+)\]", readme)[1].split(", ")
  assert f">={versions[0]}" == project["requires-python"]
  assert f"for minor in {' '.join(version.split('.')[1] for version in versions)};" in tested
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["version"] == project["version"] and citation["license"] == project["license"]
  assert f"![License {project['license']}]" in readme


@pytest.mark.parametrize("name", ["bug", "number"])
def test_issues_ask_for_the_start_up_report(name):
  form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
  fields = {field["id"]: field for field in form["body"]}
  assert fields["startup"]["validations"]["required"] and fields["command"]["validations"]["required"]


def test_every_command_parses_and_says_what_it_needs():
  """The config is there, the fields exist and take the values, the mode is known."""
  runs, wrong = {}, []
  for page, arguments in COMMANDS:
    option = {word.partition("=")[0]: word.partition("=")[2] for word in arguments}
    config = option.get("--config") or runs.get(option.get("--workdir"), "configs/nyu_depth.py")
    runs.setdefault(option.get("--workdir"), config)
    try:
      values = parsed(arguments, config)
    except Exception as error:
      wrong.append(f"{page}: {' '.join(arguments)}: {error}")
      continue
    needs = {"--config.data.root", "--config.init.pretrained", "--config.init.run"} & option.keys()
    as_it_stands = "rooms.py" in config or values.mode in ("weights", "plan")
    if not (needs or as_it_stands or ("--workdir" in option and values.mode != "train")):
      wrong.append(f"{page}: {' '.join(arguments)}: needs data, weights or a run, and names none")
  assert len(COMMANDS) > 30 and wrong == []


def test_a_wrong_command_is_found():
  for word in ("--config.optim.lrr=1", "--mode=evaluate", "--inputs=a", "--config=configs/none.py", "--config.seed=x"):
    with pytest.raises(Exception, match=r".+"):
      parsed([word], "configs/rooms.py:depth,tiny")


def test_every_field_that_a_page_names_exists():
  strings = [
    f"{path}:{word}" for path in sorted(loader.PROJECT.glob("configs/*.py")) for word in WORDS.get(path.stem, [""])
  ]
  known = {field for string in strings for field in loader._flat(loader.load(string.rstrip(":")))}
  known |= {"head.name", "data.classes"}
  sections = {field.rpartition(".")[0] for field in known}
  wrong = [
    f"{page.name}: config.{field}"
    for page in PAGES
    for field in re.findall(r"--config\.((?:[a-z]\w*\.)*[a-z]\w*)=", page.read_text())
    if field not in known | sections
  ]
  assert wrong == []


def test_scripts_exist_and_know_their_flags():
  wrong = []
  for page in PAGES:
    for line in commands(page):
      found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*python|bash) ((?:scripts|benchmarks)/\S+)(.*)", line)
      if not found:
        continue
      path, rest = ROOT / found[1], found[2]
      source = path.read_text() if path.is_file() else None
      if source is None:
        wrong.append(f"{page.name}: {found[1]} is missing")
      elif path.suffix == ".py":
        wrong += [
          f"{page.name}: {found[1]} --{flag}"
          for flag in FLAG.findall(rest)
          if not flag.startswith("config.") and not re.search(rf'"(--)?{flag}"', source)
        ]
  assert wrong == []


def test_every_block_of_commands_is_run_or_says_why_not():
  assert [fault for page in PAGES for fault in faults(page)] == []


def test_what_is_run_is_on_a_page_and_what_runs_it_exists():
  on_pages = {line for page in PAGES for _, language, lines in blocks(page) if language in SHELL for line in lines}
  assert (SESSION.keys() | ELSEWHERE.keys()) - on_pages - {page.name for page in PAGES} == set()
  for path, _, test in (name.partition("::") for name in ELSEWHERE.values()):
    assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).is_file(), path


@pytest.mark.parametrize(
  "text, fault",
  [
    ("```\nls runs\n```\n", "neither run by a test nor marked"),
    ("```console\n$ ls\nruns\n```\n", "neither run by a test nor marked"),
    ("```text\npip install a\n```\n", "a command or a mark in a block"),
    ("```\ndocker run a\n```\n", "not only commands"),
    (f"{MARK}needs a GPU -->\n```\n--config.seed=1\n```\n", "not only commands"),
    (f"{MARK}needs a GPU -->\n```python\nx = 1\n```\n", "a command or a mark in a block"),
    (f"{MARK}needs a GPU -->\n```\npython network/load.py\n```\n", "marked as not run, but a test runs"),
    (f"{MARK}needs a GPU -->\n\n```text\na\n```\n", "not directly above a block"),
    (f"{MARK}later -->\n```\nls\n```\n", "'later' is not of the form"),
    (f"{MARK}takes 9 minutes; see tests/none.py -->\n```\nls\n```\n", "what it refers to is missing"),
  ],
)
def test_a_forgotten_command_and_a_wrong_mark_are_found(tmp_path, text, fault):
  page = tmp_path / "page.md"
  page.write_text(text)
  (found,) = faults(page)
  assert fault in found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the commands run: beside the scripts, a text encoder, and runs/nyu, which is the run that rooms.md trains."""
  folder = tmp_path_factory.mktemp("session")
  for name in ("benchmarks", "scripts"):
    (folder / name).symlink_to(ROOT / name)
  (folder / "runs").mkdir()
  (folder / "runs" / "nyu").symlink_to("small")
  text_folders.write_diffusers(folder / "DIFFUSERS_FOLDER")
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", SESSION)
def test_a_command_does_what_its_page_promises(folder, command):
  own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "VPD_INSTALL": "0", "VPD_VENV": sys.prefix}
  run = command.replace("python ", f"{sys.executable} ", 1)
  done = subprocess.run(run, shell=True, cwd=folder, env=os.environ | own, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  promised = SESSION[command]
  assert list(folder.glob(str(promised))) if isinstance(promised, Path) else promised in done.stdout, done.stdout
