"""What bad configuration and bad input raise."""


class ConfigError(Exception):
    """One or more mistakes in the configuration or the input; each names the key or file, the value and the remedy."""

    def __init__(self, *errors: str):
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


def at_least(low: int, block: str, config, *keys: str):
    """Mistakes in the keys of a block that must not be less than `low`; null is left to others."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < low:
            yield f"{block}{'.' * bool(block)}{key}={value}: must be at least {low}"
