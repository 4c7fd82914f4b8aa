"""What goes wrong between a text and its statistics, in one line: the thing, the value, the fix."""


class CalibrationError(ValueError):
    """Calibration data that cannot be used as asked."""
