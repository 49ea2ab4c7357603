"""Fetches a source distribution with pip's own finder and settings, and runs nothing of it.

    fetch.py NAME VERSION SHA256 DIRECTORY

`pip download` would run its setup.py to learn what it needs.
"""

import hashlib
import logging
import sys
from pathlib import Path

from pip._internal.commands import create_command

name, version, sha256, directory = sys.argv[1:]
logging.disable(logging.WARNING)  # of an index that lacks it
command = create_command("download")
options, _ = command.parse_args(["--no-binary", ":all:", "--no-deps", name])
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options=options, session=session)
    found = [one for one in finder.find_all_candidates(name) if str(one.version) == version]
    if not found:
        sys.exit(f"the package index has no {name} {version}")
    answer = session.get(found[0].link.url_without_fragment)
    answer.raise_for_status()
if hashlib.sha256(answer.content).hexdigest() != sha256:
    sys.exit(f"{found[0].link.filename} is not the file that is expected (SHA-256 differs)")
Path(directory, found[0].link.filename).write_bytes(answer.content)
