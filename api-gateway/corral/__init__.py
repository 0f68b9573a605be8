"""Corral: the production platform for self-hosted LLMs on Ollama."""

__version__ = "0.1.0"
