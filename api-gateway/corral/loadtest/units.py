"""Figures for people."""

from __future__ import annotations


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.{2 if value < 0.01 else 1 if value < 0.1 else 0}f} ms"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} s"


def tick(value: float) -> str:
    """A round time, as an axis has it."""
    if value == 0:
        return "0"
    size, unit = (1.0, "s") if value >= 0.9999 else (1e-3, "ms") if value >= 0.9999e-3 else (1e-6, "us")
    return f"{float(f'{value / size:.4g}'):g} {unit}"


def number(value: float) -> str:
    """A number with about three digits, thousands apart."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}"


def percent(share: float) -> str:
    """A share."""
    text = f"{share * 100:.{2 if 0 < share < 0.1 or 0.9 < share < 1 else 1}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"
