"""`python -m eval.speed.decoding plan=true`: how the core flash_tpa decides to train, and whether it is right."""

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.speed.contestants import Contestant
from eval.speed.measure import device_name, in_turns
from model.cores.base import AttentionMask
from model.cores.flash_tpa import FUSED_PASS_COST, PASS_COST, FlashTPA, plan

TOKENS = 512  # of the sequence that both ways are timed on, forward and backward


def show_plan(rivals: list[Contestant], device: torch.device, rounds: int) -> int:
    """Print the cost model of every TPA among `rivals`, and the times of both ways measured in turns."""
    table = Table(
        "model", "size", "heads", "ranks", "multiply-adds / MHA's", "cost: factors", "materialized", "chosen",
        "ms: factors", "materialized", box=box.SIMPLE_HEAD,
        title=f"{device_name(device)}; a pass over a logit costs {PASS_COST[device.type]} multiply-adds, "
        f"{FUSED_PASS_COST} in a flash kernel; timed on {TOKENS} tokens, forward and backward", title_justify="left",
    )  # fmt: skip
    for rival in rivals:
        if rival.core != "flash_tpa":
            continue
        attention = rival.network.attention
        costs = plan(attention, device.type)
        times = in_turns([step(rival, way, device) for way in ("factors", "materialized")], rounds)
        table.add_row(
            rival.model, rival.size, str(attention.n_heads), "/".join(map(str, attention.ranks.values())),
            f"{costs.factors_forward / costs.materialized_forward:.2f}", f"{costs.factors:,.0f}",
            f"{costs.materialized:,.0f}", costs.choice, *(f"{time:,.1f}" for time in times),
        )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 160)
    console.print(table)
    return 0


def step(rival: Contestant, way: str, device: torch.device):
    """A function that runs the attention of one layer forward and backward, without projections, and times it in ms."""
    from eval.speed.measure import timer

    network = rival.network
    with torch.enable_grad():
        attention = network.attention.build(network.d_model, 0, network.core).to(device)
        x = torch.randn(1, TOKENS, network.d_model, device=device)
        positions = torch.arange(TOKENS, device=device)[None]
        qkv = attention.rotate(attention.project(x), positions)
        leaves: list[Tensor] = []
        for factors in (qkv.q, qkv.k, qkv.v):
            for name in "abc":
                if getattr(factors, name) is not None:
                    setattr(factors, name, getattr(factors, name).detach().clone().requires_grad_())
                    leaves.append(getattr(factors, name))
    core, probe = FlashTPA(training=way), None

    def once():
        nonlocal probe
        with torch.enable_grad():
            out = core(qkv, lambda qkv, positions: qkv, positions, AttentionMask(), attention.config.scale)
            probe = torch.randn_like(out) if probe is None else probe
            return torch.autograd.grad(out, leaves, probe, allow_unused=True)

    once()
    return timer(once, device)
