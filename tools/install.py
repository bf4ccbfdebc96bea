"""Install the package and the requirements of its tests, into a virtual environment or into the running Python.

    python3 tools/install.py --venv .venv      create the environment, and install the versions of constraints.txt
    python3 tools/install.py --venv system     install only missing packages, never torch, into the running Python

This runs before anything is installed, so it uses only the standard library, and no syntax that an old Python cannot parse
before it reaches `check_version`. If an environment is up to date, it does nothing.
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
MAX_PYTHON = (3, 14)  # the newest for which constraints.txt's version of torch has builds


class InstallError(Exception):
    """The installation failed; the message gives the reason."""


def pip(python, *arguments):
    """Run pip without showing its output; if it fails, InstallError has the output."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise InstallError("{}\n{}\n`{}` failed".format(done.stdout, done.stderr, " ".join(command)).strip())


def has_pip(python):
    """Return whether `python` exists and has pip, which an incomplete environment may lack."""
    command = [str(python), "-m", "pip", "--version"]
    return python.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def say(text):
    """Print a line and flush it."""
    print(text, flush=True)


def installation_digest(python_version):
    """Return a digest of everything that determines an installation."""
    digest = hashlib.sha256(f"{python_version} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "tools/install.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def check_version(venv):
    """Return why the running Python is unsuitable, in one line; None if it is suitable.

    With `system`, new versions of Python are accepted, since torch is already installed.
    """
    running = ".".join(map(str, sys.version_info[:3]))
    torch = re.search("torch==(.*)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
    oldest, newest = (".".join(map(str, version)) for version in (MIN_PYTHON, MAX_PYTHON))
    text = None
    if sys.version_info < MIN_PYTHON:
        text = f"Python {oldest} or newer is needed"
    elif venv != "system" and sys.version_info[:2] > MAX_PYTHON:
        text = f"torch {torch} needs Python {oldest} to {newest}"
    return text and f"{text}, {sys.executable} is {running}; name another: make PYTHON=python3.12 ..."


def check_same_python(venv, python):
    """Raise InstallError if an existing environment has another Python version than the running one, which it would not use."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    running = "{}.{}".format(*sys.version_info)
    if done.returncode == 0 and done.stdout.strip() != running:
        raise InstallError(
            f"{venv} is an environment of Python {done.stdout.strip()}, and {sys.executable} is {running}; "
            f"name another environment: make VENV=.venvs/{running} ..., or remove {venv}"
        )


def install_in_venv(venv):
    """Create the environment if it does not exist, and install everything into it."""
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        check_same_python(venv, python)
    stamp = venv / "megatron-installed"  # contains the digest of the last complete installation
    digest = installation_digest(sys.version)
    if python.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    if not has_pip(python):
        say(f"creating {venv}")
        done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False)
        if done.returncode:
            advice = "cannot create an environment (on Debian and Ubuntu: install python3-venv)"
            raise InstallError(f"{done.stdout}{done.stderr}\n{sys.executable} {advice}")
    # torch first, at its exact version: otherwise pip's resolver may choose a build of several gigabytes.
    say("installing torch (the large download)")
    pip(python, "install", "-c", "constraints.txt", "torch", "setuptools")
    say("installing megatron and its other requirements")
    if has_old_name(python):  # otherwise the project would be installed twice
        pip(python, "uninstall", "--yes", OLD_NAME)
    pip(python, "install", "-c", "constraints.txt", "-e", ".[dev]")
    stamp.write_text(digest)


def distribution_name(requirement):
    """Return the normalized package name in a requirement such as `tokenizers>=0.20` or `megatron-plain[hf]`."""
    name = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
    return name.lower().replace("_", "-").replace(".", "-")


def list_requirements(extra, project):
    """Yield the requirements of an extra, and recursively those of other extras that it names as `PROJECT[hf,zstd]`."""
    for requirement in project["optional-dependencies"][extra]:
        other_extras = re.match(re.escape(project["name"]) + r"\[(.*)\]", requirement)
        if other_extras is None:
            yield requirement
        for other in other_extras[1].split(",") if other_extras else ():
            yield from list_requirements(other.strip(), project)


OLD_NAME = "megatron"  # package name of earlier versions of this project


def has_old_name(python):
    """Return whether this checkout is installed under its old name. Other packages of that name do not count."""
    code = "from importlib.metadata import distribution as d; print(d('" + OLD_NAME + "').read_text('direct_url.json') or '')"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return '"' + ROOT.as_uri() + '"' in found.stdout


def install_in_place():
    """Install missing packages into the running Python; installed packages keep their versions."""
    import tomllib  # these do not exist in the old versions that `check_version` has refused
    from importlib import metadata

    present = {distribution_name(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    if "torch" not in present:
        raise InstallError(f"VENV=system uses the torch of {sys.executable}, which has none; install it, or leave out VENV=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *list_requirements("dev", project)]
    missing = [r for r in requirements if distribution_name(r) != project["name"] and distribution_name(r) not in present]
    if missing:
        say("installing " + ", ".join(sorted({distribution_name(r) for r in missing})))
        pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
        constraint_lines = [pin for pin in pins if distribution_name(pin) not in present]
        constraint_lines += [f"{name}=={version}" for name, version in sorted(present.items()) if name != project["name"]]
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(constraint_lines) + "\n", encoding="utf-8")
            pip(sys.executable, "install", "-c", constraints, *missing)
    if project["name"] not in present and not has_old_name(sys.executable):
        say("installing megatron")
        pip(sys.executable, "install", "--no-deps", "-e", ".")


def main():
    """Run the tool, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=".venv", help="directory of the environment, or `system`")
    venv = parser.parse_args().venv
    reason = check_version(venv)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
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
