#!/usr/bin/env bash
# Installs Debian's Chromium for the tests of report.html, in continuous integration alone: CI is set, the user is root,
# apt-get is there and no browser is. Without a browser, or where this fails, these tests are skipped.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install() {
        apt-get -qq update && apt-get -qq install -y --no-install-recommends -o DPkg::Lock::Timeout=60 chromium
    }
    export DEBIAN_FRONTEND=noninteractive
    started=$SECONDS
    if install >/dev/null 2>&1; then
        echo "browser: Chromium installed in $((SECONDS - started)) s"
        exit 0
    fi
fi
echo "browser: there is none, so the tests of report.html in a browser are skipped (on Debian: apt-get install chromium)"
