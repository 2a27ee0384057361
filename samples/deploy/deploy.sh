#!/usr/bin/env bash
# Copies a bundle to a device, verifies it there, and asks it something there.
#
#   samples/deploy/deploy.sh BUNDLE DEVICE [PROMPT]
#
# DEVICE is user@host:folder (ssh), or a local folder, which is how this is tried without a device.
# DMOE names the command on the device [dmoe-export], such as DMOE=dmoe/bin/dmoe-export from the login folder.
# The bundle appears under its name only once it is verified; until then it is NAME.partial. An interrupted copy goes on
# where it stopped when rsync is on both sides; without it the bundle goes through tar, from the start.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: deploy.sh BUNDLE DEVICE [PROMPT]" >&2
    exit 2
fi
bundle=${1%/} device=$2 prompt=${3:-}
name=$(basename "$bundle")
dmoe=${DMOE:-dmoe-export}
if [ ! -f "$bundle/manifest.json" ]; then
    echo "deploy.sh: $bundle has no manifest.json, so it is no bundle." >&2
    exit 2
fi

case $device in
    *:*) host=${device%%:*} folder=${device#*:} prefix=$host: ;;
    *) host='' folder=$device prefix='' ;;
esac

on_device() {  # on_device COMMAND ARGUMENTS...: each argument arrives as it is
    local line
    line=$(printf '%q ' "$@")
    # shellcheck disable=SC2029  # it is quoted for the other side
    if [ -n "$host" ]; then ssh "$host" "$line"; else bash -c "$line"; fi
}

target=${folder:-.}/$name
on_device mkdir -p "$target.partial"
echo "[deploy] copying $bundle to $prefix$target.partial"
if command -v rsync >/dev/null && on_device sh -c 'command -v rsync' >/dev/null; then
    rsync --archive --partial --delete "$bundle/" "$prefix$target.partial/"
else
    tar -C "$bundle" -cf - . | on_device tar -C "$target.partial" -xf -
fi

echo "[deploy] verifying there: every file's size and sha256"
code=0
on_device "$dmoe" inspect "$target.partial" || code=$?
if [ $code -ne 0 ]; then
    if [ $code -eq 2 ]; then on_device rm -rf "$target.partial"; fi  # damaged: rsync might take it for good next time
    echo "deploy.sh: the copy is not in place; inspect on the device ended with exit code $code." >&2
    exit $code
fi
on_device rm -rf "$target.old"
if on_device test -e "$target"; then on_device mv "$target" "$target.old"; fi
on_device mv "$target.partial" "$target"
on_device rm -rf "$target.old"
echo "[deploy] in place: $prefix$target"

if [ -n "$prompt" ]; then
    on_device "$dmoe" generate "$target" --verify sizes --prompt "$prompt"
fi
