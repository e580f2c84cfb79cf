"""One response of several requests to a server: tokens held back, versions, branches, routed
experts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence

import numpy as np
import pytest

from megatron_efr.rollout.driver import Driver
from megatron_efr.rollout.sglang.respond import respond
from megatron_efr.scripts import Budget, EarlyExit, Forks, Plain
from megatron_efr.scripts.modes import SummaryThinking
from megatron_efr.steps import Draw, Force, Fork, Step, Take
from megatron_efr.types import Done, Response, Sampling, Script, VersionSpan
from tests.scripts import Letters

SAMPLING = Sampling(1.0, 1.0, 12, (1,))
BEGUN = (5, 6)


class Saying:
    """A server that says what it is to say, request by request, and keeps what it was asked."""

    def __init__(
        self, *said: str, versions: Sequence[tuple[VersionSpan, ...]] = (), routes: bool = False
    ) -> None:
        self._said, self._versions, self._routes = iter(said), iter(versions), routes
        self.asked: list[tuple[str, int, str]] = []

    async def __call__(self, tokens: tuple[int, ...], sampling: Sampling) -> Response:
        self.asked.append(
            (Letters().decode(tokens), sampling.max_new_tokens, Letters().decode(sampling.stop_ids))
        )
        said = Letters().encode(next(self._said))
        read = len(tokens) + len(said) - 1
        return Response(
            said,
            -np.arange(1.0, len(said) + 1, dtype=np.float32),
            "stop" if said[-1] in sampling.stop_ids else "length",
            next(self._versions, (VersionSpan(0, 0, len(said)),)),
            routed_experts=np.arange(read)[:, None, None] if self._routes else None,
        )


def made(script: Script, server: Saying) -> Response:
    driver = Driver(script.steps(0), SAMPLING, Letters())
    return asyncio.run(respond(driver, BEGUN, SAMPLING, server))


def test_each_draw_goes_on_from_all_that_was_said_and_is_held_to_its_limit() -> None:
    server = Saying("CDE", "FGA")
    response = made(Budget(most=3, end="Z", cut="HI", answer=5), server)
    assert server.asked == [("EF", 3, "AZ"), ("EFCDEHI", 5, "A")]
    assert Letters().decode(response.tokens) == "CDEHIFGA"
    assert response.logprobs.tolist() == [-1, -2, -3, 0, 0, -1, -2, -3]
    assert [part.ending for part in response.parts] == ["length", "forced", "stop"]
    assert (response.length, response.finish) == (6, "stop")


def test_a_token_held_back_begins_the_next_draw_or_gives_its_place_up() -> None:
    server = Saying("CDZ", "FFZ", "HHH")
    response = made(Budget(most=9, end="Z", cut="I", least=4, wait="W", answer=4), server)
    assert server.asked == [("EF", 9, "AZ"), ("EFCDW", 7, "AZ"), ("EFCDWFFZ", 3, "A")]
    assert Letters().decode(response.tokens) == "CDWFFZHHH"
    assert response.logprobs.tolist() == [-1, -2, 0, -1, -2, -3, -1, -2, -3]
    assert [(part.start, part.end, part.ending) for part in response.parts] == [
        (0, 2, "until"), (2, 3, "forced"), (3, 5, "until"), (5, 9, "length"),
    ]  # fmt: skip
    assert response.truncated


def test_a_stop_token_at_the_limit_stops_as_on_the_embedded_engine() -> None:
    assert made(Budget(most=2, end="Z"), Saying("CA")).finish == "stop"


def test_versions_of_all_draws_tile_the_response() -> None:
    first, second = (
        (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3)),
        (VersionSpan(4, 0, 1), VersionSpan(6, 1, 3)),
    )
    response = made(
        Budget(most=3, end="Z", cut="HI", answer=5), Saying("CDE", "FGA", versions=(first, second))
    )
    assert response.versions == ((3, 0, 1), (4, 1, 6), (6, 6, 8))


def test_branches_are_asked_from_where_they_begin_and_the_response_stays_as_it_is() -> None:
    server = Saying("CDEA", "GG", "HA", "KK", "LL")
    response = made(Forks(at=(0, 3, 9), samples=2, tokens=2, opening="W"), server)
    assert server.asked[1:] == [("EFW", 2, "A")] * 2 + [("EFCDEW", 2, "A")] * 2
    said = [
        [Letters().decode(each.tokens) for each in branch.responses] for branch in response.branches
    ]
    assert said == [["WGG", "WHA"], ["WKK", "WLL"]]
    assert [each.length for branch in response.branches for each in branch.responses] == [2] * 4
    assert Letters().decode(response.tokens) == "CDEA"


def test_a_probe_that_is_sure_has_the_pause_left_and_one_that_is_not_has_it_said() -> None:
    unsure, sure = Saying("CW", "GH", "DDA"), Saying("CW", "GH", "DDA")
    script = EarlyExit(pauses=("W",), probe="P", tokens=2, end="Z", exit="X", tries=1, sure=0.3)
    assert Letters().decode(made(script, unsure).tokens) == "CWDDA"  # exp(-1.5) = 0.22
    assert (
        Letters().decode(made(EarlyExit(**{**script.model_dump(), "sure": 0.2}), sure).tokens)
        == "CXDDA"
    )
    assert sure.asked == [("EF", 12, "AWZ"), ("EFCP", 2, "A"), ("EFCX", 11, "A")]


def test_a_summary_is_asked_for_behind_the_thought_and_the_answer_behind_the_summary_alone() -> (
    None
):
    server = Saying("CDEZ", "GHZ", "KKA")
    script = SummaryThinking(most=6, tokens=3, end="Z", wish="WW", cut="X")
    response = made(script, server)
    assert server.asked == [("EF", 6, "AZ"), ("EFCDEWW", 3, "AZ"), ("EFGHX", 10, "A")]
    assert Letters().decode(response.tokens) == "GHXKKA"
    assert response.logprobs.tolist() == [-1, -2, 0, -1, -2, -3]
    assert [(part.start, part.end, part.ending) for part in response.parts] == [
        (0, 2, "length"), (2, 3, "forced"), (3, 6, "stop"),
    ]  # fmt: skip
    assert (response.length, response.finish, response.branches) == (5, "stop", ())
    ended = Saying("CDA")
    assert Letters().decode(made(script, ended).tokens) == "CDA", (
        "without a thought it is taken as it is"
    )
    assert len(ended.asked) == 1


class Full(Plain):
    """A branch behind as many tokens as a response may have, which then are the response's own."""

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        made = Letters().encode("CDEFGHIJKLMN")
        done = yield Fork("step", (0,), 1, "", None, after=(made,))
        assert done.branches[0].responses[0].tokens == ()
        yield Take("search", made, (-1.0,) * 12, "length")


def test_a_branch_without_room_for_a_token_has_none() -> None:
    server = Saying()
    response = made(Full(), server)
    assert (server.asked, Letters().decode(response.tokens)) == ([], "CDEFGHIJKLMN")
    assert (response.length, response.finish, response.branches) == (12, "length", ())


class Signed(Plain):
    """A draw, and words at its end."""

    words: str

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        yield Draw("response", 3, ("Z",))
        if self.words:
            yield Force("words", self.words)


@pytest.mark.parametrize(
    ("said", "words", "whole", "more"),
    [
        ("CDE", "", "CDE", []),
        ("CZ", "", "C", []),  # of a token that was held back and dropped they are cut off
        (
            "CDE",
            "HI",
            "CDEHI",
            [("EFCDEH", 1, "A")],
        ),  # of what was written the server is asked, within the response's length
    ],
)
def test_routed_experts_are_those_of_every_token_that_was_read(
    said: str, words: str, whole: str, more: list[tuple[str, int, str]]
) -> None:
    server = Saying(said, "K", routes=True)
    response = made(Signed(words=words), server)
    assert Letters().decode(response.tokens) == whole
    assert response.routed_experts is not None
    assert response.routed_experts[:, 0, 0].tolist() == list(range(len(BEGUN) + len(whole) - 1))
    assert server.asked[1:] == more
    assert response.finish == ("length" if said == "CDE" else "stop")
