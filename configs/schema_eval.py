"""The typed configuration of evaluations: what every suite has, and each kind of suite's own keys."""

import math
from dataclasses import dataclass, field

from configs.errors import at_least
from configs.schema import check_machine
from model.rope import SCALINGS


@dataclass
class SuiteConfig:
    """A suite is a dataclass derived from this; a YAML in configs/suite/ names it in `_target_`."""

    name: str

    def errors(self):
        return ()


@dataclass
class TextSource:
    """Where a suite's text comes from: local `files`, a Hugging Face data set (`path`), a folder of prepared shards
    (`data_dir`), or, where none is given, the validation split of the run's own data."""

    files: list[str] = field(default_factory=list)  # globs of parquet, jsonl or text files; a text file is one document
    path: str | None = None  # of the hub, or a folder laid out like one of its data sets
    subset: str | None = None
    split: str = "test"  # of the hub's
    column: str = "text"
    join: str | None = None  # rows are no documents of their own: they are put together with this between them
    data_dir: str | None = None  # its val split; the tokenizer must be the run's

    def source_errors(self):
        given = {"files": self.files, "path": self.path, "data_dir": self.data_dir}
        several = [f"suite.{key}={value}" for key, value in given.items() if value]
        if len(several) > 1:
            yield f"{', '.join(several)}: one source of text at a time"


@dataclass
class PerplexitySuite(TextSource, SuiteConfig):
    """Loss over a text in windows of `seq_len` tokens.

    Without a stride the windows lie side by side. With one they overlap: each begins `stride` tokens after the one
    before, and only its last `stride` tokens count (all of the first), so that each token counts once.
    """

    name: str = "perplexity"
    seq_len: int | None = None  # default: the run's
    stride: int | None = None

    def errors(self):
        yield from self.source_errors()
        yield from at_least(1, "suite", self, "seq_len", "stride")


@dataclass
class HarnessSuite(SuiteConfig):
    """Tasks of lm-evaluation-harness, and ours that are made from the built-in corpus."""

    name: str = "harness"
    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = None  # null: each task's own
    metrics: dict[str, str] = field(default_factory=dict)  # the metric of a task that counts; default: acc_norm, or acc
    data_dir: str | None = None  # a folder with <task>_<split>.jsonl: no network is used
    prefetch: bool = False  # fill data_dir from the network, and evaluate nothing
    max_length: int | None = None  # default: the run's seq_len; longer requests lose their beginning
    add_bos: bool = False  # put end-of-text before every context
    samples: bool = False  # write each question with its answers' scores beside the results

    def errors(self):
        if not self.tasks:
            yield f"suite.tasks=[]: name the tasks, as in suite={self.name} suite.tasks=[arc_easy,piqa]"
        if self.prefetch and not self.data_dir:
            yield "suite.data_dir is not set: suite.prefetch=true needs the folder to fill"
        yield from at_least(0, "suite", self, "num_fewshot")
        yield from at_least(2, "suite", self, "max_length")


@dataclass
class LongContextSuite(TextSource, SuiteConfig):
    """What length does: loss on the same tokens with ever more of the text before them, and passkey retrieval."""

    name: str = "long_context"
    lengths: list[int] = field(default_factory=list)  # default: 1, 2, 4, 8 and 16 times the run's seq_len
    scored: int | None = None  # tokens at the end of each window that count; default: half the smallest length
    windows: int = 32  # spread over the documents that are long enough
    scalings: list[str] = field(default_factory=lambda: ["none"])  # of RoPE, one after another: none, linear, ntk, yarn
    factor: float | None = None  # of the scalings; default: length / the run's seq_len
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # where the key is: 0 is the start
    trials: int = 5  # passkeys a depth and length; 0: no retrieval
    beside: list[str] = field(default_factory=list)  # further runs, evaluated alike and shown side by side

    def errors(self):
        yield from self.source_errors()
        yield from at_least(1, "suite", self, "scored", "windows")
        yield from at_least(0, "suite", self, "trials")
        if self.factor is not None and not 1 <= self.factor < math.inf:
            yield f"suite.factor={self.factor}: must be a number of at least 1"
        if any(length < 2 for length in self.lengths):
            yield f"suite.lengths={self.lengths}: must be at least 2"
        elif self.scored and self.lengths and self.scored > min(self.lengths):
            yield f"suite.scored={self.scored}: must be at most the smallest length, {min(self.lengths)}"
        for kind in self.scalings:
            if kind not in SCALINGS:
                yield f"suite.scalings: {kind!r} must be one of {', '.join(SCALINGS)}"
        if not self.scalings:
            yield f"suite.scalings=[]: must name at least one of {', '.join(SCALINGS)}"
        if any(not 0 <= depth <= 1 for depth in self.depths) or not self.depths:
            yield f"suite.depths={self.depths}: must lie in [0, 1], with at least one"


@dataclass
class EvalConfig:
    """`python -m eval.run`."""

    suite: SuiteConfig
    run: str | None = None
    step: int | None = None  # of the checkpoint; null: the newest
    limit: int | None = None  # windows, or questions of each task; null: all
    batch_size: int = 16  # sequences of full length in a forward pass: of shorter ones more
    rope_scaling: str = "none"
    rope_factor: float | None = None
    device: str = "auto"
    dtype: str = "auto"

    def errors(self):
        if self.run is None and not getattr(self.suite, "prefetch", False):
            yield "run is not set: give the run folder, as in run=runs/first"
        yield from at_least(1, "", self, "limit", "batch_size")
        if self.rope_scaling not in SCALINGS:
            yield f"rope_scaling={self.rope_scaling!r}: must be one of {', '.join(SCALINGS)}"
        if (self.rope_scaling == "none") != (self.rope_factor is None):
            yield "rope_scaling and rope_factor go together, as in rope_scaling=yarn rope_factor=4"
        elif self.rope_factor is not None and not 1 <= self.rope_factor < math.inf:
            yield f"rope_factor={self.rope_factor}: must be a number of at least 1"
        if self.rope_scaling != "none" and isinstance(self.suite, LongContextSuite):
            yield f"rope_scaling={self.rope_scaling}: suite=long_context takes suite.scalings=[{self.rope_scaling}]"
        yield from check_machine(self)
