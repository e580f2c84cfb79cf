"""The responses that a run samples for its method, kept one by one: a kill loses none, and other
runs may read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from megatron_efr import log
from megatron_efr.durable import LineFile, checked, write_atomic
from megatron_efr.errors import UserError
from megatron_efr.grading import Grader
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judgings
from megatron_efr.methods.samplings import ByPrompt, Monitor, Sampled, dump, restored
from megatron_efr.observe.progress import show_progress
from megatron_efr.rollout.engine import Engine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Request, Sampling

MAY_SHRINK = frozenset({"max_new_tokens"})
"""Keys that a resumed run may have changed since its responses were sampled."""

MONITORED = 1
"""Tells the draw of the monitor set from others of the run's seed."""


class SamplingError(UserError):
    """Sampled responses that are damaged, missing, or others than the run's."""


def check_there(path: str | None, own: Path) -> None:
    """Refuse, with a SamplingError, a key `data.reference` that names no file, if the run has no
    copy of its `own`.
    """
    if path is not None and not own.exists() and not Path(path).is_file():
        raise SamplingError(
            f"data.reference: {path}: no such file; it is a run's reference.jsonl, which a run "
            "whose method wants it writes before its first iteration; or leave data.reference out"
        )


class Sampler:
    """Samples and grades responses to training prompts. Each request's seed is a function of the
    run's and the prompt.

    `asked` is how they are sampled and graded, JSON-ready: a file says it in its first line, and is
    refused elsewhere.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        grader: Grader,
        judgings: Judgings,
        seed: int,
        asked: Mapping[str, Any],
    ) -> None:
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed
        self._grader = grader
        self._judgings = judgings
        self._asked = dict(asked)

    def reference(
        self, engine: Engine, samples: int, path: Path, other: Path | None = None
    ) -> ByPrompt:
        """`samples` responses of the starting model, version 0, to every prompt; those that `path`
        holds are kept.

        If there is no such file it is made of `other`, another run's, if that is given.
        SamplingError if later weights are served already, and some are missing.
        """
        if other is not None and not path.exists():
            self.check(other, samples)
            write_atomic(path, other.read_bytes())
        file = SampledFile(path, self._described(samples))
        finished, left = self._found(file, self._prompts, MAY_SHRINK)
        if left and other is not None:
            log.warning(
                f"data.reference: {other} is not read, since this run has begun its own: {path} "
                f"lacks {len(left)} of {len(self._prompts)} prompts, which are sampled; to take "
                "the other one, delete this one first"
            )
        if left and engine.version != 0:
            raise SamplingError(
                f"{path}: {len(left)} of {len(self._prompts)} prompts are missing, and the "
                "starting model that their responses are of is not served any more; put the file "
                "back, or start a new run"
            )
        said = (
            f"{len(self._prompts)} prompts x {samples} responses of the starting model, before "
            "the first iteration"
        )
        return self._sampled(engine, file, finished, left, "reference", samples, said)

    def check(self, path: Path, samples: int) -> None:
        """Refuse, with a SamplingError, another run's file that lacks what `reference` would
        sample.
        """
        _, left = self._found(SampledFile(path, self._described(samples)), self._prompts)
        if left:
            raise SamplingError(
                f"data.reference: {path} holds no responses to {len(left)} of "
                f"{len(self._prompts)} prompts as this run asks them, the first {left[0].id}; "
                "give the file of a run with this data and prompt template that got to its first "
                "iteration, or leave data.reference out"
            )

    def monitor(self, engine: Engine, monitor: Monitor, step: int, path: Path) -> ByPrompt:
        """Answers to the monitor set after iteration `step`; those that `path` holds are kept."""
        prompts = self._drawn(monitor)
        file = SampledFile(path, self._described(monitor.samples) | {"step": step})
        finished, left = self._found(file, prompts, MAY_SHRINK)
        said = f"{len(prompts)} prompts x {monitor.samples} responses, after iteration {step}"
        return self._sampled(engine, file, finished, left, f"monitor/{step}", monitor.samples, said)

    def check_held_out(self, monitor: Monitor, before: ByPrompt) -> None:
        """Refuse, with a SamplingError, to watch other held-out problems than `before`: their
        accuracy says nothing.
        """
        if before and before.keys() != {prompt.id for prompt in self._drawn(monitor)}:
            raise SamplingError(
                f"evaluation.datasets: the method watches {len(before)} of these problems, and "
                "now they would be others, whose accuracy is not comparable; set it as it was "
                "when the run began, or start a new run"
            )

    def _drawn(self, monitor: Monitor) -> list[Prompt]:
        """The prompts of a monitor set."""
        drawn = np.random.default_rng([self._seed, MONITORED]).permutation(len(self._prompts))[
            : monitor.prompts
        ]
        return [self._prompts[i] for i in sorted(drawn)]

    def _described(self, samples: int) -> dict[str, Any]:
        return {**self._asked, "samples": samples}

    def _found(
        self, file: SampledFile, prompts: Sequence[Prompt], unlike: frozenset[str] = frozenset()
    ) -> tuple[dict[str, Sampled], list[Prompt]]:
        """Responses that the file holds of these prompts, and the prompts that are still to ask."""
        held = file.read(unlike)
        finished = {
            prompt.id: held[prompt.id][1]
            for prompt in prompts
            if prompt.id in held and held[prompt.id][0] == _asked(prompt)
        }
        return finished, [prompt for prompt in prompts if prompt.id not in finished]

    def _sampled(
        self,
        engine: Engine,
        file: SampledFile,
        finished: dict[str, Sampled],
        left: Sequence[Prompt],
        name: str,
        samples: int,
        said: str,
    ) -> ByPrompt:
        """`finished`, and what is `left`, each written to the file as it is answered."""
        if not left:
            return finished
        before = f"; {len(finished)} prompts are finished already" if finished else ""
        print(f"{name}: samples {said}{before}", flush=True)
        requests = [_request(prompt, samples, self._seed, name) for prompt in left]
        try:
            with closing(engine.generate(requests, self._sampling)) as answers:
                for group in show_progress(answers, name, len(left) + len(finished), len(finished)):
                    (graded,) = grade_groups(self._grader, [group], self._judgings)
                    finished[group.prompt.id] = made = Sampled.of(graded)
                    file.append(group.prompt, made)
        finally:
            file.close()
        return finished


class SampledFile:
    """Responses by prompt, a line each, behind a first line that says how they were sampled
    (`described`).
    """

    def __init__(self, path: Path, described: Mapping[str, Any]) -> None:
        self._file = LineFile(path)
        self._described = json.loads(json.dumps(described))
        self._begun = False

    def append(self, prompt: Prompt, sampled: Sampled) -> None:
        """Add one prompt's responses."""
        if not self._begun and not self._file.lines().texts:
            self._file.add(json.dumps(self._described))
        self._begun = True
        self._file.add(
            json.dumps(
                {"prompt": prompt.id, "asked": _asked(prompt), "sampled": dump({"": sampled})[""]}
            )
        )

    def read(self, unlike: frozenset[str] = frozenset()) -> dict[str, tuple[str, Sampled]]:
        """Read it: by the prompt's id how that was asked, and its responses; {} without a file.

        SamplingError if a line is damaged, or if they were sampled otherwise, but for what is named
        `unlike`.
        """
        held: dict[str, tuple[str, Sampled]] = {}
        for number, line in enumerate(self._file.lines().texts, start=1):
            where = f"{self._file.path}:{number}"
            try:
                tree = json.loads(checked(line))
                if number > 1:
                    held[tree["prompt"]] = (tree["asked"], restored(*tree["sampled"]))
                elif not isinstance(tree, dict):
                    raise TypeError("no description")
            except (ValueError, KeyError, TypeError) as error:
                raise SamplingError(
                    f"{where}: damaged: no sampled responses ({error}); put a copy of the file "
                    "back, or delete it"
                ) from error
            if number == 1 and (differing := self._differing(tree, unlike)):
                raise SamplingError(
                    f"{where}: these responses were sampled otherwise: {'; '.join(differing)}; "
                    "set that as it is there, or go without this file"
                )
        return held

    def close(self) -> None:
        """Stop writing."""
        self._file.close()

    def _differing(self, tree: dict[str, Any], unlike: frozenset[str]) -> list[str]:
        here = self._described
        keys = [
            key for key in {**tree, **here} if key not in unlike and tree.get(key) != here.get(key)
        ]
        return [f"{key}: there {tree.get(key)!r}, here {here.get(key)!r}" for key in keys]


def figures(sampled: ByPrompt) -> dict[str, float]:
    """Accuracy and mean tokens of the monitor set, as an iteration's metrics have them."""
    lengths = [length for each in sampled.values() for length in each.lengths]
    right = [each.solved for each in sampled.values()]
    return {"monitor/accuracy": float(np.mean(right)), "monitor/tokens": float(np.mean(lengths))}


def _asked(prompt: Prompt) -> str:
    """The checksum of a prompt as it is asked and judged."""
    return hashlib.sha256(repr((prompt.tokens, prompt.gold)).encode()).hexdigest()[:32]


def _request(prompt: Prompt, samples: int, seed: int, name: str) -> Request:
    digest = hashlib.sha256(f"{seed}/{name}/{prompt.id}".encode()).digest()
    return plain(prompt, samples, int.from_bytes(digest[:8], "little") >> 1)
