#!/usr/bin/env bash
# setup_env.sh [COMMAND...]: makes .venv beside this file if it is missing or stale, then runs COMMAND in it.
#
#   bash setup_env.sh                                              the environment only
#   bash setup_env.sh pytest                                       the environment, then the tests
#   bash setup_env.sh python experiments/exp_000_quickstart/run.py
#
# TORCH_BUILD=auto|cpu|cuda   auto (default): a CUDA build of torch where nvidia-smi finds a GPU, else a CPU build
# PYTHON=python3.12           the interpreter; default: the first Python >= 3.11 among python3, python3.13, ...
#
# Packages come from where pip's own settings (pip config, PIP_*) and uv's say. Versions: constraints.txt.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$repo/.venv
stamp=$venv/nndecomp.stamp # written last and removed first: an environment without one is not whole, and made anew
torch_build=${TORCH_BUILD:-auto}

say() { echo "setup_env: $*" >&2; }
die() { say "$*"; exit 1; }
version_of() { "$@" -SEc 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null; }

case $torch_build in auto | cpu | cuda) ;; *) die "TORCH_BUILD=$torch_build is not one of auto, cpu, cuda" ;; esac

# The stamp is three lines: where the environment was made (scripts in .venv/bin hold the path, so a moved or copied
# checkout needs its own), what it was made from, and for which build of torch.
state() { echo "$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum) $(version_of "$venv/bin/python")"; }

current() {
  local place from build
  { read -r place && read -r from && read -r build; } 2>/dev/null <"$stamp" || return 1
  [ "$place" = "$repo" ] && [ "$from" = "$(state)" ] || return 1
  [ "$torch_build" = auto ] || [ "$torch_build" = "$build" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

find_python() { # sets python
  local candidate found
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    found=$(version_of "$candidate") || continue
    case $found in 3.[0-9].* | 3.10.* | [0-2].*) continue ;; esac
    python=$candidate
    return
  done
  found=$(version_of "${PYTHON:-python3}") || found="not there"
  die "Python 3.11 or newer is needed, but ${PYTHON:-python3} is $found. Name another one: PYTHON=python3.12 bash setup_env.sh"
}

find_uv() { # sets uv; makes .venv
  if uv pip install --help 2>/dev/null | grep -q -- --torch-backend; then
    uv=uv
    [ -x "$venv/bin/python" ] || uv venv -q --seed --python "$(command -v "$python")" "$venv" || die "uv venv failed"
  else
    uv=$venv/bin/uv
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
      die "$python -m venv failed. On Debian and Ubuntu it needs the package python3-venv"
    [ -x "$uv" ] || "$venv/bin/python" -m pip install -q 'uv>=0.7' || die "pip cannot install uv, which installs the rest"
  fi
}

find_sources() { # sets sources: pip's settings as options for uv, which does not read them
  local option
  sources=(--quiet)
  while read -r option; do
    case $option in
      --cert=*) export SSL_CERT_FILE=${option#--cert=} ;;
      *) sources+=("$option") ;;
    esac
  done < <("$python" -m pip config list 2>/dev/null | "$python" -c '
import ast, sys

settings = {}
for line in sys.stdin:
    key, equals, value = line.strip().partition("=")
    if equals:
        section, _, name = key.rpartition(".")
        settings.setdefault(section, {})[name] = ast.literal_eval(value)
merged = settings.get("global", {}) | settings.get("install", {}) | settings.get(":env:", {})
for name in ("cert", "index-url", "extra-index-url", "find-links"):
    for value in merged.get(name, "").split():
        print(f"--{name}={value}")
for value in merged.get("trusted-host", "").split():
    print(f"--allow-insecure-host={value}")
if merged.get("no-index", "").lower() in ("1", "true", "yes", "on"):
    print("--no-index")
if "extra-index-url" in merged:
    print("--index-strategy=unsafe-best-match")  # as pip: the best version of all indexes
')
}

fits() { "$uv" pip install --python "$venv/bin/python" "${sources[@]}" --dry-run --reinstall --no-deps "$@" 2>/dev/null; }

choose_torch() { # sets torch: requirements and options that make uv pick the wanted build; and build, for the stamp
  local pin
  pin=$(grep '^torch==' "$repo/constraints.txt")
  build=$torch_build
  if [ "$build" = auto ]; then
    build=cpu
    nvidia-smi -L 2>/dev/null | grep -q GPU && build=cuda
  fi
  case $build in
    cpu)
      torch=("$pin+cpu") && fits "${torch[@]}" && return
      torch=("$pin" --torch-backend=cpu) && fits "${torch[@]}" && return
      torch=("$pin")
      [ "$(uname)" = Darwin ] || say "no CPU build of torch can be reached; taking the index's, which brings CUDA along"
      ;;
    cuda)
      # Without a GPU at hand (a login node) uv cannot tell the driver; the index's own build is for CUDA.
      torch=("$pin" --torch-backend=auto) && nvidia-smi -L >/dev/null 2>&1 && fits "${torch[@]}" && return
      torch=("$pin,!=${pin#torch==}+cpu")
      ;;
  esac
}

install() {
  local action=updating
  find_python
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$repo" ] || [ "$(version_of "$venv/bin/python")" != "$(version_of "$python")" ]; then
    action=making
    rm -rf "$venv"
  fi
  say "$action .venv with Python $(version_of "$python")"
  rm -f "$stamp"
  find_uv
  find_sources
  choose_torch
  say "installing the package and its tools; torch: $build"
  # Compiled once, here: otherwise every process does it again where PYTHONDONTWRITEBYTECODE is set.
  "$uv" pip install --python "$venv/bin/python" "${sources[@]}" --compile-bytecode \
    -c "$repo/constraints.txt" -e "$repo[dev]" "${torch[@]}" || die "installing failed; run it again to start over"
  printf '%s\n' "$repo" "$(state)" "$build" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  say "ready after $SECONDS s"
}

if ! current; then
  (
    if command -v flock >/dev/null; then flock 9; fi
    if ! current; then install; fi # another call may have done it while this one waited
  ) 9>"$repo/.venv.lock"
fi

if [ $# -gt 0 ]; then
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  unset PYTHONHOME
  exec "$@"
fi
