"""Several sources with weights, which are shares of the documents."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pydantic import Field

from configs.errors import ConfigError
from configs.load import load
from data.sources.base import Source, SourceConfig, Stream, source_of


class Part(SourceConfig):
    """One of the sources of a mixture."""

    in_mixture = True
    weight: float = Field(gt=0, le=1e9)


class Mixture(Source):
    """The sources that `data.mixture` lists; each takes the keys it leaves out from `data`."""

    mixable = False
    is_watched = True
    is_any = True

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
    def sources(self) -> list[Source]:
        return [source_of(self.read_part(part), self.progress) for part in self.config.mixture]

    def check(self) -> None:
        for source in self.sources:
            source.check()

    def open(self) -> Stream:
        weights = [float(part["weight"]) for part in self.config.mixture]
        return MixedStream(weights, [source.open() for source in self.sources])

    def has_changed(self, fingerprint: str) -> bool:
        return all(source.is_watched for source in self.sources) and super().has_changed(fingerprint)

    def facts(self) -> list:
        weights = [part["weight"] for part in self.config.mixture]  # as they are written, 3 and not 3.0
        return [[weight, source.fingerprint()] for weight, source in zip(weights, self.sources, strict=True)]


class MixedStream:
    """Documents of several streams: next is always the one that is furthest behind its share, until it has no more."""

    def __init__(self, weights: list[float], streams: list[Stream]):
        self.weights, self.streams = weights, streams
        self.start = {"taken": [0] * len(streams), "streams": [None] * len(streams)}
        self.taken = self.start["taken"]
        self.ending = ""  # why there are no more

    def __iter__(self) -> Iterator[dict]:
        self.taken = list(self.start["taken"])
        iterators = [iter(stream) for stream in self.streams]
        while True:
            after_next = [(taken + 1) / weight for taken, weight in zip(self.taken, self.weights, strict=True)]
            which = after_next.index(min(after_next))
            document = next(iterators[which], None)
            if document is None:
                taken = ", ".join(f"{count:,}" for count in self.taken)
                self.ending = (
                    f"data.mixture[{which}] has no more documents, so the mixture ends with {taken} documents of its "
                    "sources; what the others still have is left out"
                )
                return
            self.taken[which] += 1
            yield {"text": document["text"]}

    def state_dict(self) -> dict:
        states = list(self.start["streams"])
        for number, stream in enumerate(self.streams):
            if self.taken[number] > self.start["taken"][number]:  # otherwise it has no state of its own yet
                states[number] = stream.state_dict()
        return {"taken": list(self.taken), "streams": states}

    def load_state_dict(self, state: dict) -> None:
        self.start = state
        for stream, part in zip(self.streams, state["streams"], strict=True):
            if part is not None:
                stream.load_state_dict(part)
