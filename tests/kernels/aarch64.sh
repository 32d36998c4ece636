#!/usr/bin/env bash
# The self-test of the native kernels for 64-bit ARM, cross-compiled and run under user-mode emulation.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user; ends with 77 where they are absent.
set -euo pipefail
source "$(dirname "$0")/selftest_flags.sh"
compiler=aarch64-linux-gnu-g++
emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
{ command -v $compiler >/dev/null && [ -n "$emulator" ]; } || { echo "skipped: no $compiler or no qemu-aarch64"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile $compiler "$work/selftest" -O2 -static
"$emulator" "$work/selftest" "${1:-30}"
