"""Build the documentation: every Markdown page of the repository, and a page of each module from its docstrings.

    python tools/build_docs.py --output site

Needs the extra `docs`. Exit status: 0 done; 1 a link leads nowhere, or a name cannot be resolved, with a line for each; 2 bad
input, or pdoc is missing.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.launch.tool_parser import ToolParser, non_empty_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (*ROOT.glob("*.md"), *(page for name in ("docs", "benchmarks", "examples") for page in (ROOT / name).rglob("*.md")))
MARKDOWN = ("fenced-code-blocks", "tables", "header-ids", "code-friendly")
FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem; }}
pre {{ background: #f5f5f5; padding: .75rem; overflow-x: auto; }} code {{ font-size: .9em; }}
table {{ border-collapse: collapse; }} td, th {{ border: 1px solid #ddd; padding: .25rem .5rem; text-align: left; }}
img {{ max-width: 100%; }}
</style></head><body>
<nav><a href="{up}docs/index.html">Documentation</a> · <a href="{up}api/megatron.html">Python API</a> ·
<a href="{up}api/index.html">All modules</a></nav>
{body}</body></html>
"""


class Links(HTMLParser):
    """Collects what a page links to, and the anchors that others can link to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the attributes of a tag."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=non_empty_path, default=Path("site"), metavar="DIR", help="default site; is replaced")
    return parser.parse_args()


def build_pages(site: Path) -> None:
    """Write every Markdown page as HTML under its own path, with the pictures and files that it links to."""
    import markdown2

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        out = site / page.relative_to(ROOT).with_suffix(".html")
        out.parent.mkdir(parents=True, exist_ok=True)
        linked = partial(link, page, site)
        body = re.sub(r'(?:href|src)="([^"]+)"', linked, markdown2.markdown(text, extras=MARKDOWN))
        title = re.search(r"^# (.*)", text, re.MULTILINE)
        up = "../" * (len(out.relative_to(site).parts) - 1)
        out.write_text(FRAME.format(title=escape(title[1] if title else page.name), up=up, body=body), encoding="utf-8")
    (site / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n', encoding="utf-8")


def link(page: Path, site: Path, found: re.Match[str]) -> str:
    """Return a link of a page as it stands in the site; a file that is no page is copied there.

    Args:
        page: the Markdown file.
        site: the directory that is built.
        found: the attribute, `href="..."` or `src="..."`.
    """
    path, mark, anchor = found[1].partition("#")
    there = Path(os.path.normpath(page.parent / path))
    if not path or urlsplit(path).scheme or not there.is_relative_to(ROOT):
        return found[0]
    if there.is_dir():
        there, path = there / "README.md", f"{path.rstrip('/')}/README.md"
    if there in PAGES:
        path = path.removesuffix(".md") + ".html"
    elif there.is_file():
        copy = site / there.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(there, copy)
    return found[0].replace(found[1], path + mark + anchor)


def build_api(folder: Path) -> list[str]:
    """Write a page for each module, from its docstrings, and return the warnings of pdoc about them."""
    import pdoc

    import megatron

    for name in megatron.__all__:  # pdoc looks for them where a module keeps what is loaded
        setattr(megatron, name, getattr(megatron, name))
    # Each by its name, since of `megatron` pdoc follows `__all__` alone; modules inside of them it finds itself.
    modules = ["megatron", *(f"megatron.{inside.name}" for inside in pkgutil.iter_modules(megatron.__path__))]
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"megatron {megatron.__version__}")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=folder)
    return [str(warning.message) for warning in found if "pdoc" in warning.filename]


def broken_links(site: Path) -> Iterator[str]:
    """Yield a line for every link inside the site that leads nowhere."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for page, links in pages.items():
        for target in dict.fromkeys(links.targets):
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            there = Path(os.path.normpath(page.parent / unquote(address.path))) if address.path else page
            if not there.exists():
                yield f"{page.relative_to(site)}: {target} is not there"
            elif address.fragment and there in pages and unquote(address.fragment) not in pages[there].anchors:
                yield f"{page.relative_to(site)}: {target} has no such anchor"


def main() -> int:
    """Run the tool, and return its exit status."""
    site = arguments().output
    if site.exists() and not (site / "docs" / "index.html").exists():
        print(f"error: {site} is there and is no documentation; name another directory", file=sys.stderr)
        return 2
    shutil.rmtree(site, ignore_errors=True)
    build_pages(site)
    wrong = [*build_api(site / "api"), *broken_links(site)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages in {site}; {len(wrong)} mistakes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
