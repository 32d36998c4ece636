# Sourced by sanitize.sh and aarch64.sh: compiles the kernels and their self-test.
# compile COMPILER OUTPUT FLAGS… ; each instruction set's file gets flags of its own, as in setup.py.
native="$(dirname "${BASH_SOURCE[0]}")/../../mediator_peft/kernels/native"
tests="$(dirname "${BASH_SOURCE[0]}")"

compile() {
    local compiler=$1 output=$2
    shift 2
    local folder
    folder=$(mktemp -d)
    local avx2="-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt"
    local -A flags=([baseline]="")
    case $("$compiler" -dumpmachine) in
        x86_64*) flags[avx2]=$avx2 flags[avx512]="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl" ;;
        aarch64*) flags[neon]="" ;;
    esac
    for name in "${!flags[@]}"; do
        # shellcheck disable=SC2086
        "$compiler" -std=c++17 -ffp-contract=off -w "$@" ${flags[$name]} -c "$native/kernels_$name.cpp" -o "$folder/$name.o"
    done
    "$compiler" -std=c++17 -Wall -Wextra "$@" -I"$native" "$tests/selftest.cpp" "$native/sha256.cpp" "$folder"/*.o -o "$output"
    rm -r "$folder"
}
