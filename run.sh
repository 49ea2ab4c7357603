#!/bin/sh
# ./run.sh [server flags]         installs what is missing into .venv, then becomes the server
# ./run.sh test [pytest flags]    the same for the tests
# This finds a Python, $PYTHON or python3, and run.py does the rest.

die() {
  printf 'run: %s\n' "$*" >&2
  exit 1
}

self=$(readlink -f -- "$0")
[ "${self##*/}" = run.sh ] || die "this script has to be started as a file: /where/it/is/run.sh" # not bash < run.sh
python=${PYTHON:-python3}
[ "${WHISPER_IN_IMAGE-}" != 1 ] || python=/opt/venv/bin/python
command -v "$python" >/dev/null ||
  die "$python not found: install Python 3.10 or newer (Debian, Ubuntu: sudo apt install python3 python3-venv)"
exec "$python" "$(dirname -- "$self")/run.py" "$@"
