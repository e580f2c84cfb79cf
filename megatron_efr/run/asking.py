"""A run's requests for its prompts: as rendered, or with what its method adds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.data.prompts import Renderer
from megatron_efr.methods import Ask, Known, Method, Visit
from megatron_efr.rollout import ledger
from megatron_efr.rollout.checks import check_script, longest
from megatron_efr.rollout.codec import Codec
from megatron_efr.rollout.ledger import request_seed
from megatron_efr.scripts import Plain
from megatron_efr.types import Prompt, Request

CHECKED = 16
"""Ways of asking the longest prompt that are checked before a run starts, besides those that a
method names.
"""


class Asking:
    """Makes the request of a visit, by what the method may know when it is made (`known`)."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        tokenizer: PreTrainedTokenizerBase,
        known: Callable[[], Known],
    ) -> None:
        self._config = config
        self._method = method
        self._known = known
        self._tokenizer = tokenizer

    def request(self, visit: ledger.Visit) -> Request:
        """The request of a visit: its prompt with the method's suffix, scripts and note."""
        return self._request(visit.prompt, request_seed(self._config.seed, visit.index))

    def example(self, prompt: Prompt) -> Prompt:
        """The prompt as it may be asked."""
        return self._request(prompt, 0).prompt

    def check(self, prompts: Sequence[Prompt], codec: Codec, positions: int) -> None:
        """Refuse, with a ConfigError, texts that a script cannot have, and what is longer than the
        model.
        """
        # a method may draw how it asks, so its ways are tried on the longest prompt
        prompt = max(prompts, key=lambda each: len(each.tokens))
        self._check_sought(codec)
        requests = [self._request(prompt, seed) for seed in range(CHECKED)]
        visit = Visit(prompt, self._config.rollout.samples, 0)
        requests += [
            self._asked(visit, asked) for asked in self._method.longest_asks(visit, self._known())
        ]
        # texts that no token can have, and tokens that are not the policy's own
        for script in {script for request in requests for script in request.scripts}:
            check_script(script, codec, "method")
            if not script.trainable:
                raise ConfigError(
                    f"method.name: {self._config.method.name} asks with {type(script).__name__}, "
                    "a script for evaluations: tokens that were penalised or searched for are not "
                    "the policy's own, and their ratio and KL would be wrong"
                )
        # prompt, forced texts and drawn tokens within the model's positions
        drawn = self._config.rollout.max_new_tokens
        for request in requests:
            written = max(longest(script, 0, codec) for script in request.scripts)
            tokens = len(request.prompt.tokens) + written
            if tokens + drawn > positions:
                raise ConfigError(
                    f"rollout.max_new_tokens: {drawn} tokens after the longest prompt "
                    f"({prompt.meta['where']}), which is {tokens} tokens with what method "
                    f"{self._config.method.name} adds, come to {tokens + drawn}, and the model "
                    f"has {positions} positions; at most {max(positions - tokens, 0)} would fit"
                )

    def _request(self, prompt: Prompt, seed: int) -> Request:
        visit = Visit(prompt, self._config.rollout.samples, seed)
        return self._asked(visit, self._method.ask(visit, self._known()))

    def _check_sought(self, codec: Codec) -> None:
        """Refuse texts that a method looks for in responses, and no response's text can hold, or
        are not one token.
        """
        for key, text in self._method.sought.items():
            if text.strip() not in (read := codec.decode(codec.encode(text))):
                raise ConfigError(
                    f"method.{key}: {text!r} would never be found in a response: with this "
                    f"model's tokenizer it reads {read!r}; name a text of ordinary tokens"
                )
        for key, text in self._method.single.items():
            if (count := len(codec.encode(text))) != 1:
                raise ConfigError(
                    f"method.{key}: {text!r} is {count} tokens of this model's tokenizer, and "
                    f"method {self._config.method.name} needs a single one; name one of the "
                    "tokenizer's own tokens"
                )

    def _asked(self, visit: Visit, asked: Ask) -> Request:
        prompt, samples, seed = visit
        scripts = asked.scripts or (Plain(),) * samples
        if len(scripts) != samples:
            raise ConfigError(
                f"method.name: {self._config.method.name} gave {len(scripts)} scripts for "
                f"{samples} responses"
            )
        return Request(self._told(prompt, asked), seed, scripts, dict(asked.note))

    @cached_property
    def _renderer(self) -> Renderer:
        """One with a tokenizer of its own: prompts are asked in one thread while responses are read
        in others.
        """
        return Renderer(copy.deepcopy(self._tokenizer), self._config.data.prompt)

    def _told(self, prompt: Prompt, asked: Ask) -> Prompt:
        if not asked.suffix:
            return prompt
        [(text, tokens)] = self._renderer.render(
            [prompt.meta["question"] + asked.suffix], [prompt.meta["where"]]
        )
        return replace(prompt, text=text, tokens=tokens)
