#!/usr/bin/env bash
# The self-test of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
source "$(dirname "$0")/selftest_flags.sh"
command -v g++ >/dev/null || { echo "skipped: no g++"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile g++ "$work/selftest" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
"$work/selftest" "${1:-100}"
