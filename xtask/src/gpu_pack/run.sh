#!/usr/bin/env bash
# Runs what `cargo xtask gpu-pack` has put beside this file, on a machine with a GPU: no Rust, no network, nothing to
# install. `./run.sh` runs everything; `./run.sh NAME...` only what has one of the names.
#
# Libraries are looked for beside this file (lib/), in the nvidia packages of python3, and where the system looks.
# GPU_REQUIRED=0 lets tests that lack something pass as NOT RUN; by default they fail.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GPU_REQUIRED=${GPU_REQUIRED:-1} RUST_BACKTRACE=${RUST_BACKTRACE:-1}
# Kernels that were compiled with the pack; what is missing there is compiled by NVRTC and kept.
export PHALANX_KERNEL_CACHE=${PHALANX_KERNEL_CACHE:-$here/cubin}
export PHALANX_ROOT=${PHALANX_ROOT:-$here/root} PHALANX_BIN=$here/bin/phalanx
# Ranks that share the GPU: NCCL since 2.30.3 lets them, without NVLink's multicast and with one block each. Kernels are
# loaded before any of them waits for another.
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=1 NCCL_GRAPH_REGISTER=0 CUDA_MODULE_LOADING=EAGER
# A test that hangs ends here.
limit=${LIMIT_SECONDS:-120}
logs=${OUT:-$here}/logs
mkdir -p "$logs"

for packed in "$here"/bin/*.gz "$here"/tests/*.gz; do
    [ -e "$packed" ] && gzip --decompress --force "$packed"
done
for packed in "$here"/bin/*.xz "$here"/tests/*.xz; do
    [ -e "$packed" ] || continue
    xz --decompress --force "$packed" 2>/dev/null && continue
    # Python has its own.
    python3 -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$packed" "${packed%.xz}" &&
        chmod +x "${packed%.xz}" && rm "$packed"
done

packages=$(python3 -c 'import glob, sys
print(":".join(f for p in sys.path if p for f in sorted(glob.glob(p + "/nvidia/*/lib"))))' 2>/dev/null)
export LD_LIBRARY_PATH="$here/lib${packages:+:$packages}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if [ -x "$PHALANX_BIN" ]; then
    "$PHALANX_BIN" doctor
fi
has_gpu() {
    [ -x "$PHALANX_BIN" ] && "$PHALANX_BIN" doctor --device cuda:0 >/dev/null 2>&1
}
# Suites that run on any processor run on the GPU, unless they may do without one.
if [ "$GPU_REQUIRED" != 0 ] || has_gpu; then
    export PHALANX_GPU=0 PHALANX_DEVICE=cuda:0
fi

wanted() {
    local name=$1 word
    shift
    [ $# -eq 0 ] && return 0
    for word in "$@"; do
        case $name in *"$word"*) return 0 ;; esac
    done
    return 1
}

# One test at a time: ranks and processes of a test share the GPU.
one_by_one() {
    # The tests' own threads and processes die with it.
    timeout --kill-after=10 "$limit" "$1" --test-threads=1 ${3:-}
}

# Each check of the CUDA backend in a process of its own, as many at once as there are cores: most of their time goes to
# the reference, which is one thread's work.
each_apart() {
    set -o pipefail # a suite that lists nothing has not passed
    "$1" --list | sed -n 's/: test$//p' | grep cuda |
        xargs -P "$(nproc)" -I '{}' bash -c 'log=$4.$(tr -c "[:alnum:]" _ <<<"$3")
            timeout --kill-after=10 "$1" "$2" --exact "$3" --include-ignored --test-threads=1 >"$log" 2>&1
            status=$?
            cat "$log"
            case $status in
                0) ;;
                124 | 137) echo "test $3: still running after $1 s ... FAILED" ;;
                *) echo "test $3: exit status $status ... FAILED" ;;
            esac
            exit "$status"' bash "$limit" "$1" '{}' "$2"
}

rows=() failed=0
for test in "$here"/tests/*; do
    name=$(basename "$test")
    wanted "$name" "$@" || continue
    echo
    echo "== $name"
    how=one_by_one only=
    # Of the worker's tests those that want a GPU: the others take a minute and are the same everywhere.
    case $name in *conformance) how=each_apart ;; *phalanx_worker) only=gpu:: ;; esac
    (cd "$PHALANX_ROOT" && "$how" "$test" "$logs/$name" $only) >"$logs/$name.log" 2>&1
    status=$?
    grep -E '^(NOT RUN|test .*FAILED$|test result:)' "$logs/$name.log"
    case $status in
        0) outcome=passed ;;
        124 | 137) outcome="FAILED: still running after $limit s" ;;
        *) outcome="FAILED: exit status $status" ;;
    esac
    [ "$status" -eq 0 ] || { failed=1; tail -n 40 "$logs/$name.log"; }
    count() { sed -n "s/^test result: .* \([0-9]*\) $1.*/\1/p" "$logs/$name.log" | awk '{ n += $1 } END { print n + 0 }'; }
    skipped=$(grep -c '^NOT RUN ' "$logs/$name.log")
    rows+=("$(printf '%-34s %7s %7s %8s  %s' "$name" "$(($(count passed) - skipped))" "$(count failed)" "$skipped" "$outcome")")
done

# Speed, where there is a GPU: ops beside what this GPU can do at most, then whole models of random weights.
measure() {
    local name=$1
    shift
    echo
    echo "== $name: phalanx $*"
    timeout --kill-after=10 "${BENCH_SECONDS:-300}" "$PHALANX_BIN" "$@" 2>&1 | tee "$logs/$name.log"
    case ${PIPESTATUS[0]} in
        0) rows+=("$(printf '%-34s %25s  %s' "$name" '' measured)") ;;
        *) failed=1 rows+=("$(printf '%-34s %25s  %s' "$name" '' "FAILED: exit status ${PIPESTATUS[0]}")") ;;
    esac
}
# Others' kernels on the layer of `bench kernels`: none has to be there, and none that fails is a failure of ours.
measure_peers() {
    local outcome='NOT RUN: python3 has no torch'
    if python3 -c 'import torch' >/dev/null 2>&1; then
        echo
        echo "== peers"
        timeout --kill-after=10 "${BENCH_SECONDS:-300}" python3 "$here/peers.py" --json "$logs/peers.json" \
            2>"$logs/peers.err" | tee "$logs/peers.log"
        case ${PIPESTATUS[0]} in
            0) outcome=measured ;;
            *) outcome="NOT RUN: exit status ${PIPESTATUS[0]}" ;;
        esac
    fi
    rows+=("$(printf '%-34s %25s  %s' peers '' "$outcome")")
}
# Loading from disk beside reading the same files and doing nothing, both past the page cache where this may be emptied
# and KEEP_CACHE is not set.
measure_load() {
    local folder=$here/load layers=${LOAD_LAYERS:-8} cold=cold raw seconds outcome=measured
    forget() { [ -z "${KEEP_CACHE:-}" ] && sync && { echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null || cold=cached; }
    echo
    echo "== load: $layers layers of 20b from disk"
    rm -rf "$folder"
    if "$PHALANX_BIN" model synth --shape 20b --layers "$layers" --seed 7 "$folder"; then
        forget
        raw=$({ TIMEFORMAT=%R && time cat "$folder"/*.safetensors >/dev/null; } 2>&1)
        forget
        # The CUDA libraries are no part of the model.
        has_gpu
        seconds=$("$PHALANX_BIN" bench offline --device cuda:0 --no-weight-cache --model "$folder" --prompt-len 1 \
            --gen-len 3 --json | sed -n 's/.*"load_s":\([0-9.]*\).*/\1/p')
        echo "$(du -sm "$folder" | cut -f1) MiB, $cold: read in $raw s, loaded in ${seconds:-?} s" | tee "$logs/load.log"
    fi
    [ -n "${seconds:-}" ] || failed=1 outcome='FAILED: see above'
    rm -rf "$folder"
    rows+=("$(printf '%-34s %25s  %s' load '' "$outcome")")
}
if wanted benches "$@" && [ -x "$PHALANX_BIN" ]; then
    if has_gpu; then
        measure_load
        measure kernels-120b bench kernels --device cuda:0 --shape 120b --rows 1,8,64,256,1024,8192 --context 8192 --rounds 3
        measure_peers
        # A long prompt twice: the first one also makes what the second finds.
        for shape in 20b 120b; do
            measure "$shape" bench offline --device cuda:0 --model "synth:$shape" --gen-len 128 --step-rows 8192 \
                --batch 1,1,1,64 --prompt-len 8192,8192,1024,1024
        done
    else
        rows+=("$(printf '%-34s %25s  %s' benches '' 'NOT RUN: no GPU')")
    fi
fi

echo
printf '%-34s %7s %7s %8s  %s\n' suite passed failed 'not run' outcome
printf '%s\n' "${rows[@]:-nothing has this name}"
[ ${#rows[@]} -gt 0 ] || failed=1
exit $failed
