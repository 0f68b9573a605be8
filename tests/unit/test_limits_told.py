"""What a caller is told of its limits: in headers and in words."""

from __future__ import annotations

from corral.gateway.admit import headers, refusal
from corral.store.budget import Budget
from corral.store.limits import Verdict


def test_headers_and_text_say_the_same() -> None:
    budget = Budget("k", rpm=5, tpm=100, daily_tokens=50)
    verdict = Verdict("daily_tokens", 3, 24.0, 3600.5, 5, 50, 7, 3600.5)
    error = refusal(verdict, budget)
    assert (error.status, error.code) == (429, "rate_limited")
    assert "50 tokens per day" in error.message
    assert error.retry_after is not None and 3601 <= error.retry_after <= 3662
    assert headers(verdict, budget).split(b"\r\n")[:6] == [
        b"x-ratelimit-limit-requests: 5",
        b"x-ratelimit-remaining-requests: 3",
        b"x-ratelimit-reset-requests: 24000ms",
        b"x-ratelimit-limit-tokens: 50",
        b"x-ratelimit-remaining-tokens: 7",
        b"x-ratelimit-reset-tokens: 3600500ms",
    ]


def test_a_policy_to_deny_tells_nothing_of_what_is_left() -> None:
    verdict = Verdict("store", 0, 0.0, 1.0)
    assert headers(verdict, Budget("k", rpm=5)) == headers(verdict, Budget("k", rpm=5, tpm=5)) == b""
    assert refusal(verdict, Budget("k", rpm=5)).status == 503
