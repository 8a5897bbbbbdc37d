"""Figures as short text."""


def loss_text(value: float) -> str:
    """Return a loss with four decimals; one that has run away as a power of ten."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Return a time: ``85 ms``, ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
