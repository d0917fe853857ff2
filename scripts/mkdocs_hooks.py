"""What mkdocs.yml needs beside plugins: pages of the repository's root, and links that fit GitHub and the site alike.

In the pages links are those of the repository, by the names of files. In the site they have the titles of the pages,
CHANGELOG.md and CONTRIBUTING.md lie beside the others, and a link to what is no page, such as a script, becomes its
name.
"""

import functools
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parent.parent
FROM_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")


@functools.cache
def title(path: str) -> str:
  """The first heading of a page."""
  return (ROOT / path).read_text().partition("\n")[0].lstrip("# ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages of the root."""
  for name in FROM_ROOT:
    files.append(File.generated(config, name, content=(ROOT / name).read_text()))
  return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
  """Turns links of the repository into those of the site."""
  folder = "" if page.file.src_uri in FROM_ROOT else "docs"

  def link(match: re.Match[str]) -> str:
    image, text, target, place = match[1], match[2], match[3], match[4] or ""
    if not target or "://" in target:
      return match[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    if path == "README.md":
      path = "docs/index.md"
    if path.startswith("docs/") or path in FROM_ROOT:
      shown = title(path) if text == posixpath.basename(path) else text
      return f"{image}[{shown}]({path.removeprefix('docs/')}{place})"
    return text if text.startswith("`") else f"`{path}`" if not text else f"{text} (`{path}`)"

  return LINK.sub(link, markdown)
