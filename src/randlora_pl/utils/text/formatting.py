"""Formatting of durations and sizes."""


def duration(seconds: float, digits: int = 0) -> str:
    """Return a duration as text: ``18 s``, ``3 min``, ``2 h 05 min``, ``31 h`` or ``1,200 days``.

    Args:
        seconds: Duration in seconds.
        digits: Decimals of durations below 90 seconds.
    """
    if seconds < 90:
        return f"{seconds:.{digits}f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours} h" if hours < 72 else f"{round(hours / 24):,} days"


def byte_size(count: float) -> str:
    """Return a number of bytes as text: ``999 bytes``, ``1.0 kB``, ``170.5 MB`` or ``37.0 GB`` of 10⁹ bytes."""
    for unit, digits in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**digits:
            return f"{count / 10**digits:,.1f} {unit}"
    return f"{count:.0f} bytes"
