"""The SGLang engine on a real server keeps the contract of every engine."""

from __future__ import annotations

import pytest
from transformers import Qwen2ForCausalLM

from tests.engine.conftest import STOP
from tests.engine_contract import EngineContract, Weights


class TestContract(EngineContract):
    stop_id = STOP

    @pytest.fixture
    def weights(self, models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]) -> tuple[Weights, Weights]:
        first, second = ([(n, p.detach()) for n, p in model.named_parameters()] for model in models)
        return first, second
