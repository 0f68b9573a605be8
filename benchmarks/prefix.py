"""How well one tenant can tell, by the time to the first token, whether another has just sent a certain prompt.

A node keeps the beginning of a prompt that it has computed (llama.cpp's prefix cache), whoever sent it. In each trial
the victim's tenant sends a secret, the attacker's sends a guess that is right in half of the trials, and times it. The
area under the ROC curve of those times (AUC: the probability that a wrong guess takes longer than a right one) is 0.5
where nothing can be told and 1 where everything can. Printed for a fleet whose nodes everybody shares and for one where
each of the two tenants has a node of its own (`tenants.nodes`), both behind a whole stack with embedded nodes.

The attack is that of "The Early Bird Catches the Leak", arXiv 2409.20002.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "api-gateway")]

import httpx  # noqa: E402
import yaml  # noqa: E402
from support.servers import MODEL  # noqa: E402
from support.stack import Stack, stack  # noqa: E402

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch")
LENGTH = 30
"""Words of a secret; about two tokens each."""


def secret(chance: random.Random, length: int) -> str:
    """A text that no cache knows."""
    return " ".join(chance.choice(WORDS) for _ in range(length))


def asked(client: httpx.Client, key: str, prompt: str) -> tuple[float, str]:
    """Seconds until the answer to one token is there, and the node that gave it."""
    body = {"model": MODEL, "prompt": prompt, "raw": True, "stream": False, "options": {"num_predict": 1}}
    began = time.perf_counter()
    answer = client.post("/api/generate", json=body, headers={"Authorization": f"Bearer {key}"})
    took = time.perf_counter() - began
    answer.raise_for_status()
    return took, answer.headers["x-corral-node"]


def auc(right: list[float], wrong: list[float]) -> float:
    """The probability that a wrong guess takes longer than a right one, ties counting half (Mann-Whitney)."""
    pairs = [(0.5 if one == other else float(other > one)) for one in right for other in wrong]
    return sum(pairs) / len(pairs)


def attack(
    here: Stack, keys: tuple[str, str], trials: int, length: int
) -> tuple[float, float, float, set[str], set[str]]:
    """AUC, median times of right and wrong guesses (seconds), and the nodes that served victim and attacker."""
    chance = random.Random(20_260_101)
    times: dict[bool, list[float]] = {True: [], False: []}
    nodes: tuple[set[str], set[str]] = set(), set()
    with httpx.Client(base_url=here.url, timeout=60, trust_env=False) as client:
        for _ in range(trials):
            one, other = secret(chance, length), secret(chance, length)
            right = chance.random() < 0.5
            nodes[0].add(asked(client, keys[0], one)[1])
            took, node = asked(client, keys[1], one if right else other)
            nodes[1].add(node)
            times[right].append(took)
    medians = [sorted(found)[len(found) // 2] for found in (times[True], times[False])]
    return auc(times[True], times[False]), *medians, *nodes


def run(exits: ExitStack, dedicated: bool, trials: int, length: int) -> float:
    """Start a stack, attack, and print the line."""
    folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
    settings: dict[str, Any] = {"limits": {"default": {"rpm": None, "tpm": None}}}
    if dedicated:
        settings["tenants"] = {"nodes": {"victim": ["node-1"], "attacker": ["node-2"], "default": ["node-2"]}}
    (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(folder / "corral.yaml"), "--nodes", "2" if dedicated else "1"]
    here = exits.enter_context(stack(folder / "state", *arguments, "--node-backend", "llama"))
    keys = tuple(here.corral("keys", "create", name, "--tenant", name)["key"] for name in ("victim", "attacker"))
    found, right, wrong, victims, attackers = attack(here, (keys[0], keys[1]), trials, length)
    kind = "dedicated" if dedicated else "shared"
    served = f"victim on {','.join(sorted(victims))}, attacker on {','.join(sorted(attackers))}"
    told = f"right guess {right * 1e3:4.0f} ms   wrong {wrong * 1e3:4.0f} ms   {served}"
    print(f"{kind:9} AUC {found:.3f}   {told}", flush=True)
    assert not dedicated or not victims & attackers, "a node of one tenant served another"
    return found


def main() -> int:
    """Both fleets; 1 where dedicated nodes leak (AUC above 0.55)."""
    trials, length = (int(given) for given in [*sys.argv[1:], *("1000", str(LENGTH))[len(sys.argv) - 1 :]])
    with ExitStack() as exits:
        run(exits, False, trials // 10, length)
    with ExitStack() as exits:
        return int(run(exits, True, trials, length) > 0.55)


if __name__ == "__main__":
    sys.exit(main())
