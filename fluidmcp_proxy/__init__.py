"""Turns a FluidMCP configuration into running LLM endpoints."""

__version__ = "0.1.0"
