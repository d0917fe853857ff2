"""Links between the pages."""

import re

import pytest

from tests.helpers.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")


def anchor(heading):
  """What a heading is called in a link, as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


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


def test_every_page_is_found_from_the_readme():
  found, left = set(), [ROOT / "README.md"]
  while left:
    page = left.pop()
    if page not in found and page.suffix == ".md":
      found.add(page)
      targets = (target for target, _ in LINK.findall(page.read_text()) if target and "://" not in target)
      left += [(page.parent / target).resolve() for target in targets]
  assert set(PAGES) - found == set()
