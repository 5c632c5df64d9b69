# Sourced by demo.sh, test.sh and people: makes .venv with everything in requirements.txt, once per
# version of that file, and activates it. Interrupted set-ups are taken up again. It returns, never
# exits: the shell may be someone's own.
if ! cmp -s requirements.txt .venv/installed.txt; then
  interpreter=""
  for candidate in python3.12 python3.11 python3 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      interpreter=$candidate
      break
    fi
  done
  if [ -z "$interpreter" ]; then
    echo "error: Python 3.11 or newer is needed, and its venv module (Debian: apt install python3-venv)" >&2
    return 2
  fi
  echo "setting up .venv (once; about 2 GB to download with a GPU build of torch)" >&2
  # torch first and alone, so that no other package's range can pick a different build of it
  "$interpreter" -m venv .venv &&
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -o '^torch==[0-9.]*' requirements.txt)" &&
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt &&
    cp requirements.txt .venv/installed.txt || return
fi
source .venv/bin/activate
