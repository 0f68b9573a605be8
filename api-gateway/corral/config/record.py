"""What corral.yaml says of the record: the audit trail, and usage with its prices. Part of settings.py."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from corral.config.values import Duration


class Section(BaseModel):
    """A mapping of the file: unknown fields are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AuditSettings(Section):
    """The audit trail."""

    durability: Literal["written", "synced"] = Field(
        "written", description="A record survives a killed process, or a power cut as well."
    )
    retention: Duration = Field(400 * 86400.0, description="How long records are kept.")
    content: Literal["none", "hash"] = Field(
        "hash", description="Kept of prompts and answers: keyed hashes, or nothing."
    )
    checkpoint: Duration = Field(60.0, gt=0, description="How often what came is signed.")
    checkpoints: Path = Field(
        Path("audit/checkpoints.jsonl"),
        description="File of the signed checkpoints; a relative one is in control.state.",
    )
    signing_key_file: Path = Field(
        Path("audit.key"), description="Has the Ed25519 key that signs them, made at the first start."
    )
    webhook: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Gets each checkpoint by POST, so that it is kept elsewhere."
    )


class PriceSettings(Section):
    """What a million tokens of a model cost."""

    prompt: float = Field(0.0, ge=0, description="Of prompts.")
    generated: float = Field(0.0, ge=0, description="Generated.")


class UsageSettings(Section):
    """What `corral usage report` shows beside counts."""

    currency: str = Field("USD", pattern=r"^[A-Za-z]{1,8}$", description="Shown with costs.")
    prices: dict[str, PriceSettings] = Field(
        default_factory=dict, description="Per model, or pattern such as qwen2.5:*; the first that fits counts."
    )

    def price_of(self, model: str) -> tuple[float, float]:
        """Of a million tokens of a model, of prompts and generated; 0 where nothing fits."""
        for pattern, price in self.prices.items():
            if fnmatchcase(model, pattern):
                return price.prompt, price.generated
        return 0.0, 0.0
