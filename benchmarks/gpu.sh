#!/usr/bin/env bash
# One command for a machine with a GPU, torch and nvcc, without network: builds the library with CUDA kernels for the
# present device, runs the tests that need a device and the benchmark beside its peers. Every stage has its time; one
# that fails does not keep the next from running. Results in FOLDER: stages.json, benchmark.json, a log per stage.
#   benchmarks/gpu.sh [--output FOLDER] [--seconds N] [--stages LIST] [--paths LIST] [--sanitize] [--prebuilt]
#                     [--rehearse]
#     --output FOLDER   default build/gpu/results
#     --seconds N       for everything, default 530
#     --stages LIST     of build,gpu_tests,op_tests,benchmark, which is the default; or build,sanitize; besides limits,
#                       what the device allows (device_limits.cu), and profile, hardware counters (gpu_profile.py)
#     --paths LIST      of split,cluster,team: the benchmark measures these ways of our kernels too
#     --sanitize        short for --stages build,sanitize: the four tools of compute-sanitizer beside each other, on a
#                       selection of the tests. They share no run with other stages: they may take all of its time.
#     --prebuilt        build/gpu/site was made on another machine, for the same torch: the stage build only compiles
#                       the Python module for this machine's Python
#     --rehearse        where there is no device: the same stages; tests skip, the benchmark runs tiny cases on the CPU
# PYTHON is the interpreter with torch (python3), MAX_JOBS limits compile jobs, DEPENDENCIES is the folder that
# benchmarks/pack_dependencies.sh made (build/dependencies); without it the system's Highway is used. The build is kept
# in build/gpu. Exit code 0: every stage passed.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD

python=${PYTHON:-python3}
output=build/gpu/results
total=530
stages=build,gpu_tests,op_tests,benchmark
chosen=
sanitize=
paths=
prebuilt=
rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=$2; shift 2 ;;
    --seconds) total=$2; shift 2 ;;
    --stages) stages=$2; chosen=1; shift 2 ;;
    --paths) paths=$2; shift 2 ;;
    --sanitize) sanitize=1; shift ;;
    --prebuilt) prebuilt=1; shift ;;
    --rehearse) rehearse=1; shift ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
  esac
done
if [ -n "$sanitize" ]; then
  if [ -n "$chosen" ]; then
    echo "--sanitize is short for --stages build,sanitize: give one of --sanitize and --stages" >&2
    exit 2
  fi
  stages=build,sanitize
fi
if [[ ,$stages, = *,sanitize,* && ,$stages, =~ ,(gpu_tests|op_tests|benchmark), ]]; then
  echo "the stage sanitize needs the time of the others: run --stages build,sanitize apart from them" >&2
  exit 2
fi
mkdir -p "$output" build/gpu
output=$(cd "$output" && pwd)
rm -f "$output"/*.log "$output"/stages.json "$output"/benchmark.json

dependencies=${DEPENDENCIES:-$root/build/dependencies}
site=$root/build/gpu/site
export PYTHONPATH=$site:$dependencies/python${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
# cmake and ninja may be beside the interpreter, nvcc in its usual place.
PATH=$(dirname "$(command -v "$python")"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH

# Seconds of 530 that a stage may count on, whatever those before it take.
declare -A guaranteed=([build]=240 [gpu_tests]=60 [op_tests]=60 [sanitize]=240 [limits]=60 [benchmark]=90
  [profile]=60)
for stage in "${!guaranteed[@]}"; do
  guaranteed[$stage]=$((guaranteed[$stage] * total / 530))
done
declare -A status=() took=()
IFS=, read -ra order <<<"$stages"

limit_of() { # STAGE: what is left of the total, but for what later stages may count on
  local left=$((total - SECONDS)) later=0 stage
  for stage in "${order[@]}"; do
    [ $later = 0 ] || left=$((left - guaranteed[$stage]))
    [ "$stage" != "$1" ] || later=1
  done
  # A stage that follows slow ones still gets what is promised.
  echo $((left > guaranteed[$1] ? left : guaranteed[$1]))
}

architecture() { # of the present device, such as 90
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d '. ')
  echo "${capability:-90}"
}

build() {
  torch_root=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return
  if [ -n "$prebuilt" ]; then
    build_python_module || return
  else
    build_all || return
  fi
  cp python/normcore/*.py "$site/normcore/"
  cd build && "$python" -c 'import normcore; print(normcore.__file__, normcore.build_info())'
}

build_python_module() {
  local suffix headers
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))') || return
  rm -f "$site"/normcore/_C.*.so
  "${CXX:-g++}" -std=c++20 -O2 -shared -fPIC -fvisibility=hidden -isystem "$torch_root/include" \
    -isystem "$torch_root/include/torch/csrc/api/include" -isystem "$headers" \
    -I "$site/normcore/include" python/bindings/module.cpp -o "$site/normcore/_C$suffix" \
    -L "$site/normcore/lib" -lnormcore -L "$torch_root/lib" -ltorch_python -Wl,-rpath,'$ORIGIN/lib' \
    -Wl,--exclude-libs,ALL # a static libstdc++ must not stand in for that of the other libraries
}

build_all() {
  local options=() folder source
  for folder in highway googletest; do
    source=$dependencies/$folder
    [ ! -d "$source" ] || options+=("-DFETCHCONTENT_SOURCE_DIR_${folder^^}=$source")
  done
  # Configured again from the start: the tools and torch may be others than last time.
  rm -f build/gpu/cmake/CMakeCache.txt
  if command -v ccache >/dev/null; then
    options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  fi
  cmake -S . -B build/gpu/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_LIBDIR=lib \
    -DNORMCORE_PYTHON=ON -DNORMCORE_TESTS=OFF -DNORMCORE_CUDA=ON \
    "-DCMAKE_CUDA_ARCHITECTURES=$(architecture)-real" \
    "-DPython3_EXECUTABLE=$(command -v "$python")" "-DTORCH_ROOT=$torch_root" \
    -DFETCHCONTENT_FULLY_DISCONNECTED=ON "${options[@]}" || return
  cmake --build build/gpu/cmake --target normcore _C --parallel "${MAX_JOBS:-$(nproc)}" || return
  # A package folder like that of a wheel.
  rm -rf "$site"
  cmake --install build/gpu/cmake --prefix "$site/normcore"
}

# Several processes share the device and the processor's cores where pytest-xdist is installed.
pytest_arguments() {
  printf '%s\n' -v -p no:cacheprovider --config-file="$root/pyproject.toml"
  if "$python" -c 'import xdist' 2>/dev/null; then
    printf '%s\n' -n "$(($(nproc) < 6 ? $(nproc) : 6))"
  fi
}

run_pytest() {
  local arguments
  mapfile -t arguments < <(pytest_arguments)
  cd build && OMP_NUM_THREADS=1 "$python" -m pytest "${arguments[@]}" "$@"
}

gpu_tests() { run_pytest "$root/tests/gpu"; }

op_tests() { # the tests of the operators, on the device only
  run_pytest "$root/tests/python" --device cuda
}

sanitize() {
  PYTHON=$python tests/gpu/sanitize.sh --seconds "$((limit - 5))" --logs build/gpu/sanitizer
}

benchmark() {
  local options=(--seconds "$((limit - 25))" --paths "$paths" --output "$output/benchmark.json")
  if [ -n "$rehearse" ]; then
    options+=(--rehearse)
    export TRITON_INTERPRET=1
  fi
  "$python" benchmarks/gpu.py "${options[@]}"
}

limits() {
  command -v nvcc >/dev/null || return 77
  nvidia-smi >/dev/null 2>&1 || return 77
  nvcc -O3 -std=c++20 "-arch=sm_$(architecture)" benchmarks/device_limits.cu -o build/gpu/device_limits &&
    build/gpu/device_limits >"$output/limits.jsonl"
}

profile() {
  "$python" benchmarks/gpu_profile.py --output "$output/profile.json"
}

# What a stage's log says, in a line.
gist() {
  case $1 in
    *_tests) grep -E '[0-9]+ (passed|skipped|failed|error)' "$output/$1.log" | tail -1 ;;
    build) tail -1 "$output/$1.log" ;;
    sanitize) grep -cE 'passed: ' "$output/$1.log" | sed 's/$/ tools passed/' ;;
    limits) cat "$output/limits.jsonl" 2>/dev/null | wc -l | sed 's/$/ figures/' ;;
    benchmark) grep -E '^against' "$output/$1.log" | tr '\n' ';' ;;
  esac | cut -c 1-200
}

run_stage() {
  local stage=$1 start=$SECONDS code
  limit=$(limit_of "$stage")
  echo "=== $stage (at most $limit s)"
  # `timeout` ends a stage with everything that it started.
  export -f "$stage" run_pytest pytest_arguments architecture build_python_module build_all
  export python root output site dependencies paths prebuilt rehearse limit
  timeout --kill-after 5 "$limit" bash -uo pipefail -c "$stage" >"$output/$stage.log" 2>&1
  code=$?
  took[$stage]=$((SECONDS - start))
  case $code in
    0)
      status[$stage]=passed
      # Without a device every test is skipped, which only a rehearsal may call a success.
      if [[ $stage = *_tests && -z $rehearse ]] && ! gist "$stage" | grep -q passed; then
        status[$stage]="failed, no test ran"
      fi
      ;;
    77) status[$stage]="not possible here" ;;
    124 | 137) status[$stage]="out of time" ;;
    *) status[$stage]="failed with exit code $code" ;;
  esac
  echo "${status[$stage]} after ${took[$stage]} s: $(gist "$stage")"
}

for stage in "${order[@]}"; do
  if [ -z "${guaranteed[$stage]:-}" ]; then
    echo "no stage $stage" >&2
    exit 2
  fi
done
for stage in "${order[@]}"; do
  run_stage "$stage"
done

[ ! -f "$output/sanitize.log" ] || cat "$output/sanitize.log"
[ ! -f "$output/benchmark.log" ] || tail -n 150 "$output/benchmark.log"
printf '\n'
failed=0
{
  printf '{"rehearsal": %s, "architecture": "%s", "seconds": %d, "stages": {' \
    "$([ -n "$rehearse" ] && echo true || echo false)" "$(architecture)" "$SECONDS"
  separator=
  for stage in "${order[@]}"; do
    printf '%s\n  "%s": {"status": "%s", "seconds": %d}' "$separator" "$stage" "${status[$stage]}" "${took[$stage]}"
    separator=,
  done
  printf '\n}}\n'
} >"$output/stages.json"
for stage in "${order[@]}"; do
  printf '%5d s  %-10s %s: %s\n' "${took[$stage]}" "$stage" "${status[$stage]}" "$(gist "$stage")"
  case ${status[$stage]} in
    passed) ;;
    "not possible here") [ -n "$rehearse" ] || failed=1 ;;
    *) failed=1 ;;
  esac
done
printf '%5d s  in total\n' "$SECONDS"
exit $failed
