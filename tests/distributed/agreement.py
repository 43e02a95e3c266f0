"""Do ZeRO stages, world sizes and accumulation splits train the same? `python -m tests.distributed.agreement`

Print the largest difference of losses and gradient norms from one process at stage 0, for every combination, and exit
with 1 if one is beyond the tolerance. Options: stages=0,1,2,3,3_offload worlds=1,2,4 dtype=fp32 model=t6.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.conftest import SMALL_RUN, prepare_small_data
from tests.distributed.helpers import curve, deviation, run

GLOBAL_BATCH = 8
SPLITS = {1: (8, 2), 2: (4, 2), 4: (2, 1)}  # world size -> micro-batch sizes
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


def main(stages="0,1,2,3,3_offload", worlds="1,2,4", dtype="fp32", model="t6") -> int:
    console, tolerance = Console(file=sys.stdout, highlight=False, soft_wrap=True), TOLERANCES[dtype]
    stages, splits = stages.split(","), [(int(w), micro) for w in worlds.split(",") for micro in SPLITS[int(w)]]
    with tempfile.TemporaryDirectory() as folder:
        common = [*SMALL_RUN, *prepare_small_data(Path(folder)), "trainer.samples=0", "optim.lr=1e-2",
                  f"trainer.global_batch_size={GLOBAL_BATCH}", f"model={model}"]  # fmt: skip

        def train(name: str, stage: str, world: int, micro: int, dtype: str) -> dict:
            mine = [f"run.dir={folder}/{name}", f"deepspeed=zero{stage}", f"trainer.micro_batch_size={micro}"]
            with contextlib.redirect_stdout(io.StringIO()):
                run([*common, *mine, f"trainer.dtype={dtype}"], world)
            return curve(Path(folder) / name)

        reference = train("reference", "0", 1, GLOBAL_BATCH, "fp32")
        grid = [(stage, *split) for stage in stages for split in splits]
        found = {}
        for stage, world, micro in track(grid, description="training", console=console, transient=True):
            ours = train(f"{stage}-{world}-{micro}", stage, world, micro, dtype)
            found[stage, world, micro] = deviation(ours, reference)
    table = Table("stage", title=f"{model}, {dtype}: largest difference from one process at stage 0 in fp32")
    for world, micro in splits:
        table.add_column(f"{world} x {GLOBAL_BATCH // world // micro}", justify="right")
    for stage in stages:
        table.add_row(stage, *(f"{found[stage, *split]:.1e}" for split in splits))
    console.print(table)
    worst = max(found.values())
    console.print(f"columns: processes x accumulation steps; the largest is {worst:.1e}, the tolerance {tolerance:.0e}")
    return int(not worst <= tolerance)


if __name__ == "__main__":
    sys.exit(main(**dict(argument.split("=", 1) for argument in sys.argv[1:])))
