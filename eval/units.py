"""What a result is measured in, by the name of its metric, and how it is printed."""

UNITS = {  # of the last part of a result's key; whatever is not here is a number without a unit
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "exact_match", "f1", "average", "passkey"), "%"),
    "loss": "nats/token",
    "bits_per_byte": "bits/byte",
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), "perplexity"),
    **dict.fromkeys(("tokens", "tokens_per_second"), "count"),
    "memory_gb": "GB",
}
FORMATS = {"%": ",.2f", "perplexity": ",.2f", "count": ",.0f", "GB": ",.2f"}


def metric_of(key: str) -> str:
    return key.rpartition("/")[2]


def unit_of(key: str) -> str | None:
    """Return the unit of a result, such as `arc_easy/acc`."""
    return UNITS.get(metric_of(key))


def in_unit(key: str, value: float, sign: str = "") -> str:
    """Return a value, or a difference with sign="+", as its unit has it: shares between 0 and 1 in percent."""
    unit = unit_of(key)
    return format(100 * value if unit == "%" else value, sign + FORMATS.get(unit, ",.4f"))


def labelled(key: str) -> str:
    """Return the metric's name with its unit, if the name does not say it."""
    unit = unit_of(key)
    name = metric_of(key).replace("_", " ")
    return f"{name} ({unit})" if unit in ("%", "nats/token", "GB") else name
