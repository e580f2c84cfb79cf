"""The objective of a policy update as one value: what loss and kernels execute, whatever the
algorithm is called.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Aggregate = Literal["sequence", "token", "constant"]
Surrogate = Literal["clip", "reweight"]
Ratio = Literal["token", "sequence"]
KL = Literal["none", "reward", "k1", "k2", "k3"]
LossKL = Literal["none", "k1", "k2", "k3"]
Deviation = Literal["population", "sample", "others"]
Guard = Literal["std", "variance", "floor"]


class Importance(NamedTuple):
    """Weighs a token that other weights drew, by rho = exp(policy before the update - engine).

    truncate: min(rho, cap), truncated importance sampling (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). mask: rho within [low, high], 0 outside
    (IcePop, Ling team 2025).
    """

    rule: Literal["none", "truncate", "mask"] = "none"
    cap: float = 2.0
    low: float = 0.5
    high: float = 5.0


class Spread(NamedTuple):
    """The scale that normalised advantages are divided by.

    `deviation`: of the population, of a sample (n - 1), or of the others alone (a sample too;
    undivided if that is 0). `guard` against a spread of 0: std: deviation + epsilon; variance:
    sqrt(variance + epsilon); floor: sqrt(max(variance, epsilon)).
    """

    deviation: Deviation = "population"
    guard: Guard = "floor"
    epsilon: float = 1e-8

    def scale(self, variance: float) -> float:
        """Divisor of a value, from a variance."""
        if self.guard == "std":
            return variance**0.5 + self.epsilon
        return (
            variance + self.epsilon if self.guard == "variance" else max(variance, self.epsilon)
        ) ** 0.5


class Objective(NamedTuple):
    """The loss of one update: the sum over response tokens of weight times

        surrogate + beta KL - bonus entropy

    with ratio = pi / pi_old, of the token or of its whole sequence (exp of the mean log-ratio; its
    gradient goes through the token's own log-prob), A the token's advantage and c its importance
    weight:

    - `clip`: -c min(ratio A, clip(ratio, 1 - low, 1 + high) A), Schulman et al. 2017, eq. 7; if A <
      0 at most -c dual A (Ye et al. 2020).
    - `reweight`: -c sg(clip(ratio, 1 - low, 1 + high)) A log pi, with sg a constant to the gradient
      (MiniMax 2025).

    `kl` estimates the KL to the initial model with d = log pi_initial - log pi (Schulman 2020,
    "Approximating KL Divergence"): k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d; `reward` takes beta
    times the k1 still to be paid off the advantage instead, with log-probs from before the update.
    `tokens` says how advantages are whitened over all tokens of an iteration, if at all. The
    weights make of the sum a mean over each sequence's tokens, then over sequences (`sequence`);
    over all tokens (`token`); or a sum over each sequence's tokens, divided by `divisor` (None: the
    update's longest response), then a mean over sequences (`constant`).
    """

    surrogate: Surrogate = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    ratio: Ratio = "token"
    kl: KL = "none"
    beta: float = 0.0
    bonus: float = 0.0
    aggregate: Aggregate = "sequence"
    divisor: int | None = None
    tokens: Spread | None = None
    importance: Importance = Importance()

    @property
    def loss_kl(self) -> LossKL:
        """The KL that stands in the loss."""
        return "none" if self.kl == "reward" else self.kl

    @property
    def needs_reference(self) -> bool:
        """True if the initial model's log-probs are asked for."""
        return self.kl != "none"

    @property
    def every_token(self) -> bool:
        """True if a token of advantage 0 has a gradient too."""
        return self.loss_kl != "none" or self.bonus != 0.0
