#!/usr/bin/env bash
# compute-sanitizer over a small selection of the GPU tests: every way through the kernels, forward and backward, on
# small tensors. Prints a line per tool; fails if a tool finds anything, or a test fails under it.
#   tests/gpu/sanitize.sh [--seconds N] [--logs FOLDER] [PYTEST_ARGUMENT...]
# Needs normcore in the Python of PYTHON (python3) and compute-sanitizer on the PATH, in CUDA_HOME or /usr/local/cuda.
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
seconds=600
logs=build/sanitizer
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=$2; shift 2 ;;
    --logs) logs=$2; shift 2 ;;
    *) break ;;
  esac
done
selection=("$@")
if [ ${#selection[@]} -eq 0 ]; then
  # Every path on plain calls; every epilogue, parameters per sample and masks on planes and rows of odd sizes, which take
  # every other way in a kernel.
  plain="test_small and (float32 or bfloat16)"
  fused="(test_epilogue or test_affine_map or test_mask or test_double) and bfloat16 and (odd or several_blocks or many_rows)"
  # What blocks hold together, on shapes that need several.
  teams="(test_every_path or test_relu_bits) and (cluster or team) and bfloat16 and (odd or several_blocks or rows)"
  selection=(tests/gpu/test_agreement.py -k "($plain) or ($fused) or ($teams)")
fi

PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer
if ! command -v compute-sanitizer >/dev/null; then
  echo "sanitizer: no compute-sanitizer on this machine" >&2
  exit 77
fi
mkdir -p "$logs"

# Other libraries' kernels are not what is looked at, and would take most of the time. Only initcheck has to see them:
# it takes for initialised what a kernel under its eyes has written.
filter=$(compute-sanitizer --help | grep -oE -m1 -- '--kernel-(regex|name) ' | tr -d ' ')
options=(--error-exitcode 99 --print-limit 20)
filter=${filter:+$filter kns=normcore}
echo "kernels that are looked at: ${filter:-all, as compute-sanitizer --help names no filter}; by initcheck all"

# check TOOL: runs the selection under it, and prints a line.
check() {
  local tool=$1 start=$SECONDS code verdict tests summary filter_options=()
  [ "$tool" = initcheck ] || read -ra filter_options <<<"$filter"
  # Every allocation its own, so that its end is an end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 NORMCORE_TEST_SEED=0 OMP_NUM_THREADS=1 timeout --kill-after 5 "$seconds" \
    compute-sanitizer --tool "$tool" "${options[@]}" "${filter_options[@]}" \
    "$python" -m pytest -q -p no:cacheprovider "${selection[@]}" >"$logs/$tool.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    99) verdict="FAILED, the tool found errors" ;;
    124 | 137) verdict="FAILED, out of time" ;;
    *) verdict="FAILED, exit code $code" ;;
  esac
  tests=$(grep -oE '[0-9]+ (passed|failed|skipped)[^=]*' "$logs/$tool.log" | tail -1)
  # With skipped tests nothing was looked at.
  if [ $code -eq 0 ] && ! grep -qE '[0-9]+ passed' "$logs/$tool.log"; then
    verdict="FAILED, no test ran"
    code=1
  fi
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1 | sed 's/^=* *//')
  printf '%-10s %4d s  %s: %s; %s\n' "$tool" $((SECONDS - start)) "$verdict" \
    "${tests:-no tests}" "${summary:-no summary}"
  [ $code -eq 0 ]
}

# The tools spend most of their time on the host: they run beside each other.
jobs=()
for tool in memcheck racecheck initcheck synccheck; do
  check "$tool" &
  jobs+=($!)
done
failed=0
for job in "${jobs[@]}"; do
  wait "$job" || failed=1
done
exit $failed
