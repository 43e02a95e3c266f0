"""Several sources with weights, which are shares of the documents."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator

from configs.errors import ConfigError
from configs.load import load
from data.sources.base import Source, SourceConfig, Stream, source_class, source_names, source_of


class Part(SourceConfig):
    """One of the sources of a mixture."""

    weight: float = Field(gt=0)

    @field_validator("source")
    @classmethod
    def _check_source(cls, value: str) -> str:
        mixable = [name for name in source_names() if source_class(name).mixable]
        if value not in mixable:
            raise ValueError(f"must be {', '.join(mixable[:-1])} or {mixable[-1]}")
        return value


class Mixture(Source):
    """The sources that `data.mixture` lists; each takes the keys it leaves out from `data`."""

    mixable = False

    def mistakes(self) -> Iterator[str]:
        if not self.config.mixture:
            yield "mixture=[]: must list the sources to mix, each with a weight"
        for number, part in enumerate(self.config.mixture):
            try:
                self.read_part(part)
            except ConfigError as error:
                yield from (f"mixture[{number}].{line}" for line in error.errors)

    def read_part(self, part: dict[str, Any]) -> Part:
        shared = {key: getattr(self.config, key) for key in SourceConfig.model_fields if key != "mixture"}
        return load({**shared, "source": None, **part}, Part)

    @cached_property
    def parts(self) -> list[tuple[float, Source]]:
        """The sources with their weights."""
        return [(part.weight, source_of(part, self.progress)) for part in map(self.read_part, self.config.mixture)]

    def check(self) -> None:
        for _, source in self.parts:
            source.check()

    def open(self) -> Stream:
        return MixedStream([(weight, source.open()) for weight, source in self.parts])

    def facts(self) -> list:
        weights = [part["weight"] for part in self.config.mixture]  # as they are written, 3 and not 3.0
        return [[weight, source.fingerprint()] for weight, (_, source) in zip(weights, self.parts, strict=True)]


class MixedStream:
    """Documents of several streams, as many of each as its weight says, in a fixed order.

    Next is always the stream that is furthest behind its share. The mixture ends when that one has no more, so that
    the shares hold to the end.
    """

    def __init__(self, parts: list[tuple[float, Stream]]):
        self.weights = [weight for weight, _ in parts]
        self.streams = [stream for _, stream in parts]
        self.start = {"taken": [0] * len(parts), "streams": [None] * len(parts)}
        self.taken = self.start["taken"]
        self.ending = ""  # why there are no more

    def __iter__(self) -> Iterator[dict]:
        self.taken = list(self.start["taken"])
        iterators = [iter(stream) for stream in self.streams]
        while True:
            after_next = [(taken + 1) / weight for taken, weight in zip(self.taken, self.weights, strict=True)]
            which = after_next.index(min(after_next))
            try:
                document = next(iterators[which])
            except StopIteration:
                taken = ", ".join(f"{count:,}" for count in self.taken)
                self.ending = (
                    f"data.mixture[{which}] has no more documents, so the mixture ends with {taken} documents of its "
                    "sources; what the others still have is left out"
                )
                return
            self.taken[which] += 1
            yield {"text": document["text"]}

    def state_dict(self) -> dict:
        # A stream from which nothing was taken since the start has no state of its own yet.
        states = [
            stream.state_dict() if taken > before else state
            for stream, taken, before, state in zip(
                self.streams, self.taken, self.start["taken"], self.start["streams"], strict=True
            )
        ]
        return {"taken": list(self.taken), "streams": states}

    def load_state_dict(self, state: dict) -> None:
        self.start = state
        for stream, part in zip(self.streams, state["streams"], strict=True):
            if part is not None:
                stream.load_state_dict(part)
