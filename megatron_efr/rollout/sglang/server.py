"""One SGLang server over HTTP: the calls that a trainer makes, typed, each with a named limit.

The contract is that of SGLang 0.5.23. A call that is answered with a refusal raises EngineError
with the server's words; one that is not answered raises LostError, and may or may not have been
carried out, as one answered with a failure of the server's own (5xx) raises BrokenError.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import numpy as np

from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError, LostError
from megatron_efr.rollout.sglang.penalty import PenalisedSampling, processor
from megatron_efr.rollout.sglang.routed_experts import decode_routing
from megatron_efr.types import Finish, Response, Sampling, VersionSpan
from megatron_efr.weights.architecture import Architecture

WEIGHTS, CACHES = "weights", "kv_cache"
"""SGLang's names for what a server's memory holds."""

READS = 3
"""Attempts of a call that only reads."""


class BrokenError(LostError):
    """The server says that it has failed."""


class AbortedError(LostError):
    """The server gave a request up, though nobody here asked it to, or answered with weights that
    nobody gave it.
    """


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and how many of the prompt's tokens were found in the server's cache."""

    response: Response
    cached_tokens: int


class Server:
    """The server at `url` (http://host:port). All servers share `session`, which carries the key.

    Given `mixture`, a mixture of experts, responses say which of its experts read their tokens.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        limits: TimeoutsConfig,
        mixture: Architecture | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._limits = limits
        self._mixture = mixture
        self.released: set[str] = set()
        """Parts (WEIGHTS, CACHES) that it gave up; taking others ends it. Empty once restarted."""

    # -- responses
    # ----------------------------------------------------------------------------------------------

    async def generate(self, rid: str, tokens: Sequence[int], sampling: Sampling) -> Answer:
        """One response to a prompt of token ids. `rid` names the request and must be new.

        Ids outside the vocabulary end the server: check them first. Log-probs are after
        temperature, before top-p.
        """
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": list(tokens),
            "return_logprob": True,
            "return_routed_experts": self._mixture is not None,
            "sampling_params": _sampling_params(sampling),
        }
        if isinstance(sampling, PenalisedSampling):
            body["custom_logit_processor"] = processor()
            body["sampling_params"]["custom_params"] = sampling.parameters()
        answered = await self._post("/generate", body, "response_s")
        answer = _answer(answered, sampling, self.url)
        if self._mixture is not None:
            encoded = answered["meta_info"]["routed_experts"]
            read = len(tokens) + answer.response.length - 1
            try:
                routed = decode_routing(encoded, read, self._mixture)
            except ValueError as error:
                raise EngineError(f"{self.url}/generate: {error}") from error
            return replace(answer, response=replace(answer.response, routed_experts=routed))
        return answer

    async def abort(self, rid: str) -> None:
        """End one request; an unknown one is no error."""
        await self._post("/abort_request", {"rid": rid}, "control_s")

    async def abort_all(self) -> None:
        """End every request."""
        await self._post("/abort_request", {"abort_all": True}, "control_s")

    # -- state
    # ----------------------------------------------------------------------------------------------

    async def check(self) -> str:
        """The name of the weights, once the scheduler has shown that it answers, as it does while
        paused too.

        A single attempt: SGLang's own /health wants a token to be generated, and fails if the
        server is paused.
        """
        await self._request("GET", "/server_info", None, "health_s")
        return (await self._request("GET", "/model_info", None, "health_s"))["weight_version"]

    async def info(self) -> dict[str, Any]:
        """The server's arguments."""
        return await self._get("/server_info", "health_s")

    async def version(self) -> str:
        """The name of the weights being served."""
        return (await self._get("/model_info", "health_s"))["weight_version"]

    async def pause(self) -> None:
        """Stop decoding. Requests are kept as tokens, and their caches may be flushed."""
        await self._post("/pause_generation", {"mode": "retract"}, "control_s")

    async def resume(self) -> None:
        """Go on after `pause`, with caches."""
        await self.resume_memory(CACHES)
        await self._post("/continue_generation", {}, "control_s")

    async def flush(self) -> None:
        """Drop all cached keys and values; refused while requests run."""
        await self._post("/flush_cache", {}, "control_s")

    async def release_memory(self) -> bool:
        """Give up the memory of weights and caches, if it has any; it must be paused, and its
        caches flushed.
        """
        if held := [kind for kind in (CACHES, WEIGHTS) if kind not in self.released]:
            await self._post("/release_memory_occupation", {"tags": held}, "control_s")
            self.released.update(held)
        return bool(held)

    async def resume_memory(self, kind: str) -> None:
        """Take the memory of WEIGHTS or CACHES again, if it was given up; what it holds is
        undefined.
        """
        if kind in self.released:
            self.released.remove(kind)
            await self._post("/resume_memory_occupation", {"tags": [kind]}, "control_s")

    # -- weights
    # ----------------------------------------------------------------------------------------------

    async def begin_update(self) -> None:
        """Open the session in which weights may be sent."""
        await self._update("/begin_weight_update", {}, "control_s")

    async def end_update(self) -> None:
        """Close the session."""
        await self._update("/end_weight_update", {}, "control_s")

    async def update_from_tensor(self, body: bytes) -> None:
        """Load one bucket; `body` is that of `tensor_body`, made once for all servers."""
        await self._update("/update_weights_from_tensor", body, "update_s")

    async def join_group(self, body: dict[str, Any]) -> None:
        """Enter a process group with the trainer."""
        await self._update("/init_weights_update_group", body, "update_s")

    async def update_from_distributed(self, body: dict[str, Any]) -> None:
        """Receive one bucket over that group."""
        await self._update("/update_weights_from_distributed", body, "update_s")

    async def leave_group(self, name: str) -> None:
        """End the group."""
        await self._update("/destroy_weights_update_group", {"group_name": name}, "control_s")

    async def update_from_disk(self, path: str) -> None:
        """Load a model folder that the server can read."""
        # the server's own may be dummy
        body = {"model_path": path, "load_format": "auto", "flush_cache": False}
        try:
            await self._update("/update_weights_from_disk", body, "update_s")
        except LostError:
            raise
        except EngineError as error:
            raise EngineError(
                f"{error}; with rollout.transport: disk the server must find {path} on its own "
                "machine, with tensor it need not"
            ) from error

    async def set_version(self, version: int) -> None:
        """Name the weights; requests in flight go on."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._update("/update_weight_version", body, "control_s")

    async def checksums(self) -> dict[str, str]:
        """A checksum of every parameter, by SGLang's own name for it, behind `rankR.` if there are
        several ranks.
        """
        answered = await self._post("/weights_checker", {"action": "checksum"}, "update_s")
        ranks = [rank["checksums"] for rank in answered["ranks"]]
        if len(ranks) == 1:
            return ranks[0]
        return {
            f"rank{r}.{name}": value for r, sums in enumerate(ranks) for name, value in sums.items()
        }

    # -- transport
    # ----------------------------------------------------------------------------------------------

    async def _get(self, path: str, limit: str) -> Any:
        """A call that only reads, and so is repeated when it is lost."""
        for attempt in range(1, READS):
            try:
                return await self._request("GET", path, None, limit)
            except LostError:
                await asyncio.sleep(0.2 * attempt)
        return await self._request("GET", path, None, limit)

    async def _post(self, path: str, body: dict[str, Any] | bytes, limit: str) -> Any:
        return await self._request("POST", path, body, limit)

    async def _update(self, path: str, body: dict[str, Any] | bytes, limit: str) -> None:
        """A call that answers with success and a message."""
        answered = await self._post(path, body, limit)
        if not answered["success"]:
            raise EngineError(f"{self.url}{path}: {answered['message']}")

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | bytes | None, limit: str
    ) -> Any:
        seconds = getattr(self._limits, limit)
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=self._limits.connect_s)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            async with self._session.request(
                method, self.url + path, data=data, timeout=timeout
            ) as answer:
                text = await answer.text()
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                limit = "connect_s"
                seconds = self._limits.connect_s
            raise LostError(
                f"{self.url}{path}: no answer within rollout.timeouts.{limit} = {seconds:g} s"
            ) from error
        except aiohttp.ClientError as error:
            raise LostError(f"{self.url}{path}: {error or type(error).__name__}") from error
        if answer.status not in (200, 202):  # 202: sglang-router will do it
            kind = BrokenError if answer.status >= 500 else EngineError
            raise kind(f"{self.url}{path}: answered {answer.status}: {text[:500]}")
        return json.loads(text) if answer.content_type == "application/json" and text else None


def tensor_body(payloads: Sequence[str], load_format: str | None) -> bytes:
    """The body of `update_from_tensor`: a base64 payload for each tensor-parallel rank."""
    body = {
        "serialized_named_tensors": list(payloads),
        "load_format": load_format,
        "flush_cache": False,
    }
    return json.dumps(body).encode()


def _sampling_params(sampling: Sampling) -> dict[str, Any]:
    """SGLang's words for it; what could change the distribution is set, lest generation_config.json
    sets it.

    `ignore_eos` switches stop_token_ids off as well, and the model's own end of sequence always
    stops if it is not set: so it is set if nothing shall stop.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": not sampling.stop_ids,
    }


def _answer(answered: dict[str, Any], sampling: Sampling, url: str) -> Answer:
    """Read what /generate answered, and hold it to what was asked."""
    # an abort, or weights that nobody published: the request has to be made again
    tokens, meta = answered["output_ids"], answered["meta_info"]
    finish: Finish = meta["finish_reason"]["type"]
    if finish == "abort":
        raise AbortedError(
            f"{url}/generate: aborted after {len(tokens)} tokens: "
            f"{meta['finish_reason'].get('message')}"
        )
    if unpublished := [
        span["version"] for span in meta["weight_versions"] if not span["version"].isdigit()
    ]:
        raise AbortedError(
            f"{url}/generate: answered with weights {unpublished[0]!r}: the server has restarted"
        )
    # log-probs must be those of the tokens: ratios rest on them
    drawn = meta["output_token_logprobs"]
    if [token for _, token, _ in drawn] != tokens:
        raise EngineError(
            f"{url}/generate: {len(tokens)} tokens came with {len(drawn)} log-probs of others"
        )
    # the server's end of sequence must be the run's
    if finish == "stop" and tokens[-1] not in sampling.stop_ids:
        raise EngineError(
            f"{url}/generate: stopped at token {tokens[-1]}, which is none of the stop ids "
            f"{list(sampling.stop_ids)}: the server's model has another end of sequence than the "
            "tokenizer"
        )
    # which publication drew which tokens
    spans = [VersionSpan(int(s["version"]), s["start"], s["end"]) for s in meta["weight_versions"]]
    logprobs = np.array([logprob for logprob, _, _ in drawn], dtype=np.float32)
    response = Response(tuple(tokens), logprobs, finish, _merged(spans))
    return Answer(response, meta["cached_tokens"])


def _merged(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Without empty spans, neighbours of one version made one."""
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            merged[-1] = VersionSpan(span.version, merged[-1].start, span.end)
        elif span.start < span.end:
            merged.append(span)
    return tuple(merged)
