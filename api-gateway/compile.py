"""Compiles a gateway's request path with mypyc: python compile.py FOLDER, where FOLDER holds the package `corral`.

The sources stay what they are: each module listed here gets an extension module beside its file, which Python imports
instead; what is in C has a module beside it that does without. A module with msgspec structs is not compiled, since
their annotations are read when they are made; nor is one with coroutines: what waits gains nothing, and a cancellation
that meets nested contexts is an error there. Needs the packages of requirements/compile.txt, those of
requirements/runtime.txt, a C compiler and Python's headers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

MODULES = (
    "fleet/choose.py",
    "fleet/dispatch.py",
    "fleet/hanging.py",
    "fleet/node.py",
    "fleet/pools.py",
    "fleet/slots.py",
    "fleet/tickets.py",
    "gateway/access.py",
    "gateway/admit.py",
    "gateway/authenticate.py",
    "gateway/avoid.py",
    "gateway/catalogue.py",
    "gateway/checks.py",
    "gateway/crashing.py",
    "gateway/crowding.py",
    "gateway/decode.py",
    "gateway/exchange.py",
    "gateway/heads.py",
    "gateway/health.py",
    "gateway/heartbeat.py",
    "gateway/journal.py",
    "gateway/listen.py",
    "gateway/local.py",
    "gateway/metrics.py",
    "gateway/queue.py",
    "gateway/recover.py",
    "gateway/relay.py",
    "gateway/resume.py",
    "gateway/route.py",
    "gateway/schedule.py",
    "gateway/server.py",
    "gateway/settle.py",
    "gateway/snapshot.py",
    "gateway/state.py",
    "gateway/throughput.py",
    "gateway/upstream.py",
    "store/content.py",
    "store/keys.py",
    "store/budget.py",
    "store/limits.py",
    "store/lua.py",
    "store/share.py",
    "store/sharing.py",
    "store/slots.py",
    "store/spool.py",
    "store/suspects.py",
    "store/valkey.py",
    "wire/answers.py",
    "wire/anthropic_answers.py",
    "wire/common.py",
    "wire/continuation.py",
    "wire/decode.py",
    "wire/errors.py",
    "wire/http1.py",
    "wire/native.py",
    "wire/openai_answers.py",
    "wire/options.py",
    "wire/scan.py",
    "wire/transcript.py",
)
NATIVE = ("fleet/_beginnings.c", "store/_keyed.c", "wire/_scan.c")
"""What is written in C."""

MYPY = ("--config-file=", "--ignore-missing-imports", "--follow-imports=silent")
DIRECT = ("-fno-semantic-interposition", "-fno-plt")
"""Nobody puts another function in the place of one of ours: they are called directly, or become part of the caller."""


def main() -> int:
    """Compile in the folder that the command line names; the exit status."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "corral").is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    os.chdir(sys.argv[1])
    # mypyc stands in the tests' environment and in none that serves: imported here, so that --help needs neither.
    from mypyc.build import mypycify
    from setuptools import Extension, setup

    with tempfile.TemporaryDirectory(prefix="corral-compile-") as work:
        path = mypycify(
            [*MYPY, *(f"corral/{module}" for module in MODULES)],
            opt_level="3",
            debug_level="0",
            group_name="corral",
            target_dir=work,
        )
        for extension in path:
            extension.extra_compile_args += DIRECT
        setup(
            name="corral-compiled",
            packages=[],
            ext_modules=[
                *path,
                *(Extension(f"corral.{name[:-2].replace('/', '.')}", [f"corral/{name}"]) for name in NATIVE),
            ],
            script_args=["--quiet", "build_ext", "--inplace", "--build-temp", f"{work}/objects", "--build-lib", work],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
