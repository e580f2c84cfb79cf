#!/usr/bin/env bash
# The documentation as a static site, site/index.html: README and every page that it leads to.
#
#   bash launch/docs.sh            into site/; a link that leads nowhere and a page that no other leads to are errors
#   bash launch/docs.sh FOLDER     into another folder
#
# Sphinx, with MyST for Markdown, in an environment of its own: .venv-docs, made if it is missing (40 s).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

venv=.venv-docs site=${1:-site}
find_python "$venv"
wanted=$({ python_version "$python"; cat launch/docs.txt; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.complete" 2>/dev/null || true)" != "$wanted" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --requirement launch/docs.txt
    echo "$wanted" > "$venv/.complete"
fi
"$venv/bin/python" -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -c docs -d "$site/.doctrees" . "$site"
rm -rf "$site/.doctrees"
cp "$site/README.html" "$site/index.html"
echo "docs: $site/index.html"
