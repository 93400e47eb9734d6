"""The set-up script on machines that are not this one: commands are replaced by scripts that write down their calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PYTHON = """#!/bin/bash
here="$(cd "$(dirname "$0")/.." && pwd)"
case "$*" in
  *ensurepip*) [ ! -e "$STATE/no-venv" ]; exit ;;
  *"sys.version_info < "*) [ ! -e "$STATE/old-python" ]; exit ;;
  *get_path*) echo "$STATE/include" ;;
  *"python%d.%d"*) echo python3.11 ;;
  *"%d.%d"*) echo 3.11 ;;
  -VV) echo "Python 3.11.0" ;;
  "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; echo "venv" >>"$STATE/calls" ;;
  *"pip install"*ffcv==*) echo "pip ffcv" >>"$STATE/calls"
    [ ! -e "$STATE/ffcv-breaks" ] || exit 1
    mkdir -p "$here/lib/python3.11/site-packages/ffcv-1.0.2.dist-info" ;;
  *"pip install"*) echo "pip requirements" >>"$STATE/calls"; [ ! -e "$STATE/offline" ] || exit 1 ;;
  *"import torch, cv2, ffcv"*) [ ! -e "$STATE/ffcv-broken" ]; exit ;;
esac
"""

COMMANDS = {
    "python3": PYTHON,
    "id": '#!/bin/bash\n[ -e "$STATE/root" ] && echo 0 || echo 1000\n',
    "sudo": '#!/bin/bash\n[ -e "$STATE/sudo" ] || exit 1\nshift\n"$@"\n',
    "g++": '#!/bin/bash\n[[ "$*" != *fsyntax-only* || ! -e "$STATE/no-jpeg" ]]\n',
    "make": '#!/bin/bash\n[[ "$*" == *update ]] && what=update || what=native\n'
    '[ "$1" != -q ] || { [ -e "$STATE/$what" ]; exit; }\n'
    'echo "make $what" >>"$STATE/calls"\n[ ! -e "$STATE/$what-breaks" ] && touch "$STATE/$what"\n',
    "apt-cache": "#!/bin/bash\n[[ \"$*\" == *turbojpeg0* ]] && [ -e \"$STATE/old-ubuntu\" ] && exit 1\nexit 0\n",
    "apt-get": '#!/bin/bash\necho "apt-get ${*:4}" >>"$STATE/calls"\n'
    '[[ "$*" != *install* ]] || touch "$STATE/packages"\n[[ "$*" != *libjpeg* ]] || rm "$STATE/no-jpeg"\n',
    "pkg-config": '#!/bin/bash\n[ -e "$STATE/packages" ]\n',
}  # fmt: skip


class Machine:
    """A copy of the set-up files in an empty folder, and a PATH of replaced commands."""

    def __init__(self, folder: Path, *facts: str) -> None:
        self.clone, self.state, bin = folder / "clone", folder / "state", folder / "bin"
        for made in (self.clone / ".ci", self.state / "include", bin):
            made.mkdir(parents=True)
        for name in ("setup.sh", "requirements-dev.txt"):
            shutil.copy(ROOT / ".ci" / name, self.clone / ".ci" / name)
        shutil.copy(ROOT / "requirements.txt", self.clone)
        for name, text in COMMANDS.items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        (self.state / "include" / "Python.h").touch()
        for fact in facts:
            (self.state / fact).touch()
        self.env = {"PATH": f"{bin}:{os.environ['PATH']}", "STATE": str(self.state), "HOME": str(folder)}

    def setup(self, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the script as make does."""
        return subprocess.run(
            ["bash", ".ci/setup.sh"], cwd=self.clone, env={**self.env, **env}, capture_output=True, text=True
        )

    def calls(self) -> list[str]:
        """What was called since the last time this was asked."""
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


def test_everything_is_there_once_and_the_second_call_does_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages")
    assert machine.setup().returncode == 0
    assert machine.calls() == ["venv", "pip requirements", "pip ffcv", "make update", "make native"]
    done = machine.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.calls() == []


def test_changed_requirements_are_installed_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages")
    machine.setup()
    machine.calls()
    with open(machine.clone / "requirements.txt", "a") as handle:
        handle.write("tensorboard>=2.16\n")
    assert machine.setup().returncode == 0
    assert machine.calls() == ["pip requirements"]


@pytest.mark.parametrize("right", ["root", "sudo"])
def test_missing_system_packages_are_installed_where_that_is_allowed(tmp_path: Path, right: str) -> None:
    machine = Machine(tmp_path, right)
    assert machine.setup().returncode == 0
    calls = machine.calls()
    assert calls[:3] == ["venv", "pip requirements", "apt-get update"]
    assert calls[3] == "apt-get install -y --no-install-recommends libopencv-dev libturbojpeg0-dev"
    assert calls[4:] == ["pip ffcv", "make update", "make native"]


def test_without_the_right_one_line_says_what_to_ask_for_and_setup_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.setup()
    assert machine.calls() == ["venv", "pip requirements", "make update"]
    done = machine.setup()
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert "administrator" in line
    assert line.endswith("apt-get install libopencv-dev libturbojpeg0-dev")
    assert "torchvision loader" in line
    (machine.state / "packages").touch()
    assert machine.setup().returncode == 0
    assert machine.calls() == ["pip ffcv", "make native"]


def test_system_no_asks_nobody(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "root")
    assert "administrator" in machine.setup(SYSTEM="no").stdout
    assert machine.calls() == ["venv", "pip requirements", "make update"]


def test_the_native_decoder_gets_its_headers_where_that_is_allowed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages", "root", "no-jpeg")
    assert machine.setup().returncode == 0
    assert machine.calls()[2:] == [
        "pip ffcv", "make update", "apt-get update",
        "apt-get install -y --no-install-recommends libjpeg62-turbo-dev", "make native",
    ]  # fmt: skip
    assert machine.setup().stdout == ""
    assert machine.calls() == []


def test_without_headers_or_a_build_one_line_tells_and_setup_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages", "no-jpeg", "native-breaks")
    machine.setup()
    assert "make native" not in machine.calls()
    done = machine.setup()
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert line.endswith("ask the administrator for: apt-get install libjpeg62-turbo-dev")
    (machine.state / "no-jpeg").unlink()
    done = machine.setup()
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert "could not be built" in line
    assert machine.calls() == ["make native"]


def test_without_the_native_update_one_line_tells_and_setup_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages", "update-breaks")
    machine.setup()
    done = machine.setup()
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert "native optimizer step" in line
    (machine.state / "update-breaks").unlink()
    assert machine.setup().stdout == ""


def test_old_ubuntu_names_turbojpeg_otherwise(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "old-ubuntu")
    assert machine.setup().stdout.strip().endswith("libopencv-dev libturbojpeg-dev")


@pytest.mark.parametrize("fault", ["ffcv-breaks", "ffcv-broken"])
def test_a_failed_build_is_told_and_not_tried_again(tmp_path: Path, fault: str) -> None:
    machine = Machine(tmp_path, "packages", fault)
    done = machine.setup()
    assert done.returncode == 0
    assert "FFCV could not be built" in done.stdout
    assert machine.calls()[:3] == ["venv", "pip requirements", "pip ffcv"]
    shutil.rmtree(machine.clone / ".venv" / "lib", ignore_errors=True)
    assert len(machine.setup().stdout.splitlines()) == 1
    assert machine.calls() == []
    (machine.state / fault).unlink()
    (machine.clone / ".venv" / ".ffcv-failed").unlink()
    assert machine.setup().stdout.splitlines() == ["setup: building FFCV"]


def test_no_network_fails_and_is_tried_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "packages", "offline")
    done = machine.setup()
    assert done.returncode == 1
    assert "pip could not install" in done.stderr
    (machine.state / "offline").unlink()
    machine.calls()
    assert machine.setup().returncode == 0
    assert machine.calls() == ["pip requirements", "pip ffcv", "make update", "make native"]


@pytest.mark.parametrize(
    ("fact", "words"), [("old-python", "Python 3.10"), ("no-venv", "apt-get install python3.11-venv")]
)
def test_what_cannot_be_mended_stops_with_one_line(tmp_path: Path, fact: str, words: str) -> None:
    machine = Machine(tmp_path, fact)
    done = machine.setup(PYTHON="python3")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert words in line
    assert machine.calls() == []


def test_no_build_of_ffcv_failed_here() -> None:
    """All tests of its loader would be skipped."""
    failed = Path(sys.prefix) / ".ffcv-failed"
    assert not failed.exists(), f"FFCV could not be built; {sys.prefix}/setup.log says why"
