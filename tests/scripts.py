"""Every kind of script at work, a tokenizer of letters, and what a script makes if everything is
read again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_efr.rollout.driver import branch_steps
from megatron_efr.rollout.local.sampling import draw, uniforms
from megatron_efr.scripts import Budget, EarlyExit, Exits, Forks, Opened, Plain, Rounds, search
from megatron_efr.scripts.modes import LessThinking, SummaryThinking
from megatron_efr.scripts.probed import Concise, Deer, EarlyStop, Subthoughts
from megatron_efr.scripts.published import S1, CutOff, Elastic, NoThinking, Tip, Told
from megatron_efr.scripts.search import VgSearch
from megatron_efr.steps import Draw, Force, Fork, Part, Score, Step, Take
from megatron_efr.types import Branch, Done, Prompt, Response, Sampling, Script


class Letters:
    """A tokenizer whose tokens are letters: A is 1, B is 2; 31 is a new line; from `a` on, 33 and
    more.
    """

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(31 if letter == "\n" else ord(letter) - 64 for letter in text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join("\n" if token == 31 else chr(64 + token) for token in tokens)


def letters(prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """A scorer that likes late letters and short texts, and some prompts better than others."""
    return [sum(map(ord, text)) / (1 + len(text)) + len(prompt.tokens) for text in texts]


search.SCORERS = {**search.SCORERS, "letters": "tests.scripts:letters"}


def every_kind(said: Sequence[int]) -> tuple[Script, ...]:
    """Scripts of every kind whose turns a greedy model takes that says `said` when it is just
    asked.
    """
    other = Letters().decode([token for token in range(3, 32) if token not in said][:1])
    late = max(i for i in range(1, 12) if said[i] not in said[:i])
    end = Letters().decode([said[late]])
    return (
        Plain(),
        Opened(opening="CDE"),
        Opened(opening="CD", chance=0.25),
        Budget(most=3, end=end, cut="DE", answer=5),  # cut, and its answer too
        Budget(most=20, end=end, cut="DE", answer=4),  # ends by itself
        Budget(most=20, end=end, cut="DE", least=late + 2, wait="CDC", waits=2),
        EarlyExit(pauses=(end,), probe="CD", tokens=3, sure=1e-9, end=other, exit="FG"),
        EarlyExit(pauses=(end,), probe="C", tokens=3, sure=1.0, end=other, exit="FG", tries=2),
        EarlyExit(pauses=(other,), probe="C", tokens=3, end=end, exit="FG"),
        Forks(at=(0, 2, late, 200), samples=2, tokens=4, opening="GH"),
        Forks(at=(1, 4), tokens=6, opening="E", end=end),
        Forks(at=(1, late + 2, 19), samples=2, tokens=3, opening="GH", end=end, ended="FE"),
        Exits(drawn=3, seed=5, samples=2, tokens=4, opening="G"),
        rounds(said),
    )


def rounds(said: Sequence[int]) -> Rounds:
    """Rounds of 8 tokens, of which the first has a summary: what stands between two pairs of
    letters.
    """
    opens, closes = (Letters().decode(said[first : first + 2]) for first in (0, 5))
    return Rounds(tokens=8, most=3, opens=opens, closes=closes, history="G{summary}HG")


def every_rule(said: Sequence[int], trial: float | None = None) -> tuple[Script, ...]:
    """The published rules likewise; `trial` is the temperature of their trial answers, None the
    sampling's.
    """
    other = Letters().decode([token for token in range(3, 32) if token not in said][:1])
    late = max(i for i in range(1, 12) if said[i] not in said[:i])
    pause, end = Letters().decode([said[1]]), Letters().decode([said[late]])
    shared: dict[str, Any] = {
        "temperature": 0.0 if trial is None else trial,
        "probe": "C",
        "exit": "FG",
    }
    letters = tuple(Letters().decode(range(3, 32)))
    return (
        CutOff(most=4),
        NoThinking(opening="CDE"),
        Elastic(most=3, answer=4, end=end, cut="D"),
        S1(most=3, end=end, header="D", final="EF"),  # cut
        S1(most=40, end=end, header="D", final="EF", wait="C", waits=2),  # ends by itself, at last
        S1(end=end, header="D", final="EF", waits=0),
        Deer(pauses=(pause,), end=other, sure=1e-9, probe_end=letters[:3], **shared),
        Deer(
            pauses=(pause,), end=end, sure=1.0, tries=2, most=9, near=0, probe_end=("JK",), **shared
        ),
        Deer(
            form="transformers",
            leaves=(end,),
            pauses=(pause,),
            end=other,
            probe_end=letters,
            **shared,
        ),
        Deer(form="qwen3", pauses=(pause,), end=other, sure=1e-9, probe_end=letters, **shared),
        EarlyStop(every=3, agree=2, tokens=4, end=end, unsure=("L",), **shared),
        Subthoughts(markers=(*letters[:9], "JKL"), tokens=5, end=other, most=2),
        Concise(
            pauses=(pause,),
            end=other,
            sure=1.0,
            tokens=3,
            probe="C",
            exit="FG",
            phrases=("HI", "J"),
            tries=2,
        ),
        VgSearch(scorer="letters", beams=4, width=2, iterations=4, ends=(pause, end), tokens=4),
        VgSearch(
            scorer="letters", beams=2, width=2, every=2, iterations=3, ends=letters[:7], tokens=3
        ),
        Told(suffix="C"),
        Tip(switch=(pause, end), amount=3.0, window=5),
        Tip(switch=letters[:12], amount=0.5, window=300),
        LessThinking(opening="CD"),
        SummaryThinking(most=3, tokens=4, end=end, wish="CE", cut="DE"),
        SummaryThinking(most=20, tokens=9, end=end, wish="C", cut="D"),
    )


class Made(NamedTuple):
    """Product of a script, as `Response` has it."""

    tokens: list[int]
    logprobs: list[float]
    parts: list[Part]
    branches: list[Branch]


class Rereading:
    """A model that reads all there is for each token, as `transformers` has it, and draws with our
    random numbers.

    `logits` are those that others of one model have found, by all that was read.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        seed: int,
        sample: int,
        logits: dict[Any, torch.Tensor],
    ) -> None:
        self._model, self._sampling, self._seed, self._sample = model, sampling, seed, sample
        self._logits, self._branches = logits, 0

    def make(
        self,
        steps: Generator[Step, Done, None],
        begun: Sequence[int],
        branch: int = 0,
        left: int | None = None,
    ) -> Made:
        """Follow a script's steps after the tokens `begun`, one by one."""
        made, held, left = (
            Made([], [], [], []),
            None,
            self._sampling.max_new_tokens if left is None else left,
        )
        if not branch:
            self._prompt = Prompt("p", tuple(begun), "", "")
        step: Step | None = next(steps)
        while step is not None:
            first, met, text, branches, scores = len(made.tokens), "", "", (), ()
            if isinstance(step, Draw):
                limit = left if step.limit is None else min(step.limit, left)
                part, held, met = self._draw(step, made, limit, held, [*begun], branch)
                left -= part.end - part.start
                text = Letters().decode(made.tokens[first:]) if step.told else ""
            elif isinstance(step, Take):
                made.tokens.extend(step.tokens[:left])
                made.logprobs.extend(step.logprobs[:left])
                ending = step.ending if len(step.tokens) <= left else "length"
                part, held = Part(step.part, first, len(made.tokens), ending), None
                left -= part.end - part.start
            elif isinstance(step, Score):
                part, scores = (
                    Part("score", first, first, "forced"),
                    step.scorer(self._prompt, step.texts),
                )
            elif isinstance(step, Force):
                written = Letters().encode(step.text)
                made.tokens.extend(written)
                made.logprobs.extend(
                    [float(np.log(step.chance or 1.0))] + [0.0] * (len(written) - 1)
                )
                part, held = (
                    Part(step.part, first, len(made.tokens), "chosen" if step.chance else "forced"),
                    None,
                )
            else:
                after = step.after or ((),) * len(step.at)
                most = left if step.after else self._sampling.max_new_tokens
                starts = [
                    (at, [*begun, *made.tokens[:at], *more], most - len(more))
                    for at, more in zip(step.at, after, strict=True)
                ]
                branches = tuple(self._branch(step, *start) for start in starts)
                made.branches.extend(() if step.after else branches)
                part = Part(step.part, first, first, "forced")
            if not isinstance(step, Fork | Score):
                made.parts.append(part)
            try:
                step = steps.send(Done(part, met, branches, tuple(scores), text))
            except StopIteration:
                step = None
        return made

    def _draw(
        self,
        step: Draw,
        made: Made,
        limit: int,
        held: tuple[int, float] | None,
        begun: list[int],
        branch: int,
    ) -> tuple[Part, tuple[int, float] | None, str]:
        first = len(made.tokens)
        for _ in range(limit):
            drawn = held or self._next(begun, made.tokens, branch, step)
            begins, (token, logprob) = held is not None, drawn
            held, letter = None, Letters().decode([token])
            if letter in step.until and not begins:
                return Part(step.part, first, len(made.tokens), "until"), (token, logprob), letter
            made.tokens.append(token)
            made.logprobs.append(logprob)
            if token in self._sampling.stop_ids:
                return Part(step.part, first, len(made.tokens), "stop"), None, ""
        return Part(step.part, first, len(made.tokens), "length"), None, ""

    def _branch(self, fork: Fork, at: int, begun: list[int], left: int) -> Branch:
        responses = []
        for _ in range(fork.samples):
            self._branches += 1
            made = self.make(branch_steps(fork), begun, self._branches, max(0, left))
            logprobs = np.array(made.logprobs, dtype=np.float32)
            finish = "length" if made.parts[-1].ending == "length" else "stop"
            text = Letters().decode(made.tokens)
            responses.append(
                Response(tuple(made.tokens), logprobs, finish, text=text, parts=tuple(made.parts))
            )
        return Branch(fork.part, at, tuple(responses))

    def _next(
        self, begun: list[int], tokens: list[int], branch: int, step: Draw
    ) -> tuple[int, float]:
        read = (*begun, *tokens)
        if read not in self._logits:
            with torch.no_grad():
                self._logits[read] = self._model(torch.tensor([read])).logits[:, -1]
        sampling, at = self._sampling, np.array([len(tokens)])
        seed, sample = np.array([self._seed], dtype=np.uint64), np.array([self._sample])
        uniform = torch.from_numpy(uniforms(seed, sample, at, np.array([branch])))
        temperature = sampling.temperature if step.temperature is None else step.temperature
        logits = self._logits[read].clone()
        if step.penalty is not None:
            switch = [token for text in step.penalty.texts for token in Letters().encode(text)]
            began = max((place for place, token in enumerate(tokens) if token in switch), default=0)
            if len(tokens) < began + step.penalty.window:
                logits[:, switch] -= step.penalty.amount
        token, logprob = draw(logits, uniform, temperature, sampling.top_p)
        return int(token), float(logprob)


def assert_made(response: Response, made: Made, tolerance: float = 1e-5) -> None:
    """Hold an engine's response to what was made by reading everything again, branch by branch."""
    assert response.tokens == tuple(made.tokens)
    assert response.parts == tuple(made.parts)
    assert np.abs(response.logprobs - np.array(made.logprobs)).max() <= tolerance
    assert response.finish == (
        "length" if [p for p in made.parts if not p.forced][-1].ending == "length" else "stop"
    )
    assert response.text == Letters().decode(made.tokens)
    assert [(branch.part, branch.at) for branch in response.branches] == [
        (b.part, b.at) for b in made.branches
    ]
    for branch, ours in zip(response.branches, made.branches, strict=True):
        for one, other in zip(branch.responses, ours.responses, strict=True):
            assert (one.tokens, one.parts, one.finish) == (other.tokens, other.parts, other.finish)
            assert np.abs(one.logprobs - other.logprobs).max() <= tolerance
            assert one.text == Letters().decode(other.tokens)
