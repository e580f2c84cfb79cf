#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: answers that are text in a JSON file come back as datetimes, if all of them look like
# dates. One that does not, and all are text.
#
# So a set of questions such as "On which day does it arrive?" loses its answers' text, and one row decides of which type
# the whole column is. Numbers in quotes, and times of day, stay text.
#
# Output seen:
#     2024-01-05 2023-12-31 | timestamp[s] | datetime datetime
#     2024-01-05 never      | string | str str
#     12:30 1:05            | string | str str
#     1e5 0.50              | string | str str
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$place/hub" venv/bin/python - <<'PYTHON' 2> errors > out || { cat errors; exit 1; }
import json

import datasets

for number, answers in enumerate((
    ["2024-01-05", "2023-12-31"], ["2024-01-05", "never"], ["12:30", "1:05"], ["1e5", "0.50"],
)):
    with open(f"{number}.jsonl", "w") as file:
        file.writelines(json.dumps({"question": "When?", "answer": answer}) + "\n" for answer in answers)
    table = datasets.load_dataset("json", data_files=f"{number}.jsonl", split="train")
    types = " ".join(type(row["answer"]).__name__ for row in table)
    print(f"{' '.join(answers):21} | {table.features['answer'].dtype} | {types}")
PYTHON
cat out
cat > expected <<'SEEN'
2024-01-05 2023-12-31 | timestamp[s] | datetime datetime
2024-01-05 never      | string | str str
12:30 1:05            | string | str str
1e5 0.50              | string | str str
SEEN
diff expected out
