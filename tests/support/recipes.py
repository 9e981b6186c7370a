"""Texts of recipes."""

from __future__ import annotations

MINIMAL = "model: m\ndata: {path: d}\n"
