"""`corral loadtest`: load, measured at the client, and its report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from corral.cli import common
from corral.cli.keys import Span

Value = TypeVar("Value")


@click.group("loadtest")
def command() -> None:
    """Put load on Corral, or on any Ollama, and measure what callers see."""


@command.command("run")
@click.option("--url", help="What to load.  [default: the stack of the state folder]")
@click.option(
    "--key-file", multiple=True, metavar="FILE", help="Keys, one a line (repeatable).  [default: $CORRAL_KEY]"
)
@click.option("--no-key", is_flag=True, help="Send no key, as to a bare Ollama.")
@click.option("--model", multiple=True, metavar="NAME[=WEIGHT]", help="Repeatable.  [default: the only one there is]")
@click.option("--zipf", type=click.FloatRange(0, 10), metavar="S", help="Weights 1/rank^S in the order of --model.")
@click.option("--api", type=click.Choice(["native", "openai", "anthropic"]), default="native", show_default=True)
@click.option("--route", type=click.Choice(["chat", "generate", "embed"]), default="chat", show_default=True)
@click.option("--closed", type=click.IntRange(1, 10_000), metavar="CALLERS", help="Each asks again once answered.")
@click.option(
    "--rate", type=click.FloatRange(0, 100_000, min_open=True), metavar="R", help="R requests a second, evenly."
)
@click.option("--poisson", type=click.FloatRange(0, 100_000, min_open=True), metavar="R", help="R a second, at random.")
@click.option("--trace", metavar="azure|mooncake|FILE", help="As a real service was asked (times and lengths).")
@click.option("--speed", type=click.FloatRange(0, 1e6, min_open=True), default=1.0, help="How fast a trace is played.")
@click.option(
    "--requests",
    type=click.IntRange(1, 1_000_000),
    help="At most.  [default: 100, or all of a trace, or what --duration bounds]",
)
@click.option("--duration", type=Span(), help="For how long requests begin.  [default: 10m at most]")
@click.option("--prompt-tokens", default="64", show_default=True, metavar="N|DIST", help="64, 64-512, exp:256, …")
@click.option("--max-tokens", default="64", show_default=True, metavar="N|DIST", help="Length of an answer, likewise.")
@click.option("--from", "since", type=Span(), default="0s", help="From which time of a trace on.")
@click.option("--cap-prompt", type=click.IntRange(1), metavar="N", help="Cut a trace's prompts to N tokens.")
@click.option("--cap-output", type=click.IntRange(1), metavar="N", help="Cut a trace's answers to N tokens.")
@click.option("--stream/--no-stream", default=True, help="Whether answers are streamed.  [default: --stream]")
@click.option(
    "--warmup", type=click.IntRange(0, 10_000), help="Requests before it counts.  [default: one a model and key]"
)
@click.option("--timeout", type=Span(), default="2m", show_default=True, help="How long a request may take.")
@click.option("--retry-after", is_flag=True, help="Wait as a 429 or 503 says, and ask again.")
@click.option(
    "--max-in-flight", type=click.IntRange(1, 60_000), default=4096, show_default=True, help="Open loop only."
)
@click.option("--slo", multiple=True, metavar="ttft=TIME", help="What a good request keeps to: ttft, itl, e2e.")
@click.option("--threshold", multiple=True, metavar="'p95_ttft<2s'", help="Exit status 1 where it fails (repeatable).")
@click.option("--output", metavar="DIR", help="For result.json and report.html.  [default: loadtest-DATE-TIME]")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed, the same requests.")
@click.option("--ca", metavar="FILE", help="Certificates to trust for https.")
@click.option("--i-may-load", metavar="HOST", help="Load another machine; $CORRAL_LOADTEST_ALLOW must name it too.")
@common.options
def run(as_json: bool, state: str | None, **given: Any) -> None:
    """Run a load test; it ends by itself, and Ctrl-C ends it with a report of what was done."""
    from corral.loadtest import files, outcome, summary
    from corral.loadtest import run as runner
    from corral.loadtest.errors import LoadTestError
    from corral.loadtest.progress import Progress
    from corral.loadtest.result import encode

    folder = None
    try:
        options, thresholds = _options(given, state)
        folder = files.folder(given["output"])
        click.echo(f"corral: {outcome.describe(options.load)} at {options.target.url}", err=True)
        done = runner.run(options, Progress(sys.stderr))
        result = outcome.result(options, done, _command(), thresholds)
        data, page = files.save(folder, result)
    except LoadTestError as error:
        if folder is not None and not given["output"]:
            with suppress(OSError):  # not where it has something in it
                folder.rmdir()
        common.fail(str(error), as_json)
    if as_json:
        _write(encode(result))
    else:
        click.echo(f"\n{summary.text(result)}\n\nreport  {page}\ndata    {data}")
    failed = [verdict.text for verdict in result.thresholds if not verdict.passed]
    if failed:
        click.echo(f"corral: failed: {', '.join(failed)}", err=True)
    if result.interrupted:
        click.echo("corral: stopped early; the report has what was done until then", err=True)
    if not result.total.ok:
        click.echo("corral: no request was answered whole", err=True)
    if failed or result.interrupted or not result.total.ok:
        raise SystemExit(1)


def _options(given: dict[str, Any], state: str | None) -> tuple[Any, list[Any]]:
    """The run and its thresholds. UsageError or LoadTestError."""
    from corral.loadtest import arguments, guard, lengths, run, thresholds
    from corral.loadtest.requests import ROUTES, Shape
    from corral.loadtest.schedule import CLOSED, Load

    route = (given["api"], given["route"])
    if route not in ROUTES:
        raise click.UsageError(f"--api {route[0]} has no --route {route[1]}")
    kind = _usage(arguments.mode, given["closed"], given["rate"], given["poisson"], given["trace"])
    if given["trace"] is None and (
        given["cap_prompt"] or given["cap_output"] or given["speed"] != 1.0 or given["since"]
    ):
        raise click.UsageError("--speed, --from, --cap-prompt and --cap-output go with --trace")
    judged = [_usage(thresholds.parse, text) for text in given["threshold"]]
    objectives = _usage(arguments.objectives, given["slo"])
    prompt, output = (_named(lengths.parse, given, name) for name in ("prompt_tokens", "max_tokens"))
    keys = _usage(arguments.keys, given["key_file"], os.environ, given["no_key"])
    models = _usage(arguments.models, given["model"], given["zipf"])
    if not 0 < given["timeout"] <= arguments.DURATION_MAX:
        raise click.UsageError("--timeout is from 1ms to 24h")
    arrivals = _usage(arguments.arrivals_of, kind, given["trace"], given["since"])
    requests, seconds = _usage(arguments.bounds, kind, given["requests"], given["duration"], arrivals, given["speed"])
    target = guard.target(given["url"] or _url(state), given["i_may_load"], os.environ)
    tls = _usage(arguments.tls, target.tls, given["ca"])
    if not models:
        listed = run.discover(target, keys[0][1], tls)
        if len(listed) != 1:
            raise click.UsageError(
                f"name a model with --model; there {'are' if listed else 'is'}: " + (", ".join(listed) or "none")
            )
        models = ((listed[0], 1.0),)
    load = Load(
        mode=kind,
        models=models,
        keys=tuple(name for name, _ in keys),
        requests=requests,
        duration=seconds,
        concurrency=given["closed"] or 0,
        rate=given["rate"] or given["poisson"] or 0.0,
        trace=Path(given["trace"]).name if given["trace"] else "",
        arrivals=arrivals,
        speed=given["speed"],
        since=given["since"],
        prompt_tokens=None if arrivals else prompt,
        max_tokens=None if arrivals else output,
        cap_prompt=given["cap_prompt"],
        cap_output=given["cap_output"],
        seed=given["seed"],
    )
    warmup = given["warmup"] if given["warmup"] is not None else max(len(models), len(keys))
    options = run.Options(
        target=target,
        shape=Shape(target, *route, given["stream"]),
        load=load,
        secrets=tuple(secret for _, secret in keys),
        warmup=warmup,
        timeout=given["timeout"],
        objectives=objectives,
        retry_after=given["retry_after"],
        max_in_flight=given["max_in_flight"] if kind != CLOSED else given["closed"],
        tls=tls,
    )
    return options, judged


def _usage(function: Callable[..., Value], *arguments: Any) -> Value:
    try:
        return function(*arguments)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _named(function: Callable[[str], Value], given: dict[str, Any], name: str) -> Value:
    try:
        return function(given[name])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--" + name.replace("_", "-")) from None


def _url(state: str | None) -> str:
    if url := os.environ.get("CORRAL_URL"):
        return url
    from corral.stack.state import running

    folder = common.folder(state)
    stack = folder.stack() or {}
    if not running(folder) or "url" not in stack:
        raise folder.nothing_runs(", or give --url")
    return str(stack["url"])


def _write(data: bytes) -> None:
    """All of it on standard output; an unbuffered one takes a part where a signal comes in between."""
    out, rest = sys.stdout.buffer, memoryview(data)
    while rest:
        rest = rest[out.write(rest) :]
    out.flush()


def _command() -> str:
    """The command line as it was given; keys are never part of one."""
    return shlex.join(["corral", *sys.argv[1:]])


@command.command("report")
@click.argument("result", type=click.Path(path_type=Path), required=False)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="The page.  [default: beside RESULT]")
@click.option("--compare", type=click.Path(path_type=Path), metavar="OTHER", help="Another result, shown beside.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a result, and nothing else.")
@common.options
def report(
    result: Path | None, output: Path | None, compare: Path | None, schema: bool, as_json: bool, state: str | None
) -> None:
    """Make the report of a result.json (or of the folder with it) again, or of two side by side."""
    from corral.loadtest import comparison
    from corral.loadtest import report as pages
    from corral.loadtest import result as results
    from corral.loadtest.errors import LoadTestError

    if schema:
        click.echo(json.dumps(results.schema(), indent=2))
        return
    if result is None:
        raise click.UsageError("name a result.json of `corral loadtest run`, or its folder")
    try:
        first = results.read(result)
        other = results.read(compare) if compare else None
    except LoadTestError as error:
        common.fail(str(error), as_json)
    page = output or results.place(result).with_name("comparison.html" if other else "report.html")
    try:
        page.write_text(pages.page(first, other), encoding="utf-8")
    except OSError as error:
        common.fail(f"{page} cannot be written: {error.strerror}", as_json)
    shown: dict[str, Any] = {"report": str(page)}
    if other:
        shown["comparison"] = comparison.rows(first, other)
    text = comparison.text(first, other) + "\n\n" if other else ""
    click.echo(json.dumps(shown, indent=2) if as_json else f"{text}report  {page}")
