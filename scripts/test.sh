#!/usr/bin/env bash
# Runs ruff, basedpyright and all tests except vLLM's in a new virtual environment. It doesn't stop at a failure.
#
#   bash scripts/test.sh                        the versions in scripts/pins/
#   bash scripts/test.sh transformers==5.19.0   the same, except for the named packages
#   bash scripts/test.sh --newest               the newest versions, except torch's: see scripts/pin.sh
#   bash scripts/test.sh --not-slow PACKAGE...  only the tests that are not marked slow, as CI does on older releases
set -euo pipefail
cd "$(dirname "$0")/.."
newest=false not_slow=false
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --newest) newest=true ;;
    --not-slow) not_slow=true ;;
    *) echo "scripts/test.sh: unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done
if ! $not_slow && [ ! -x /usr/bin/chromium ]; then
  echo "scripts/test.sh: the tests of app.py need /usr/bin/chromium: apt-get install chromium" >&2
  exit 1
fi
environment="${TEST_ENVIRONMENT:-.venv-test}"
end_to_end=(tests/test_app.py tests/test_serve.py tests/test_notebooks.py)
failed=()

check() {
  echo "== $*"
  "$@" || failed+=("$*")
}

replaced=$(printf "|%s==.*" "${@%%[=<>~!]*}")
use_pins() { # NAME: sets pip's constraints from here on
  cp scripts/pins/torch.txt "$environment/constraints.txt"
  if ! $newest; then
    grep --invert-match --line-regexp --extended-regexp "#.*$replaced" "scripts/pins/$1.txt" \
      >> "$environment/constraints.txt"
  fi
}

pip() { # recent versions of pip have separate constraints for builds
  PIP_CONSTRAINT="$environment/constraints.txt" PIP_BUILD_CONSTRAINT="$environment/constraints.txt" \
    "$environment/bin/pip" "$@"
}

python3 -m venv --clear "$environment"
use_pins test
# lmms-eval, to compare with. Its dependencies take gigabytes, and few of them are needed here.
check pip install --quiet --requirement tests/lmms_eval.txt --editable ".[test]" "$@"
check pip install --quiet --no-deps lmms-eval==0.7.3
pip list | grep -E "^(torch|transformers|pillow|numpy) "
# Two files at a time with one thread each: most tests wait for a process or for Python.
main=(env OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest --numprocesses 2 --dist loadfile "${end_to_end[@]/#/--ignore=}")
if $not_slow; then
  check "${main[@]}" -m "not slow"
else
  check "$environment/bin/ruff" check
  check "$environment/bin/ruff" format --check
  check "$environment/bin/basedpyright" --pythonpath "$environment/bin/python"
  check "${main[@]}"
  # These come last because Gradio requires an older Pillow, which resizes differently than the recorded outputs expect.
  use_pins end-to-end
  check pip uninstall --quiet --yes lmms-eval # otherwise pip reports its missing dependencies
  check pip install --quiet --editable ".[test,end-to-end]" "$@"
  check "$environment/bin/python" -m pytest "${end_to_end[@]}"
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf "FAILED: %s\n" "${failed[@]}" >&2
  exit 1
fi
