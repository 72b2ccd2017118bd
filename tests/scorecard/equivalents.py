"""Mutants of kernels and references that no check can kill, each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
