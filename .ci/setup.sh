#!/usr/bin/env bash
# Sets up what is missing, and nothing else: the virtual environment, its packages, FFCV and what FFCV is built with.
#   VENV=.venv  PYTHON=python3.x  SYSTEM=no (install no system packages)  LOWEST=yes (lowest versions allowed)
#   TESTS=yes (also what tests start: SLURM, iproute2)
# FFCV is optional: without it one line says what to ask for, and training takes the torchvision loader. So is the native
# code: without its decoder FFCV decodes by itself, without its optimizer step torch takes one, slower.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
LOWEST="${LOWEST:-no}"
FFCV="ffcv==1.0.2"
LOG="$VENV/setup.log"

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

# --- system packages ---------------------------------------------------------------------------------------------

# Prints the command prefix under which packages may be installed without a question; fails when there is none.
administrator() {
  [ "${SYSTEM:-yes}" != no ] && command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" = 0 ]; then
    echo env
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    echo "sudo -n env"
  else
    return 1
  fi
}

# install_system NAME...: apt-get, when allowed. Fails without a word otherwise.
install_system() {
  local prefix apt
  prefix="$(administrator)" || return 1
  apt="$prefix DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120"
  say "installing system packages: $*"
  $apt update </dev/null >>"$SYSTEM_LOG" 2>&1 || true # a stale list may still do; install says if not
  $apt install -y --no-install-recommends "$@" </dev/null >>"$SYSTEM_LOG" 2>&1
}

turbojpeg_package() { # Debian and newer Ubuntu: libturbojpeg0-dev; others: libturbojpeg-dev
  if apt-cache show libturbojpeg0-dev >/dev/null 2>&1 || ! apt-cache show libturbojpeg-dev >/dev/null 2>&1; then
    echo libturbojpeg0-dev
  else
    echo libturbojpeg-dev
  fi
}

# Prints the packages FFCV's build still lacks, by their Debian names.
missing_for_ffcv() {
  local headers version
  headers="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  version="$("$VENV/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
  command -v g++ >/dev/null || echo g++
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
  pkg-config --exists libturbojpeg 2>/dev/null || turbojpeg_package
  [ -e "$headers/Python.h" ] || echo "$version-dev"
}

jpeg_package() { # Debian: libjpeg62-turbo-dev; Ubuntu: libjpeg-turbo8-dev
  if apt-cache show libjpeg62-turbo-dev >/dev/null 2>&1 || ! apt-cache show libjpeg-turbo8-dev >/dev/null 2>&1; then
    echo libjpeg62-turbo-dev
  else
    echo libjpeg-turbo8-dev
  fi
}

# Prints the packages the native decoder's build still lacks; what FFCV was built with is there.
missing_for_native() {
  g++ -fsyntax-only -x c++ - <<<$'#include <cstdio>\n#include <jpeglib.h>' 2>/dev/null || jpeg_package
}

# --- stages ------------------------------------------------------------------------------------------------------

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  "$VENV/bin/python" -c "import pip" 2>/dev/null && return
  local python version
  python="$(find_python)" || die "Python 3.10 or newer is needed; install it, or name one: make PYTHON=/path/to/python3 setup"
  version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && ! install_system "python$version-venv"; then
    die "Python's venv module is missing; ask the administrator for: apt-get install python$version-venv"
  fi
  say "creating $VENV with $python ($version)"
  "$python" -m venv --clear "$VENV"
}

# Everything the installed packages depend on; setup is redone when it changes.
fingerprint() {
  cat requirements.txt .ci/requirements-dev.txt .ci/setup.sh | sha256sum | cut -d' ' -f1
  "$VENV/bin/python" -VV
  echo "lowest: $LOWEST"
}

install_packages() {
  local extra=() quiet=(-q)
  [ -t 1 ] && quiet=()
  if [ "$LOWEST" = yes ]; then
    sed -E 's/#.*//; s/>=[[:space:]]*([0-9.]+)[^;]*/==\1/' requirements.txt >"$VENV/lowest.txt"
    extra=(-c "$VENV/lowest.txt")
  fi
  say "installing Python packages into $VENV (the first time: about 3 GB to download, a few minutes)"
  "$VENV/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input --prefer-binary \
    -r requirements.txt -r .ci/requirements-dev.txt "${extra[@]}" </dev/null ||
    die "pip could not install requirements.txt; see its lines above"
}

ffcv_installed() { compgen -G "$VENV/lib/python*/site-packages/ffcv-*info" >/dev/null; }

ffcv_works() { "$VENV/bin/python" -c 'import torch, cv2, ffcv' </dev/null >>"$LOG" 2>&1; }

# Builds FFCV once per state of the machine; a failure is remembered until packages change.
install_ffcv() {
  ffcv_installed && return
  local missing state
  missing="$(missing_for_ffcv | xargs)"
  # shellcheck disable=SC2086  # a list of words
  if [ -n "$missing" ] && install_system $missing; then
    missing="$(missing_for_ffcv | xargs)"
  fi
  if [ -n "$missing" ]; then
    say "no FFCV, the slower torchvision loader is used; ask the administrator for: apt-get install $missing"
    return
  fi
  state="$(fingerprint)"
  if [ "$(cat "$VENV/.ffcv-failed" 2>/dev/null)" != "$state" ]; then
    say "building FFCV"
    if "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-cache-dir \
      --no-build-isolation --no-deps "$FFCV" </dev/null >>"$LOG" 2>&1 && ffcv_works; then
      rm -f "$VENV/.ffcv-failed"
      return
    fi
    "$VENV/bin/python" -m pip uninstall -q -y ffcv </dev/null >>"$LOG" 2>&1 || true
    echo "$state" >"$VENV/.ffcv-failed"
  fi
  say "FFCV could not be built, the slower torchvision loader is used; $LOG says why (remove $VENV/.ffcv-failed to try again)"
}

# What some tests need and are skipped without: a real SLURM, and network namespaces.
install_for_tests() {
  local missing=()
  command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || missing+=(slurm-wlm)
  command -v munged >/dev/null || [ -x /usr/sbin/munged ] || missing+=(munge)
  command -v ip >/dev/null || [ -x /sbin/ip ] || missing+=(iproute2)
  if [ "${#missing[@]}" -gt 0 ] && ! install_system "${missing[@]}"; then
    say "tests on SLURM and between hosts will be skipped; ask the administrator for: apt-get install ${missing[*]}"
  fi
}

# Builds the optimizer step of utils/native where it is missing or older than its sources.
install_update() {
  make -q -C utils/native update >/dev/null 2>&1 && return
  if ! command -v g++ >/dev/null; then
    say "no native optimizer step, masks take passes of their own, slower; ask the administrator for: apt-get install g++"
  elif ! make -C utils/native update >>"$LOG" 2>&1; then
    say "the native optimizer step could not be built, masks take passes of their own, slower; $LOG says why"
  fi
}

# The same for the decoder.
install_native() {
  ffcv_installed || return 0
  make -q -C utils/native >/dev/null 2>&1 && return
  local missing
  missing="$(missing_for_native)"
  if [ -n "$missing" ] && install_system "$missing"; then
    missing="$(missing_for_native)"
  fi
  if [ -n "$missing" ]; then
    say "no native decoder, FFCV decodes by itself, slower; ask the administrator for: apt-get install $missing"
  elif ! make -C utils/native >>"$LOG" 2>&1; then
    say "the native decoder could not be built, FFCV decodes by itself, slower; $LOG says why"
  fi
}

exec 9<.
flock 9 # one set-up of this clone at a time
SYSTEM_LOG="$(mktemp)"
trap 'rm -f "$SYSTEM_LOG"' EXIT
make_venv
if [ "$(cat "$VENV/.stamp" 2>/dev/null)" != "$(fingerprint)" ]; then
  rm -f "$VENV/.stamp"
  install_packages
  fingerprint >"$VENV/.stamp"
fi
install_ffcv
install_update
install_native
if [ "${TESTS:-no}" = yes ]; then install_for_tests; fi
if [ -s "$SYSTEM_LOG" ]; then cat "$SYSTEM_LOG" >>"$LOG"; fi
