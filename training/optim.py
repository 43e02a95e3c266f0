"""Parameter groups, the optimizer, the learning-rate schedules, and one clipped step."""

import math

import torch

from configs.schema import OptimConfig, ScheduleConfig


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, 1-D parameters (norm weights) don't unless `decay_all`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_all or p.ndim >= 2]
    others = [p for p in parameters if not (config.decay_all or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, horizon: int) -> float:
    """The learning rate of step number `step`, counted from 1, of a run of `horizon` steps."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    low = schedule.min_lr_ratio
    if schedule.name == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, horizon - schedule.warmup_steps)
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
    decay_steps = schedule.decay_fraction * horizon
    left = (horizon - step) / decay_steps if decay_steps else math.inf
    return peak * (low + (1 - low) * min(1.0, left))


def finite_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss; one that is not finite makes every gradient NaN, so that `optimizer_step` skips the step on all ranks.

    An infinite loss may have finite gradients, and this asks no rank to wait for another.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def optimizer_step(engine, lr: float, grad_clip: float) -> float:
    """Clip the accumulated gradient, step, and clear it; the gradient's norm before clipping.

    Where the norm is not finite the weights stay as they are. Call in place of the last micro-batch's `engine.step()`.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if engine.zero_optimization_stage() > 0:  # DeepSpeed clips, and skips the step where the norm is not finite
        engine.step()
        return float(engine.get_global_grad_norm())
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    if not math.isfinite(norm):
        for p in parameters:
            p.grad = None  # nothing to step with
    engine.step()
    return norm
