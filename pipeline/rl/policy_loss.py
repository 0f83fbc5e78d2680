"""The losses of reinforcement learning (eq. 7), as functions of stored trajectories.

With r_t = π_θ(a_t|o_t) / π_collected(a_t|o_t), whose denominator is a constant of the collection,
A_t the advantages, and means over all valid time steps, the loss of a step of adaptation is

    naive   −mean log π_θ(a_t|o_t) A_t         as in the code of Finn et al. 2017
    lvc     −mean r_t A_t                      low variance curvature (Rothfuss et al. 2019)
    dice    −mean (□_t − □_{t−1}) A_t          □_t = Π_{t' ≤ t} r_t', the "magic box" of Foerster et
                                               al. 2018; with advantages: Farquhar et al. 2019

At the parameters of the collection all three have the same gradient, the policy gradient. Their
second derivatives differ: these tell the meta-gradient how θ changes which trajectories are sampled
for adaptation. `naive` ignores that. `dice` has the true second derivative of the expected return
but a high variance; it is exact for plain returns, while a baseline fitted to the same trajectories
and standardisation add a small bias. `lvc` keeps the terms of low variance.

The loss of the query trajectories is −mean r_t A_t, or with `clip` ε that of PPO,
−mean min(r_t A_t, clamp(r_t, 1 − ε, 1 + ε) A_t) (Schulman et al. 2017, eq. 7).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.maml.flat_vector import Params
from pipeline.rl.policies import Distribution
from tasks.control.mdp import Trajectories

SurrogateEstimator = Literal["naive", "lvc", "dice"]
"""The loss of a step of adaptation, by the estimator of its derivatives."""


class Experience(NamedTuple):
    """Trajectories with their advantages: the support or the query of a task, or of B tasks."""

    trajectories: Trajectories
    advantages: Tensor
    """[n, H], or [B, n, H]; 0 where masked."""


def mean_over_steps(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [n, H] over the time steps where `mask` [n, H] is 1, a scalar."""
    return (values * mask).sum() / mask.sum()


def surrogate(
    estimator: SurrogateEstimator,
    log_probability: Tensor,
    collected: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> Tensor:
    """The loss of a step of adaptation, a scalar; all tensors are [n, H].

    `log_probability` is that of the current parameters, `collected` that of the collection.
    """
    if estimator == "naive":
        return -mean_over_steps(log_probability * advantages, mask)
    log_ratio = (log_probability - collected) * mask
    if estimator == "lvc":
        return -mean_over_steps(torch.exp(log_ratio) * advantages, mask)
    until = torch.cumsum(log_ratio, -1)
    gain = torch.exp(until) - torch.exp(until - log_ratio)
    return -mean_over_steps(gain * advantages, mask)


class PolicyObjective:
    """L_T of a policy: a `meta_loss.TaskLoss`, the form that meta-gradients take."""

    def __init__(
        self,
        model: nn.Module,
        distribution: Distribution,
        estimator: SurrogateEstimator,
        clip: float | None = None,
    ):
        self._model, self._distribution = model, distribution
        self._estimator, self._clip = estimator, clip

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Predictions [..., output_size] for observations [..., O] on the device of `params`."""
        prediction: Tensor = functional_call(self._model, params, (x,))
        return prediction

    def loss(self, params: Params, experience: Experience) -> Tensor:
        """The loss of a step of adaptation on one task's n trajectories, a scalar."""
        past, advantages = experience
        log_probability = self._distribution.log_probability(
            self.predict(params, past.observations), past.actions
        )
        return surrogate(
            self._estimator, log_probability, past.log_probabilities, advantages, past.mask
        )

    def loss_and_metrics(
        self, params: Params, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The query loss of one task, and "kl", the KL from the policy that collected; scalars."""
        past, advantages = experience
        prediction = self.predict(params, past.observations)
        log_probability = self._distribution.log_probability(prediction, past.actions)
        ratio = torch.exp((log_probability - past.log_probabilities) * past.mask)
        gain = ratio * advantages
        if self._clip is not None:
            clipped = ratio.clamp(1 - self._clip, 1 + self._clip) * advantages
            gain = torch.minimum(gain, clipped)
        kl = self.kl(prediction.detach(), experience)
        return -mean_over_steps(gain, past.mask), {"kl": kl}

    def kl_at(self, params: Params, experience: Experience) -> Tensor:
        """Mean over valid time steps of KL(π_collected || π_params), a scalar in nats."""
        prediction = self.predict(params, experience.trajectories.observations)
        return self.kl(prediction, experience)

    def kl(self, prediction: Tensor, experience: Experience) -> Tensor:
        """The same KL, given the predictions [n, H, output_size] for the observations."""
        past = experience.trajectories
        return mean_over_steps(self._distribution.kl(past.predictions, prediction), past.mask)
