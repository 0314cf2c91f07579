"""The one error of this package."""


class CostModelError(ValueError):
    """Measurements, parameters or a profile can't be used. The message says what was wrong and what to do."""
