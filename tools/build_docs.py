"""Build the documentation: a page for each Markdown file of the repository, and one for each module from its docstrings.

    python tools/build_docs.py --output site

Needs the extra `docs`. Exit status: 0 done; 1 there are broken links or unresolved names, with an error line for each; 2 bad
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

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

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
    """Collects the link targets of an HTML page, and its own anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the links and anchors in a tag's attributes."""
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
    """Write each Markdown file as HTML to the same relative path in the site, and copy the pictures and files it links to."""
    import markdown2

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        out = site / page.relative_to(ROOT).with_suffix(".html")
        out.parent.mkdir(parents=True, exist_ok=True)
        body = re.sub(r'(?:href|src)="([^"]+)"', partial(rewrite_link, page, site), markdown2.markdown(text, extras=MARKDOWN))
        title = re.search(r"^# (.*)", text, re.MULTILINE)
        up = "../" * (len(out.relative_to(site).parts) - 1)
        out.write_text(FRAME.format(title=escape(title[1] if title else page.name), up=up, body=body), encoding="utf-8")
    (site / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n', encoding="utf-8")


def rewrite_link(page: Path, site: Path, attribute: re.Match[str]) -> str:
    """Rewrite a link between Markdown files to one between HTML pages; copy a linked file of another kind into the site.

    Args:
        page: the Markdown file with the link.
        site: the directory of the HTML pages.
        attribute: match of the attribute, `href="..."` or `src="..."`; group 1 is the target.

    Returns:
        The attribute for the HTML page.
    """
    path, separator, anchor = attribute[1].partition("#")
    target = Path(os.path.normpath(page.parent / path))
    if not path or urlsplit(path).scheme or not target.is_relative_to(ROOT):
        return attribute[0]
    if target.is_dir():
        target, path = target / "README.md", f"{path.rstrip('/')}/README.md"
    if target in PAGES:
        path = path.removesuffix(".md") + ".html"
    elif target.is_file():
        copy = site / target.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, copy)
    return attribute[0].replace(attribute[1], path + separator + anchor)


def build_api(folder: Path) -> list[str]:
    """Write a page for each module from its docstrings; return pdoc's warnings."""
    import pdoc

    import megatron

    for name in megatron.__all__:  # pdoc reads vars(megatron), which has the lazily loaded names only after they are set
        setattr(megatron, name, getattr(megatron, name))
    # The direct subpackages must be listed, since pdoc documents only `__all__` of `megatron`; it finds their modules itself.
    modules = ["megatron", *(f"megatron.{module.name}" for module in pkgutil.iter_modules(megatron.__path__))]
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"megatron {megatron.__version__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=folder)
    return [str(warning.message) for warning in caught if "pdoc" in warning.filename]


def broken_links(site: Path) -> Iterator[str]:
    """Yield an error message for each link inside the site whose page or anchor does not exist."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for page, links in pages.items():
        for target in dict.fromkeys(links.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = Path(os.path.normpath(page.parent / unquote(url.path))) if url.path else page
            if not file.exists():
                yield f"{page.relative_to(site)}: {target} does not exist"
            elif url.fragment and file in pages and unquote(url.fragment) not in pages[file].anchors:
                yield f"{page.relative_to(site)}: {target} has no such anchor"


def main() -> int:
    """Run the tool, and return its exit status."""
    site = arguments().output
    if site.exists() and not (site / "docs" / "index.html").exists():
        print(f"error: {site} exists and is not a built documentation; choose another directory", file=sys.stderr)
        return 2
    shutil.rmtree(site, ignore_errors=True)
    build_pages(site)
    problems = [*build_api(site / "api"), *broken_links(site)]
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages in {site}; {len(problems)} errors")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
