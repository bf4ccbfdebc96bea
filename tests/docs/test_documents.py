"""The documents' commands run, their links lead somewhere, and their numbers are pyproject's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS += PAGES + sorted(p for folder in ("examples", "benchmarks") for p in (ROOT / folder).rglob("*.md"))
MAX_README_LINES = 70  # one screen of text; code blocks come on top
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return [body for tag, body in FENCE.findall(document.read_text(encoding="utf-8")) if tag == language]


def examples(document: Path) -> list[tuple[str, list[str]]]:
    """Every `sh` block, with the lines of the `text` block that stands behind it: what it prints, shortened by `...`."""
    found: list[tuple[str, list[str]]] = []
    for tag, body in FENCE.findall(document.read_text(encoding="utf-8")):
        if tag == "sh":
            found.append((body, []))
        elif tag == "text" and found:
            found[-1][1].extend(line for line in body.splitlines() if line.strip(". "))
    return found


def commands(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


COMMAND = re.compile(r"(\w+=\S+ )*(pip|python|torchrun|make|curl|sbatch|srun|source|bash|cd) ")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
EVERY = [(d.relative_to(ROOT).as_posix(), *example) for d in DOCUMENTS for example in examples(d)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository as a fresh clone's user sees it, with nothing of theirs in it."""
    for name in ("README.md", "pretrain_gpt.py", "tasks", "tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    # In 0.1 s instead of 3; a python of its own has every tool below, and torchrun in tests/train.
    (programs / "python").symlink_to(os.environ["WARM_PYTHON"])
    put_script(programs / "torchrun", 'exec "$(dirname "$0")/python" -m torch.distributed.run "$@"')
    (programs / "activate").write_text(f"PATH={programs}:{shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
    return tmp_path


def put_script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("document", "block", "printed"), EVERY, ids=[f"{d}-{i}" for i, (d, *_) in enumerate(EVERY)])
def test_shell_blocks_run(document: str, block: str, printed: list[str], checkout: Path) -> None:
    """Every `sh` block runs as it stands and prints what the page says, except that `make` would run this suite again.

    Its targets must exist.
    """
    lines = commands(block)
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert set(made) <= make_targets()
    if len(made) == len(lines):
        return
    programs = Path(sys.executable).parent
    path = os.environ["PATH"]
    if "source .venv/bin/activate" in lines:  # which a newcomer needs, whose shell knows nothing of the environment
        path = os.pathsep.join(place for place in path.split(os.pathsep) if Path(place) != programs)
    else:
        path = os.pathsep.join([str(programs), path])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=checkout,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{document}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    absent = set(printed) - set(done.stdout.splitlines())
    assert not absent, f"{document} shows lines that are not printed: {sorted(absent)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_commands_mean_the_same_in_zsh(document: Path) -> None:
    """Typed there, an unquoted bracket, star or question mark that fits no file is an error, and `#` begins no comment."""
    lines = [line for tag in ("", "sh") for block in blocks(document, tag) for line in commands(block) if COMMAND.match(line)]
    wrong = [line for line in lines if re.search(r"[][*?#!~^{}`]|\s=", QUOTED.sub("", line))]
    assert not wrong, wrong


def test_there_are_blocks_to_run() -> None:
    readme = "\n".join(blocks(ROOT / "README.md", "sh"))
    assert "pretrain_gpt.py" in readme
    assert "make test" in readme


def links(document: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", FENCE.sub("", document.read_text(encoding="utf-8")))


def heading_anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert "://" in link or target.exists(), link
        assert "://" in link or not anchor or anchor in heading_anchors(target), link


def test_the_readme_is_one_screen_and_leads_to_every_page() -> None:
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(text.splitlines()) <= MAX_README_LINES, "pages under docs/ take what is more"
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} <= {link.split("#")[0] for link in links(ROOT / "README.md")}
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert set((ROOT / "docs").glob("*.svg")) <= shown, "a picture that no page shows"


def test_the_drawing_is_what_the_page_draws(tmp_path: Path) -> None:
    """The picture in docs/ stays what the tool makes: draw it again with the command of docs/layouts.md when it changes."""
    page = "\n".join(blocks(ROOT / "docs/layouts.md", "sh"))
    (words,) = (shlex.split(line) for line in commands(page) if "draw_schedule.py" in line)
    drawn = tmp_path / Path(words[-1]).name
    subprocess.run([sys.executable, *words[1:-1], str(drawn)], cwd=ROOT, check=True, capture_output=True)
    assert drawn.read_bytes() == (ROOT / "docs" / drawn.name).read_bytes()


def test_files_named_in_documents_exist() -> None:
    """`a/b.py` in backquotes is a path of the repository, or of the package."""
    wrong = []
    for document in DOCUMENTS:
        for name in re.findall(r"`([\w./]+/[\w.]+\.(?:py|toml|md|sh))`", document.read_text(encoding="utf-8")):
            if not any((base / name).exists() for base in (ROOT, ROOT / "megatron", document.parent)):
                wrong.append(f"{document.name}: {name}")
    assert not wrong, wrong


def test_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {project['requires-python']} " in readme
    (torch,) = (r for r in project["dependencies"] if r.startswith("torch"))
    assert torch.replace("torch", "torch ", 1) in readme
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"pip install torch=={pins['torch']}" in readme
    extras = {
        name: of for name, of in project["optional-dependencies"].items() if name != "wandb"
    }  # `make install` leaves it out
    listed = [*project["dependencies"], *(r for of in extras.values() for r in of)]
    direct = {re.split(r"[^\w-]", r)[0] for r in listed} - {project["name"]}
    assert direct <= pins.keys(), f"constraints.txt lacks {direct - pins.keys()}"


def test_the_tree_is_true() -> None:
    """The tree in ARCHITECTURE.md names every file of the package and the tools, and no other."""
    block = next(b for b in blocks(ROOT / "ARCHITECTURE.md", "") if "\nmegatron/" in b)
    named: set[str] = set()
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, about = line.strip().partition(" ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert about.strip(), f"{name} has no words"
            named.add("".join(folders) + name)
    here = {p.relative_to(ROOT).as_posix() for d in ("megatron", "tools", "tasks") for p in (ROOT / d).rglob("*.py")}
    here = {p for p in here if not p.endswith("__init__.py")} | {p.name for p in ROOT.glob("*.py")}
    assert here - named == set(), "add these to the tree in ARCHITECTURE.md"
    assert named - here == set(), "these are in the tree of ARCHITECTURE.md but not there"


def test_every_tool_explains_itself() -> None:
    tools = sorted((ROOT / "tools").glob("*.py"))
    command = {tool: [sys.executable, str(tool), "--help"] for tool in tools}
    with ThreadPoolExecutor(4) as pool:
        run = partial(subprocess.run, capture_output=True, text=True, cwd="/", check=False)
        answers = dict(zip(tools, pool.map(run, command.values()), strict=True))
    for tool, done in answers.items():
        assert done.returncode == 0, f"{tool.name}: {done.stderr}"
        assert "usage" in done.stdout.lower(), tool.name


def test_scripts_are_sound() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "examples").rglob("*.sh")]
    for script in scripts:
        assert os.access(script, os.X_OK), f"{script} is not executable"
        assert "set -euo pipefail" in script.read_text(encoding="utf-8"), script
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_what_the_readme_says() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (
        shutil.which("make") is None
        or "pytest" in subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
