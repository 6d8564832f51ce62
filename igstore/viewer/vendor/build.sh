#!/usr/bin/env bash
# Makes zarrita.bundle.js and LICENSES.txt from what package-lock.json pins: the same bytes whoever runs it.
# Only for changing what is bundled (edit package.json, `npm install --package-lock-only`, then this); needs npm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/{entry.mjs,package.json,package-lock.json} "$work"
cd "$work"
npm ci --ignore-scripts --no-audit --no-fund >&2

bundle() {
    # the codecs that entry.mjs removes must not come along
    node_modules/.bin/esbuild entry.mjs --bundle --minify --format=esm --target=es2022 --legal-comments=none \
        --external:numcodecs/blosc --external:numcodecs/lz4 --external:numcodecs/zstd --log-level=warning "$@"
}
field() {
    node -p "require('./node_modules/$1/package.json').$2"
}

bundle --metafile=meta.json --outfile=/dev/null
packages=$(grep -o 'node_modules/\(@[^/"]*/\)\?[^/"]*' meta.json | cut -d/ -f2- | LC_ALL=C sort -u)
versions=$(for package in $packages; do echo "$package $(field "$package" version)"; done | paste -sd, | sed 's/,/, /g')
banner="/*! $versions; MIT License, see LICENSES.txt; made by build.sh */"
bundle --banner:js="$banner" --outfile="$here/zarrita.bundle.js"

{
    echo "zarrita.bundle.js is made of these packages, under their licences."
    for package in $packages; do
        printf '\n%s\n\n' "== $package $(field "$package" version) (https://www.npmjs.com/package/$package) =="
        cat "node_modules/$package/LICENSE"
    done
} >"$here/LICENSES.txt"
echo "$versions" >&2
