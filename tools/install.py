"""Install the package and what its tests need: into a new environment, or what is missing into the Python at hand.

    python3 tools/install.py --venv .venv      create the environment, install the versions of constraints.txt
    python3 tools/install.py --venv system     the Python that runs this: add only what it lacks, never torch

Runs before anything is installed, so it uses the standard library alone, and no syntax newer than its own version test.
When nothing changed since the last time it returns at once.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 14)  # the last one that the torch of constraints.txt has builds for


class InstallError(Exception):
    """The installation cannot be made; the message says why."""


def pip(python, *arguments):
    """Run pip quietly. InstallError with its own output when it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise InstallError("{}\n{}\n`{}` failed".format(done.stdout, done.stderr, " ".join(command)).strip())


def has_pip(python):
    """Return whether `python` is there and can install; a half-made environment cannot."""
    command = [str(python), "-m", "pip", "--version"]
    return python.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def say(text):
    """Print a line at once."""
    print(text, flush=True)


def installation_digest(python_version):
    """Return a text that changes whenever an installation would come out differently."""
    digest = hashlib.sha256(f"{python_version} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "tools/install.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def check_version(venv):
    """Return why the Python that runs this will not do, in one line, or None. With `system` its torch is there already."""
    found = ".".join(map(str, sys.version_info[:3]))
    torch = re.search("torch==(.*)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
    oldest, newest = (".".join(map(str, version)) for version in (MIN_PYTHON, MAX_PYTHON))
    text = None
    if sys.version_info < MIN_PYTHON:
        text = f"Python {oldest} or newer is needed"
    elif venv != "system" and sys.version_info[:2] > MAX_PYTHON:
        text = f"torch {torch} needs Python {oldest} to {newest}"
    return text and f"{text}, {sys.executable} is {found}; name another: make PYTHON=python3.12 ..."


def check_same_python(venv, python):
    """Refuse an environment of another Python: it keeps the one that created it, and ours would be passed over in silence."""
    ask = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False)
    asked = "{}.{}".format(*sys.version_info)
    if done.returncode == 0 and done.stdout.strip() != asked:
        raise InstallError(
            f"{venv} is an environment of Python {done.stdout.strip()}, and {sys.executable} is {asked}; "
            f"name another environment: make VENV=.venvs/{asked} ..., or remove {venv}"
        )


def install_in_venv(venv):
    """Create `venv` if need be and install everything into it."""
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        check_same_python(venv, python)
    stamp = venv / "megatron-installed"
    wanted = installation_digest(sys.version)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    if not has_pip(python):
        say(f"creating {venv}")
        done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False)
        if done.returncode:
            advice = "cannot create an environment (on Debian and Ubuntu: install python3-venv)"
            raise InstallError(f"{done.stdout}{done.stderr}\n{sys.executable} {advice}")
    # torch first, at its exact version: a resolver that may choose takes a build of several gigabytes.
    say("installing torch (the large download)")
    pip(python, "install", "-c", "constraints.txt", "torch", "setuptools")
    say("installing megatron and its other needs")
    if has_old_name(python):  # or one project would be there twice
        pip(python, "uninstall", "--yes", OLD_NAME)
    pip(python, "install", "-c", "constraints.txt", "-e", ".[dev]")
    stamp.write_text(wanted)


def distribution_name(requirement):
    """Return the bare, normalised name of `tokenizers>=0.20` or `megatron-plain[hf]`."""
    name = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
    return name.lower().replace("_", "-").replace(".", "-")


def list_requirements(extra, project):
    """Yield the requirements of an extra and of those that it names in turn, as `NAME[hf,zstd]` of this very project."""
    for requirement in project["optional-dependencies"][extra]:
        named = re.match(re.escape(project["name"]) + r"\[(.*)\]", requirement)
        if named is None:
            yield requirement
        for other in named[1].split(",") if named else ():
            yield from list_requirements(other.strip(), project)


OLD_NAME = "megatron"  # under which earlier versions of this project were installed


def has_old_name(python):
    """Return whether this checkout is installed under its old name. A package of that name from elsewhere is another."""
    code = "from importlib.metadata import distribution as d; print(d('" + OLD_NAME + "').read_text('direct_url.json') or '')"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return '"' + ROOT.as_uri() + '"' in found.stdout


def install_in_place():
    """Add to the running Python what it lacks. Everything it has keeps its version."""
    import tomllib  # neither is there in the old versions that main() has ruled out by now
    from importlib import metadata

    present = {distribution_name(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    if "torch" not in present:
        raise InstallError(f"VENV=system uses the torch of {sys.executable}, which has none; install it, or leave VENV= away")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *list_requirements("dev", project)]
    missing = [r for r in listed if distribution_name(r) != project["name"] and distribution_name(r) not in present]
    if missing:
        say("installing " + ", ".join(sorted({distribution_name(r) for r in missing})))
        pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
        kept = [pin for pin in pins if distribution_name(pin) not in present]
        kept += [f"{name}=={version}" for name, version in sorted(present.items()) if name != project["name"]]
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
            pip(sys.executable, "install", "-c", constraints, *missing)
    if project["name"] not in present and not has_old_name(sys.executable):
        say("installing megatron")
        pip(sys.executable, "install", "--no-deps", "-e", ".")


def main():
    """Run the tool, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=".venv", help="directory of the environment, or `system`")
    venv = parser.parse_args().venv
    unfit = check_version(venv)
    if unfit:
        print(f"error: {unfit}", file=sys.stderr)
        return 2
    try:
        if venv == "system":
            install_in_place()
        else:
            install_in_venv(Path(venv) if Path(venv).is_absolute() else ROOT / venv)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
