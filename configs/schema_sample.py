"""The configuration of `python -m eval.sample`."""

import math
from dataclasses import dataclass

from configs.errors import at_least
from configs.schema import CACHE_DTYPES, check_machine

COLDEST = 1e-3  # below it, logits overflow


@dataclass
class SampleConfig:
    run: str
    prompt: str = ""
    count: int = 1
    max_new_tokens: int = 160
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    interactive: bool = False
    factors: bool = False
    cache: bool = True
    cache_dtype: str = "auto"
    prefill_chunk: int = 512
    compile: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def errors(self):
        yield from at_least(1, "", self, "count", "max_new_tokens", "top_k", "prefill_chunk")
        yield from at_least(0, "", self, "seed")
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            yield f"temperature={self.temperature}: must be 0 (always the likeliest token) or at least {COLDEST}"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p}: must lie in (0, 1]"
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            yield f"min_p={self.min_p}: must lie in [0, 1]"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty={self.repetition_penalty}: must be a positive number; 1 changes nothing"
        if self.cache_dtype not in ("auto", *CACHE_DTYPES):
            yield f"cache_dtype={self.cache_dtype}: must be auto, {', '.join(CACHE_DTYPES)}"
        if not self.cache and self.compile:
            yield "compile=true: needs cache=true; without a cache every step has another shape"
        yield from check_machine(self)
