#!/usr/bin/env bash
# Importing megatron-core changes the name under which every tensor of the process is pickled.
#
# megatron-core 0.19.2, torch 2.13.0, Python 3.12 (0.16.1: no; 0.17.1 on: yes).
# One would think: a tensor's pickle names torch alone, whatever else the process has imported.
# Found: `import megatron.core` puts its own function in the place of torch.storage._load_from_bytes. Pickles that are made
# afterwards name megatron.core.safe_globals.safe_load_from_bytes, and an interpreter without Megatron cannot read them:
#   before: torch.storage _load_from_bytes
#   after:  megatron.core.safe_globals safe_load_from_bytes
#   read elsewhere: ModuleNotFoundError: No module named 'megatron'
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 megatron-core==0.19.2 numpy==2.4.6
cat > written.py <<'PYTHON'
import pickle, pickletools, sys, torch

def loader(data):
    strings = [argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    at = next(i for i, text in enumerate(strings) if text.endswith("load_from_bytes"))
    return " ".join(strings[at - 1 : at + 1])

before = loader(pickle.dumps(torch.zeros(2), 4))
import megatron.core
data = pickle.dumps(torch.zeros(2), 4)
open("tensor.pickle", "wb").write(data)
print("before:", before)
print("after: ", loader(data))
PYTHON
venv/bin/python written.py 2>/dev/null | tee seen
venv/bin/python -m pip uninstall --quiet --yes megatron-core
rm -rf venv/lib/python3*/site-packages/megatron # empty folders
said=$(venv/bin/python -c 'import pickle; pickle.load(open("tensor.pickle", "rb"))' 2>&1 || true)
echo "read elsewhere: ${said##*$'\n'}" | tee -a seen
diff seen - <<'SEEN'
before: torch.storage _load_from_bytes
after:  megatron.core.safe_globals safe_load_from_bytes
read elsewhere: ModuleNotFoundError: No module named 'megatron'
SEEN
