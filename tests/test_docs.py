"""Links between the pages, and the commands in them."""

import copy
import re
import shlex
import tomllib

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from tests.helpers.paths import ROOT
from vpd_jax import main
from vpd_jax.config import loader

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
FENCE = re.compile(r"(?ms)^```\w*\n(.*?)^```")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
# Flags of `main` as a command has them, without those of absl and of the tests.
OWN = [holder for holder in vars(main).values() if isinstance(holder, flags.FlagHolder) and holder is not main.CONFIG]
# Words of each config that, together, have every section.
WORDS = {
  "nyu_depth": ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp"),
  "refcoco_refer": ("refcoco", "refcoco,meta_prompts"),
  "rooms": ("depth", "segmentation", "referring", "pose"),
}


def anchor(heading):
  """What a heading is called in a link, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def commands(page):
  """The shell commands in the fences of a page, in one line each, without prompts and comments."""
  for fence in FENCE.findall(page.read_text()):
    for line in fence.replace("\\\n", " ").splitlines():
      yield re.sub(r"^\$ |\s[#>]\s.*$", "", line).strip()


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
