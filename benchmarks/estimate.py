"""How far the guess of a prompt's tokens, by which tokens are reserved, is from what a model counts.

Texts of several kinds become chat bodies as callers send them; a node (the embedded one, with SmolLM2) counts them.
Prints a line for each body: its bytes, tokens guessed and counted, and the error (guessed / counted - 1): of the guess
for a key that asks for the first time, and for one that has asked six times for texts of that kind.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "api-gateway")]

import httpx  # noqa: E402
from support.servers import MODEL, embedded_node  # noqa: E402

from corral.gateway.settle import learn  # noqa: E402
from corral.wire.decode import DECODERS  # noqa: E402

CHINESE = "今天天气很好,我们去公园散步吧。那里有很多花,还有一个小湖,孩子们在湖边喂鸭子。"
GERMAN = "Die Verwaltung prüft, ob die Übergangsfrist für bestehende Verträge über das Jahresende hinaus gelten kann. "
SIZES = (200, 1000, 2000)


def texts() -> dict[str, str]:
    """Kinds of text, each some thousand characters long."""
    code = (ROOT / "api-gateway/corral/gateway/exchange.py").read_text()
    prose = (ROOT / "docs/architecture.md").read_text()
    table = json.dumps([{"id": number, "price": number * 3.25, "ok": number % 2 == 0} for number in range(200)])
    return {"English": prose, "Python": code, "JSON": table, "German": GERMAN * 50, "Chinese": CHINESE * 120}


def main() -> int:
    """Print the table; the exit status."""
    errors: list[float] = []
    learned: list[float] = []
    with tempfile.TemporaryDirectory() as folder, embedded_node(Path(folder)) as node:
        print(f"{'text':8} {'bytes':>6} {'guessed':>8} {'counted':>8} {'error':>7} {'learned':>8}")
        for kind, text in texts().items():
            density = 1.0
            for number, size in enumerate(SIZES * 3):
                body = {"model": MODEL, "messages": [{"role": "user", "content": text[:size]}], "stream": False}
                raw = json.dumps(body | {"options": {"num_predict": 1}}, ensure_ascii=False).encode()
                guessed = DECODERS["/api/chat"](raw, "estimate", lambda name: None).estimate
                answer = httpx.post(node.url + "/api/chat", content=raw, timeout=120).json()
                if "prompt_eval_count" not in answer:
                    print(f"{kind:8} {len(raw):6} {guessed:8} {answer.get('error')}")
                    continue
                counted = answer["prompt_eval_count"]
                error, later = guessed / counted - 1, int(guessed * density) / counted - 1
                density = learn(density, guessed, counted)
                if number < len(SIZES) * 2:
                    continue
                errors.append(error)
                learned.append(later)
                print(f"{kind:8} {len(raw):6} {guessed:8} {counted:8} {error:+7.0%} {later:+8.0%}")
    for name, found in (("first", errors), ("learned", learned)):
        sizes = sorted(abs(error) for error in found)
        print(f"{name}: median error {sizes[len(sizes) // 2]:.0%}, largest {sizes[-1]:.0%}, {len(sizes)} bodies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
