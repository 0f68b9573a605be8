"""What corral.yaml says of the record: the audit trail, and usage with its prices. Part of settings.py."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from corral.config.values import Duration, Retention, Size


class Section(BaseModel):
    """A mapping of the file: unknown fields are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AuditSettings(Section):
    """The audit trail."""

    durability: Literal["written", "synced"] = Field(
        "written", description="A record survives a killed process, or a power cut as well."
    )
    retention: Retention = Field(400 * 86400.0, description="How long records are kept.")
    content: Literal["none", "hash", "full"] = Field(
        "hash",
        description="Kept of prompts and answers: nothing, keyed hashes, or also the text of keys that have it kept.",
    )
    content_recipient: str | None = Field(
        None, pattern=r"^age1[02-9ac-hj-np-z]{58}$", description="Whom that text is encrypted for, by age's public key."
    )
    content_retention: Retention = Field(30 * 86400.0, description="How long it is kept.")
    content_max: Size = Field(
        64 << 10, gt=0, le=256 << 10, description="Most bytes of a prompt, and of an answer, that are kept."
    )
    content_redact: tuple[str, ...] = Field(
        (r"(?<![\w.+-])[\w.+-]++(?:@[\w-]++\.[\w.+-]++)+", r"(?<!\d)(?:\d[ .-]{0,2}){12,18}\d(?!\d)"),
        description="Regular expressions of what is left out of it: e-mail addresses, card numbers. Keys always are. "
        "Requests wait while one is looked for: it must not read the same text over and over, as `\\w+@` would.",
    )
    checkpoint: Duration = Field(
        60.0, gt=0, le=300, description="How often what came is signed; CheckpointLate is for what is late by more."
    )
    checkpoints: Path = Field(
        Path("audit/checkpoints.jsonl"),
        description="File of the signed checkpoints; a relative one is in control.state.",
    )
    signing_key_file: Path = Field(
        Path("audit.key"), description="Has the Ed25519 key that signs them, made at the first start."
    )
    follows: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{32}$",
        description="Id of the key that signed before, where it is lost or changed: this one goes on behind it.",
    )
    webhook: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Gets each checkpoint by POST, so that it is kept elsewhere."
    )

    @field_validator("content_recipient")
    @classmethod
    def _recipient(cls, given: str | None) -> str | None:
        if given is not None:
            import pyrage  # most that read settings have none of it

            try:
                pyrage.x25519.Recipient.from_str(given)
            except pyrage.RecipientError as error:
                raise ValueError(f"is no public key of age's: {error}") from None
        return given

    @field_validator("content_redact")
    @classmethod
    def _expressions(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for one in given:
            try:
                re.compile(one)
            except re.error as error:
                raise ValueError(f"{one!r} is no regular expression: {error}") from None
        return given

    @model_validator(mode="after")
    def _for_whom(self) -> AuditSettings:
        if self.content == "full" and self.content_recipient is None:
            raise ValueError("content: full needs content_recipient: the text is kept encrypted alone")
        return self


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
