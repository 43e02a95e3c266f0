"""Optimizers, any of `torch.optim` by name; learning-rate schedules, functions in SCHEDULES; and one clipped step."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from configs.block import Block
from configs.errors import Mistakes, did_you_mean
from configs.kinds import MOST_STEPS

UNUSABLE = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)  # abstract; closures; sparse gradients
OPTIMIZERS = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls not in UNUSABLE
}
OWN_ARGS = {"params", "lr", "weight_decay", "betas"}  # which have keys of their own
WHOLE_MATRICES = ("adafactor", "muon")  # not elementwise: a flat share of the parameters would be updated wrongly


class OptimConfig(Block):
    """`args` are further arguments of the optimizer's constructor, as in `++optim.args.momentum=0.9`."""

    name: str = "adamw"  # of a class in torch.optim, in any case
    lr: float = Field(4e-3, gt=0, le=100)  # the peak of the schedule
    weight_decay: float = Field(0.1, ge=0, le=100)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, le=1)
    grad_clip: float = Field(1.0, ge=0, le=1e9)  # on the norm of the mean gradient; 0 turns clipping off
    decay_all: bool = False  # decay 1-D parameters too, as the TPA authors' code does
    args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.lower() not in OPTIMIZERS:
            raise ValueError(f"no such optimizer; {did_you_mean(name.lower(), OPTIMIZERS)}")
        return name.lower()

    @model_validator(mode="after")
    def _takes_args(self):
        """Try the arguments on a matrix of one number: only the optimizer knows what it takes."""
        unknown = self.args.keys() - (inspect.signature(OPTIMIZERS[self.name]).parameters.keys() - OWN_ARGS)
        if unknown:
            raise Mistakes(
                *(f"args.{key}: no argument of {self.name}, or set by another key" for key in sorted(unknown))
            )
        if not self.args:
            return self
        try:
            build_optimizer(torch.nn.ParameterList([torch.zeros(1, 1)]), self)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise Mistakes(f"args={self.args}: {self.name} refuses them ({error})") from None
        return self


def cosine(step: int, schedule: "ScheduleConfig", horizon: int) -> float:
    """Return the share of the way from the lowest to the peak learning rate, falling as half a cosine."""
    progress = (step - schedule.warmup_steps) / max(1, horizon - schedule.warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, progress))) / 2


def wsd(step: int, schedule: "ScheduleConfig", horizon: int) -> float:
    """Return the same share for warm-up, stable, decay (arXiv 2404.06395): 1, then falling linearly to the end."""
    decay_steps = schedule.decay_fraction * horizon
    return min(1.0, (horizon - step) / decay_steps) if decay_steps else 1.0


SCHEDULES: dict[str, Callable[[int, "ScheduleConfig", int], float]] = {"cosine": cosine, "wsd": wsd}


class ScheduleConfig(Block):
    """The learning rate over a run: a linear warm-up, then the schedule called `name`."""

    name: Literal[*SCHEDULES]
    warmup_steps: int = Field(20, ge=0, le=MOST_STEPS)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # the last learning rate over the peak
    decay_fraction: float = Field(0.2, ge=0, le=1)  # wsd: the share of the run that decays
    first_step: int = Field(1, ge=0, le=1)  # the number of the first step; 0: its learning rate is 0, if it warms up


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, horizon: int) -> float:
    """Return the learning rate of step number `step`, counted from 1, of a run of `horizon` steps."""
    later = 1 - schedule.first_step
    step, horizon = step - later, horizon - later
    if step <= schedule.warmup_steps and schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    low = schedule.min_lr_ratio
    return peak * (low + (1 - low) * SCHEDULES[schedule.name](step, schedule, horizon))


def describe(peak: float, schedule: ScheduleConfig, horizon: int) -> str:
    """Return what the learning rate does over a run, and what is unusual in it."""
    rate = partial(learning_rate, peak=peak, schedule=schedule, horizon=horizon)
    warmup, last = schedule.warmup_steps, rate(horizon)
    highest = rate(min(max(warmup, 1), horizon))
    text = f"{schedule.name}, {warmup:,} steps of warm-up to {highest:.3g}, ends at {last:.3g}"
    if warmup > horizon:
        return f"{text}: the warm-up is longer than the run, which only reaches {highest / peak:.0%} of optim.lr"
    fall = max((rate(step) - rate(step + 1) for step in {warmup, horizon - 1} if 0 < step < horizon), default=0.0)
    return f"{text}: it falls by {fall / peak:.0%} of optim.lr in one step" if fall > peak / 2 else text


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer; matrices decay, 1-D parameters (norm weights) do not unless `decay_all`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_all or p.ndim >= 2]
    others = [p for p in parameters if not (config.decay_all or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    cls = OPTIMIZERS[config.name]
    known = inspect.signature(cls).parameters
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps} if "betas" in known else {}
    options |= ({"fused": True} if "fused" in known else {}) | config.args
    return cls([group for group in groups if group["params"]], lr=config.lr, **options)


def finite_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss; one that is not finite makes all gradients NaN, so that all ranks skip the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def optimizer_step(engine, lr: float, grad_clip: float) -> float:
    """Clip the accumulated gradient, step if it is finite, and clear it; return its norm before clipping."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if engine.zero_optimization_stage() > 0:  # DeepSpeed clips, and skips the step if the norm is not finite
        engine.step()
        return float(engine.get_global_grad_norm())
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    if not math.isfinite(norm):
        for p in parameters:
            p.grad = None  # nothing to step with
    engine.step()
    return norm
