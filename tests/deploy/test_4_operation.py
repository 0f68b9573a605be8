"""A node is added, containers and a certificate are replaced, all of it taken down and up: in this order."""

from __future__ import annotations

import re
import socket
import ssl
import time

import httpx
from deploy.site import MODEL, SLOW, Site
from support.load import COMPLETIONS, WHOLE
from support.process import until

MESSAGES = [{"role": "user", "content": "Say hi."}]
ONE_LINE = re.compile(r"[^\n]+\n?")


def test_a_node_is_added_and_no_stream_is_cut(site: Site, say: list[str]) -> None:
    site.up("--profile ollama-3")
    site.give_model("ollama-3")
    # So many clients that each gateway has three requests at once: it gives the first two to the first two nodes.
    with site.load("added", clients=6) as load:
        load.more(3, seconds=SLOW)
        began = time.monotonic()
        site.corral("nodes add http://ollama-3:11434 --name ollama-3")
        seconds = time.monotonic() - began
        load.more(3, "ollama-3", seconds=SLOW)
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    say.append(f"added ollama-3 in {seconds:.1f} s under load: {len(load.answers)} requests, all whole")


def test_containers_are_replaced_one_after_another_and_nothing_is_cut(site: Site, say: list[str]) -> None:
    replaced = ("control", "api-gateway-1", "api-gateway-2")
    with site.load("replaced") as load:
        load.more(3, seconds=SLOW)
        began = time.monotonic()
        for service in replaced:
            site.do(f"docker compose up -d --wait --no-deps --force-recreate {service}")
        seconds = time.monotonic() - began
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    say.append(f"replaced {', '.join(replaced)} in {seconds:.1f} s: {len(load.answers)} requests, all whole")


def test_a_new_certificate_is_shown_after_a_reload_that_cuts_nothing(site: Site) -> None:
    path = site.folder / "secrets/tls.pem"
    old = _shown(site)
    with site.load("certificate") as load:
        load.more(3, seconds=SLOW)
        site.do(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=new"
            " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout new.key -out new.pem 2> /dev/null"
            " && cat new.pem new.key > secrets/tls.pem && docker compose kill -s USR2 haproxy"
        )
        until(lambda: _shown(site) != old, "the edge shows the new certificate")
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert path.read_text().startswith(ssl.DER_cert_to_PEM_cert(_shown(site)).strip()[:200])


def _shown(site: Site) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", site.ports["CORRAL_HTTPS_PORT"]), 60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.3"
        shown = secured.getpeercert(binary_form=True)
        assert shown
        return shown


def test_down_and_up_keeps_keys_audit_and_models(site: Site, say: list[str]) -> None:
    keys = {key["id"]: key["name"] for key in site.corral("keys list")}
    audit = site.all_recorded()
    assert audit
    site.do("docker compose --profile ollama-3 down")
    assert site.docker("ps", "-aq").split() == []
    say.append(f"docker compose down and up again: {site.up('--profile ollama-3'):.1f} s to come back")
    assert {key["id"]: key["name"] for key in site.corral("keys list")} == keys
    again = site.audit()
    assert {request_id: again[request_id]["outcome"] for request_id in audit} == {
        request_id: row["outcome"] for request_id, row in audit.items()
    }
    site.knows("ollama-1", "ollama-2", "ollama-3")
    answer = httpx.post(
        site.url() + COMPLETIONS,
        json={"model": MODEL, "messages": MESSAGES, "max_tokens": 4},
        headers=site.headers(),
        timeout=SLOW,
    )
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]


def test_a_secret_that_the_database_needs_is_not_made_anew(site: Site) -> None:
    pepper = site.folder / "secrets/pepper"
    kept = pepper.rename(site.folder / "kept")
    try:
        done = site.shell("scripts/compose-init")
        assert done.returncode == 1 and not pepper.exists()
        assert ONE_LINE.fullmatch(done.stderr) and "restore it from a backup" in done.stderr, done.stderr
    finally:
        kept.rename(pepper)
    site.do("scripts/compose-init")
