#!/bin/sh
# Make .venv hold the pinned set and this package. Silent and quick when it does already.
#
# .venv/set-up-for is written last and holds all that .venv was made from: no such file means an unfinished set-up,
# another content means an outdated one. PYTHON names the interpreter; without it, the first good one on PATH.
set -u
cd "$(dirname "$0")/.." || exit 1
stamp=.venv/set-up-for
log=.venv/pip.log
venv_python=.venv/bin/python
PYTHON=${PYTHON:-}

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

version() { "$1" -IS -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# The folder is part of it: an editable install points to it.
made_from() { pwd; version "$venv_python"; cat requirements.txt pyproject.toml; }

right_python() { [ -z "$PYTHON" ] || [ "$(version "$PYTHON")" = "$(version "$venv_python")" ]; }

ready() { [ -f "$stamp" ] && [ "$(made_from)" = "$(cat "$stamp")" ] && right_python; }

# Prints the interpreter to make .venv with: never one inside .venv itself, which may be removed.
find_python() {
    if [ -n "$PYTHON" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    for candidate in "$@"; do
        "$candidate" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null && return
    done
    return 1
}

# Prints the Debian packages that this machine lacks: the venv module, and what torch.compile builds C++ code with.
missing_packages() {
    "$1" - <<'END'
import os, sys, sysconfig
python = "python%d.%d" % sys.version_info[:2]
try:
    import ensurepip, venv
    ensurepip.version()
except Exception:
    print(python + "-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print(python + "-dev")
END
    command -v "${CXX:-g++}" >/dev/null || echo g++
}

# One sentence on why pip failed, out of its log.
explain_pip() {
    if grep -qi 'no space left' "$log"; then
        fail "The disk is full: .venv takes 2.5 GB with the CPU build of torch, 6 GB with the CUDA build. Free some space" \
            "(here, in pip's cache or in \$TMPDIR) and call make again."
    elif grep -qiE 'failed to establish|connect ?timeout|connection ?error|name resolution|proxy ?error|ssl ?error|timed out|unreachable|connection (refused|reset|broken|aborted)|RemoteDisconnected' "$log"; then
        fail "pip could not reach its package index: check the network, a proxy, and the index that 'pip config list'" \
            "names, then call make again. Finished downloads are kept."
    elif wanted=$(grep -o 'No matching distribution found for .*' "$log" | tail -n 1) && [ -n "$wanted" ]; then
        fail "$wanted: pip's index has no build of it for Python $(version "$venv_python") on this machine." \
            "The pinned set is for Python 3.11 to 3.13 on Linux; name another with make PYTHON=..."
    else
        reason=$(grep -E 'ERROR|error' "$log" | tail -n 1 | cut -c 25-)
        fail "pip failed: ${reason:-it was stopped from outside}. All it did is in $log; the next make starts anew."
    fi
}

ready && exit 0

# Says what the system says: a read-only disk, a full one, no permission.
probe=$(mktemp -d ./.probe.XXXXXX 2>&1) || fail "$(pwd) cannot be written (${probe##*: }), and .venv belongs there: make" \
    "it writable, or clone this repository elsewhere."
rmdir "$probe"

# Two makes at once take turns. The lock goes when this script ends.
if command -v flock >/dev/null; then
    exec 9<requirements.txt
    flock -n 9 || { say "Another make is setting up .venv: waiting for it."; flock 9; }
    ready && exit 0
fi

trap 'say "Set-up was stopped: the next make finishes it."; exit 130' INT TERM

if [ -f "$stamp" ] && [ -n "$(version "$venv_python")" ] && right_python; then
    say "requirements.txt, pyproject.toml or the folder changed: updating .venv."
    rm "$stamp"
else
    python=$(find_python) || fail "These lessons need Python 3.11 or newer, and ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo missing): install one (Debian, Ubuntu: sudo apt install" \
        "python3 python3-venv python3-dev) or name one, as in make run PYTHON=python3.12."
    missing=$(missing_packages "$python" | tr '\n' ' ')
    [ -z "$missing" ] || fail "Missing on this machine: ${missing% }. On Debian or Ubuntu: sudo apt install ${missing% }" \
        "(torch.compile builds C++ code), then call make again."
    # pip leaves half-written packages when it is killed, and cannot tell. Its cache makes a new start cheap.
    [ ! -e .venv ] || say ".venv is unfinished or for another Python: making it anew."
    rm -rf .venv
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge 2500 ] || fail "Only $free_mb MB are free here, and .venv takes 2.5 GB with the CPU build of torch," \
        "6 GB with the CUDA build: free some space and call make again."
    [ "$free_mb" -ge 6000 ] || say "Note: $free_mb MB are free; the CUDA build of torch needs 6000 MB, the CPU build 2500 MB."
    say "Making .venv with $python."
    "$python" -m venv .venv || fail "$python -m venv failed, as it says above."
fi

made_from=$(made_from)
say "Installing requirements.txt: one to ten minutes the first time."
pip() { "$venv_python" -m pip --disable-pip-version-check --log "$log" "$@"; }
# Older ones are silent for a minute while they install.
pip install --quiet 'pip>=25.1' || explain_pip
# Python compiles what is imported, when it is: all of it takes half a minute.
pip install -r requirements.txt --no-compile || explain_pip
# The build tool is in the pinned set: nothing else is fetched. It warns that an editable install reads this folder.
PYTHONWARNINGS=ignore pip install --quiet --no-deps --no-build-isolation -e . || explain_pip
# matplotlib builds its font cache once. On a slow machine it says so, which would land in a lesson's output.
"$venv_python" -c 'import matplotlib.font_manager' 2>/dev/null
printf '%s\n' "$made_from" >"$stamp" || fail "Cannot write $stamp: free some space and call make again."
rm -f "$log"
say "Set-up is done."
