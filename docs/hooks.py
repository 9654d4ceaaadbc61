"""Hook of the documentation site: include the repository files outside docs/ that pages link to.

Pages are written for the repository, so that they also read well there. On the site a page of docs/ has its path below
docs/, and another file its path in the repository; the hook rewrites the links.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/images/*.png", "examples/*.*")
CELL_CODE = re.compile(r"(?<=[| ])`[^`\n]*\\\|[^`\n]*`")  # a pipe in a table, escaped as GitHub needs it
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `OUTSIDE` to the site."""
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite the relative links of a page from places in the repository to places on the site."""
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT).parent.as_posix()
    folder = posixpath.dirname(page.file.src_uri)

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, link[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(target, folder or '.')}"

    markdown = CELL_CODE.sub(lambda code: code[0].replace(r"\|", "|"), markdown)
    return LINK.sub(on_site, markdown)
