"""The run's configuration: one typed section per room, read from YAML and checked before anything
starts.
"""

from megatron_efr.config.data import DataConfig as DataConfig
from megatron_efr.config.data import DatasetConfig as DatasetConfig
from megatron_efr.config.data import PairsDataConfig as PairsDataConfig
from megatron_efr.config.data import PromptConfig as PromptConfig
from megatron_efr.config.data import SftDataConfig as SftDataConfig
from megatron_efr.config.evaluation import EvaluationConfig as EvaluationConfig
from megatron_efr.config.grading import GradingConfig as GradingConfig
from megatron_efr.config.grading import JudgingConfig as JudgingConfig
from megatron_efr.config.grading import PartConfig as PartConfig
from megatron_efr.config.grading import VerifierConfig as VerifierConfig
from megatron_efr.config.learning import AlgorithmConfig as AlgorithmConfig
from megatron_efr.config.learning import MethodConfig as MethodConfig
from megatron_efr.config.learning import OptimizerConfig as OptimizerConfig
from megatron_efr.config.learning import PreferenceConfig as PreferenceConfig
from megatron_efr.config.learning import SftTrainingConfig as SftTrainingConfig
from megatron_efr.config.learning import TrainingConfig as TrainingConfig
from megatron_efr.config.model import LoraConfig as LoraConfig
from megatron_efr.config.model import ModelConfig as ModelConfig
from megatron_efr.config.model import ParallelConfig as ParallelConfig
from megatron_efr.config.model import ThinkingConfig as ThinkingConfig
from megatron_efr.config.model import check_parallel as check_parallel
from megatron_efr.config.output import CheckpointConfig as CheckpointConfig
from megatron_efr.config.output import ObserveConfig as ObserveConfig
from megatron_efr.config.programs import DpoConfig as DpoConfig
from megatron_efr.config.programs import EvaluateConfig as EvaluateConfig
from megatron_efr.config.programs import RunConfig as RunConfig
from megatron_efr.config.programs import SftConfig as SftConfig
from megatron_efr.config.programs import TrainConfig as TrainConfig
from megatron_efr.config.rollout import EnginesConfig as EnginesConfig
from megatron_efr.config.rollout import EvaluationEnginesConfig as EvaluationEnginesConfig
from megatron_efr.config.rollout import RolloutConfig as RolloutConfig
from megatron_efr.config.rollout import TimeoutsConfig as TimeoutsConfig
from megatron_efr.config.section import ConfigError as ConfigError
from megatron_efr.config.section import Section as Section
