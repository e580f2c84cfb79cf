"""The prompt stream: permutations by epoch, wrapping, exact resumption, refusal of another run's
state.
"""

import json
import subprocess
import sys

import pytest

from megatron_efr.data.stream import PromptStream, StreamError
from megatron_efr.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"d/{i}", tokens=(1, i), text=str(i), gold=str(i)) for i in range(count)]


def ids(stream: PromptStream, count: int) -> list[str]:
    return [visit.prompt.id for visit in stream.take(count)]


def test_every_epoch_is_another_permutation() -> None:
    stream = PromptStream(prompts(50), seed=3)
    epochs = [ids(stream, 50) for _ in range(4)]
    names = sorted(prompt.id for prompt in prompts(50))
    assert all(sorted(epoch) == names for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream.epoch == 4.0


def test_order_in_the_file_without_shuffle() -> None:
    assert ids(PromptStream(prompts(3), seed=3, shuffle=False), 5) == [
        "d/0",
        "d/1",
        "d/2",
        "d/0",
        "d/1",
    ]


def test_draws_cross_epochs_and_count_on() -> None:
    whole, parts = PromptStream(prompts(7), seed=1), PromptStream(prompts(7), seed=1)
    expected = whole.take(40)
    found = [visit for count in (3, 7, 20, 0, 10) for visit in parts.take(count)]
    assert found == expected
    assert [visit.index for visit in found] == list(range(40))


def test_resume_is_exact() -> None:
    stream = PromptStream(prompts(10), seed=5)
    stream.take(13)
    state = json.loads(json.dumps(stream.state_dict()))  # survives a checkpoint's JSON
    expected = stream.take(25)
    resumed = PromptStream(prompts(10), seed=5)
    resumed.load_state_dict(state)
    assert resumed.next_index == 13
    assert resumed.take(25) == expected
    assert [resumed.at(visit.index) for visit in expected] == [visit.prompt for visit in expected]


def test_seeds_differ() -> None:
    assert ids(PromptStream(prompts(50), seed=0), 50) != ids(PromptStream(prompts(50), seed=1), 50)


def test_order_does_not_depend_on_the_process() -> None:
    """Python's string hashes differ between processes; the order does not."""
    code = (
        "from megatron_efr.data.stream import *; from megatron_efr.types import Prompt\n"
        "s = PromptStream([Prompt(f'd/{i}', (1, i), str(i), str(i)) for i in range(20)], seed=9)\n"
        "print(*(v.prompt.id for v in s.take(30)), s.state_dict()['checksum'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, check=True
    )
    here = PromptStream(prompts(20), seed=9)
    assert done.stdout.decode().split() == [*ids(here, 30), here.state_dict()["checksum"]]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (PromptStream(prompts(11), seed=5), "prompts"),
        (PromptStream([*prompts(9), Prompt("d/x", (1, 9), "9", "9")], seed=5), "checksum"),
        (PromptStream([*prompts(9), Prompt("d/9", (2, 9), "9", "9")], seed=5), "checksum"),
        (PromptStream(prompts(10), seed=6), "seed"),
        (PromptStream(prompts(10), seed=5, shuffle=False), "shuffle"),
    ],
)
def test_state_of_another_stream_is_refused(other: PromptStream, key: str) -> None:
    stream = PromptStream(prompts(10), seed=5)
    stream.take(4)
    with pytest.raises(StreamError, match=f"is not this one: {key} was"):
        other.load_state_dict(stream.state_dict())
    assert other.next_index == 0


def test_no_prompts_and_double_ids() -> None:
    with pytest.raises(StreamError, match="at least one"):
        PromptStream([], seed=0)
    with pytest.raises(StreamError, match=r"two prompts have the id 'd/0'"):
        PromptStream([*prompts(3), prompts(1)[0]], seed=0)
