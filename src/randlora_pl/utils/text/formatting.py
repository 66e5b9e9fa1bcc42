"""Formatting of durations."""


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
