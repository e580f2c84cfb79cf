#!/usr/bin/env bash
# transformers 5.23.0: `rope_scaling` added to a config.json that transformers 5 wrote takes the model's rope_theta away.
#
# The model cards of Qwen2.5 and Qwen3 say how to get 131,072 positions: add to config.json
#     "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# In the published file rope_theta (1000000) stands at the top level, and is kept. In a folder that transformers 5 has
# saved it stands within `rope_parameters`; the added field then replaces all of that, rope_theta falls back to 10000,
# and nothing is said.
#
# Seen: published, with the addition:      {'factor': 4.0, 'original_max_position_embeddings': 32768, 'rope_theta': 1000000.0, 'rope_type': 'yarn'}
#       saved again, without the addition: {'rope_theta': 1000000.0, 'rope_type': 'default'}
#       saved again, with the addition:    {'factor': 4.0, 'original_max_position_embeddings': 32768, 'rope_theta': 10000.0, 'rope_type': 'yarn'}
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
"$place/venv/bin/python" - "$place" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import Qwen3Config

ADDED = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
published, saved = Path(sys.argv[1], "published"), Path(sys.argv[1], "saved")


def meaning(folder: Path, **added: object) -> dict[str, object]:
    path = folder / "config.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | added))
    read = Qwen3Config.from_pretrained(folder).rope_parameters
    path.write_text(kept)
    return dict(sorted(read.items()))


published.mkdir()
(published / "config.json").write_text(json.dumps({"model_type": "qwen3", "rope_theta": 1000000.0}))
Qwen3Config.from_pretrained(published).save_pretrained(saved)
found = [meaning(published, **ADDED), meaning(saved), meaning(saved, **ADDED)]
print(*found, sep="\n")
assert [rope["rope_theta"] for rope in found] == [1000000.0, 1000000.0, 10000.0], "not so any more"
PYTHON
