"""The one settings model: what corral.yaml may say, with its defaults.

Durations are float seconds and sizes are bytes once loaded. Every process reads the same file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator

from corral.config.errors import ConfigError
from corral.config.options import REFUSE, policy
from corral.config.record import AuditSettings, Section, UsageSettings
from corral.config.values import (
    BaseUrl,
    DatabaseUrl,
    Duration,
    HostPattern,
    Listen,
    ListenOrNone,
    Name,
    Network,
    Origin,
    RedisUrl,
    Registry,
    Size,
    Whole,
    loopback,
)


class NodeSettings(Section):
    """One Ollama server."""

    url: BaseUrl = Field(description="Where its API listens.")
    name: Name = Field("", description="Unique in the fleet; node-1, node-2, … by default.")
    slots: Whole = Field(4, ge=1, le=1024, description="Requests at once per model (OLLAMA_NUM_PARALLEL).")
    memory: Size | None = Field(None, description="Memory for models; learned when not given.")
    max_models: Whole | None = Field(None, ge=1, description="Resident at once (OLLAMA_MAX_LOADED_MODELS).")
    accelerator: Literal["gpu", "cpu"] | None = Field(None, description="What it computes on.")


class ModelSettings(Section):
    """One model of the catalogue. No catalogue: whatever the nodes list."""

    name: str = Field(min_length=1, max_length=256, description="As Ollama writes it, such as llama3.2:3b.")
    digest: str | None = Field(None, pattern=r"^sha256:[0-9a-f]{64}$", description="The digest it must have.")
    copies: Whole = Field(1, ge=1, description="Nodes that keep it resident.")
    pin: bool = Field(False, description="Never unloaded to make room.")
    num_ctx: Whole | None = Field(None, ge=1, description="Context length in tokens, of every request.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Per option: a value that every request has, {min, max} bounds, or refuse."
    )

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return policy(options)

    @model_validator(mode="after")
    def _one_context(self) -> ModelSettings:
        if self.num_ctx is not None and self.options.get("num_ctx", REFUSE) not in (REFUSE, self.num_ctx):
            raise ValueError("num_ctx and options.num_ctx differ: give one of them")
        return self


class MirrorSettings(Section):
    """Where the nodes pull models from."""

    registry: Listen | None = Field(
        None, description="Private registry (host:port) in place of Ollama's library, for names that name no host."
    )
    insecure: bool = Field(False, description="It speaks plain HTTP.")
    registries: tuple[Registry, ...] = Field(
        ("registry.ollama.ai",),
        description="Registries that a model's name may name beside it, such as hf.co; no node is sent to any other.",
    )


class TenantsSettings(Section):
    """Nodes that serve certain tenants alone, so that no other tenant can tell from the time that a cache saves."""

    nodes: dict[str, tuple[Name, ...]] = Field(
        default_factory=dict,
        description="A tenant's nodes, of those of `nodes`: it is served by no other, and they serve no tenant that "
        "does not name them.",
    )

    @field_validator("nodes")
    @classmethod
    def _some(cls, nodes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for tenant, names in nodes.items():
            if not names:
                raise ValueError(f"{tenant}: name at least one node")
        return nodes


class PreloadSettings(Section):
    """A node that comes (back) into service gets its models of the catalogue first."""

    timeout: Duration = Field(
        900.0, description="After this it goes into service anyway, with a warning; 0: it never waits."
    )


class QueueSettings(Section):
    """Who waits for a free slot."""

    length: Whole = Field(256, ge=0, description="Requests that may wait per model.")
    wait: Duration = Field(30.0, description="Longest wait for a slot.")
    heartbeat: Duration | None = Field(
        None,
        ge=1,
        description="A stream of server-sent events without a token for so long begins with a comment, and has one as "
        "often until its first token (15s suits most proxies); errors are told in it from then on. None given: none.",
    )


class RequestSettings(Section):
    """What one request may hold; more of it is a 400. Its bytes: gateway.max_body."""

    messages: Whole = Field(2048, ge=1, description="Messages of a chat.")
    images: Whole = Field(16, ge=0, description="Images, all messages together.")
    tools: Whole = Field(128, ge=0, description="Tools offered to the model.")
    inputs: Whole = Field(2048, ge=1, description="Texts to embed.")
    stops: Whole = Field(16, ge=0, description="Stop strings.")
    nesting: Whole = Field(64, ge=8, le=256, description="Depth of arrays and objects in each other.")
    token_ids: Whole = Field(
        0, ge=0, description="Ids of `context` are below this, the least vocabulary (one beyond ends Ollama); 0: none."
    )


class GatewaySettings(Section):
    """The data plane."""

    processes: Whole = Field(1, ge=1, le=256, description="Gateway processes under `corral up`.")
    max_duration: Duration = Field(1800.0, gt=0, description="Longest life of one request.")
    drain: Duration | None = Field(
        None,
        description="Longest wait for answers that have begun, when this gateway alone is stopped (SIGTERM); "
        "max_duration when not given. `corral down` waits 25 s at most.",
    )
    queue: QueueSettings = QueueSettings()
    first_token: Duration = Field(
        60.0, gt=0, description="Longest wait for a node's first token, and for its model's load where nobody leads."
    )
    between_tokens: Duration = Field(20.0, gt=0, description="Longest silence within a stream.")
    continuation: bool = Field(True, description="An answer that its node left is gone on with on another one.")
    listen: Listen = Field("127.0.0.1:8081", description="Where this gateway listens.")
    name: Name = Field("gateway-1", description="Unique in the fleet; names its spool.")
    nodes_url: BaseUrl = Field("http://127.0.0.1:8082", description="HAProxy's front end before the nodes.")
    control_url: BaseUrl = Field("http://127.0.0.1:8090", description="Control's own address, for /internal.")
    spool: Path = Field(Path("spool"), description="Folder of spools; this gateway's is <name> in it.")
    spool_max: Size = Field(
        4 << 30, gt=0, description="Most bytes of a spool that control has not taken; above, requests get a 503."
    )
    cache: Path = Field(Path("cache"), description="Folder of snapshots; this gateway's is <name> in it.")
    metrics: ListenOrNone = Field("127.0.0.1:9101", description='Where /metrics is served, without a key; "": nowhere.')
    access_log: str = Field("-", description="File of the access log; - is standard output.")
    max_body: Size = Field(32 << 20, gt=0, description="Largest request body.")
    request: RequestSettings = RequestSettings()
    trusted_proxies: tuple[Network, ...] = Field(
        ("127.0.0.1/32",), description="Peers whose X-Forwarded-For and X-Request-ID are believed."
    )

    @property
    def longest_drain(self) -> float:
        """Seconds of `drain`."""
        return self.max_duration if self.drain is None else self.drain


OnFailure = Literal["local", "deny"]


class LimitSettings(Section):
    """Limits of a key that states none of its own; null is no limit."""

    rpm: Whole | None = Field(600, ge=1, description="Requests a minute.")
    tpm: Whole | None = Field(200_000, ge=1, description="Tokens a minute.")
    concurrency: Whole | None = Field(32, ge=1, description="Requests at once.")
    daily_tokens: Whole | None = Field(None, ge=1, description="Tokens a day (UTC).")
    monthly_tokens: Whole | None = Field(None, ge=1, description="Tokens a month (UTC).")


class FailureSettings(Section):
    """What becomes of each limit without Valkey; one word instead of this section is meant for all of them."""

    rpm: OnFailure = Field("local", description="Requests a minute: each gateway admits its share, or none.")
    concurrency: OnFailure = Field("local", description="Requests at once.")
    tpm: OnFailure = Field("local", description="Tokens a minute.")
    daily_tokens: OnFailure = Field("local", description="Tokens a day.")
    monthly_tokens: OnFailure = Field("local", description="Tokens a month.")


class LimitsSettings(Section):
    """Limits, and what happens to them without Valkey."""

    answer_tokens: Whole = Field(
        512, ge=1, description="Tokens reserved for an answer whose caller states no bound, until they are counted."
    )
    on_store_failure: FailureSettings = FailureSettings()
    default: LimitSettings = LimitSettings()

    @field_validator("on_store_failure", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in get_args(OnFailure):
                raise ValueError("expected 'local' or 'deny'")
            return dict.fromkeys(FailureSettings.model_fields, value)
        return value

    def denied(self) -> list[str]:
        """The limits that admit nobody without Valkey."""
        return [name for name, what in self.on_store_failure.model_dump().items() if what == "deny"]


class StoreSettings(Section):
    """Where things are kept."""

    database: DatabaseUrl = Field(
        "sqlite:///corral.db", description="Opened by control alone; a relative file is in control.state."
    )
    database_password_file: Path | None = Field(
        None, description="Has PostgreSQL's password; a relative file is in control.state."
    )
    valkey: RedisUrl = Field(
        "redis://127.0.0.1:6390/0",
        description="Valkey or Redis 7, of this installation alone; a name is looked up anew for each connection.",
    )
    valkey_password_file: Path | None = Field(
        None, description="Has its password, read at the start; a relative file is in control.state."
    )


class EdgeSettings(Section):
    """The address that clients use."""

    host: str = Field("127.0.0.1", pattern=r"^[0-9A-Za-z.:_-]+$", description="Address to listen on.")
    port: Whole = Field(8080, ge=1, le=65535, description="The one fixed port of `corral up`.")
    plaintext: bool = Field(False, description="Allow plain HTTP beyond loopback.")
    tls_port: Whole = Field(8443, ge=1, le=65535, description="Port of TLS, where there is a certificate.")
    certificate: Path | None = Field(None, description="PEM file of certificate chain and key.")
    hosts: tuple[HostPattern, ...] = Field(
        (),
        description="Names it is called by (*.example.com: all under it; *: any), beside addresses and local names. "
        "None given: only those on loopback, any beyond.",
    )
    origins: tuple[Origin, ...] = Field(
        (),
        description="Web pages, by origin, that may read its answers (CORS); with any given, others get a 403. None "
        "given: where only local names are served, pages of the web get a 403 too; beyond, they may read no answer.",
    )
    ollama: Listen | None = Field(
        None, description="A front end of the nodes that asks no key: for loopback or an internal network."
    )

    @model_validator(mode="after")
    def _keys_stay_private(self) -> EdgeSettings:
        if not self.plaintext and not loopback(self.host):
            raise ValueError("keys would cross the network in clear text: edge.plaintext: true allows that")
        return self


class CanarySettings(Section):
    """A generation of one token on a resident model of each node, to see that it computes."""

    interval: Duration = Field(15.0, description="Seconds between two of a node; 0: none.")
    timeout: Duration = Field(10.0, gt=0, description="Longest wait for its answer.")


class ControlSettings(Section):
    """The control plane."""

    listen: Listen = Field("127.0.0.1:8090", description="Where control listens.")
    state: Path = Field(Path("."), description="State folder: database and secrets.")
    haproxy_socket: Path | None = Field(None, description="HAProxy's master socket, to reload it.")
    metrics: ListenOrNone = Field(
        "127.0.0.1:9102",
        description="Where metrics, Prometheus's targets and Alertmanager's webhook are, without a key; \"\": nowhere.",
    )
    canary: CanarySettings = CanarySettings()
    placement: bool = Field(
        True, description="Control loads and unloads models by demand; without it, nodes load what they are asked for."
    )


class MonitoringSettings(Section):
    """Prometheus and Alertmanager."""

    haproxy: ListenOrNone = Field("", description="Where Prometheus finds HAProxy's /metrics, if not as it listens.")
    alertmanager: BaseUrl | None = Field(
        None, description="Where control asks Alertmanager what fires; without it, that is by what it is sent."
    )
    slack_webhook_file: Path | None = Field(None, description="File with the address of a Slack webhook.")
    slack_channel: str = Field("#llm-alerts", pattern=r"^[#@]?[\w.-]{1,80}$", description="Channel for alerts.")
    runbooks: str = Field(
        "", pattern=r"^(https?://\S+[^/\s])?$", description="Where the runbooks are that alerts link to, if elsewhere."
    )


class HaproxySettings(Section):
    """An HAProxy that control renders the configuration of; `corral up` starts and configures its own."""

    config: Path | None = Field(None, description="The haproxy.cfg to render; none: that of `corral up`.")
    gateways: dict[Name, Listen] = Field(default_factory=dict, description="Where each gateway is: name: host:port.")
    control: Listen = Field("127.0.0.1:8090", description="Where control is.")
    nodes: Listen = Field("127.0.0.1:8082", description="Where HAProxy listens for gateways.")
    stats: Listen = Field("127.0.0.1:8404", description="Where it shows statistics and metrics.")
    socket: Path = Field(Path("/run/haproxy/haproxy.sock"), description="Its socket for statistics.")


class AuthSettings(Section):
    """Keys."""

    pepper_file: Path = Field(Path("pepper"), description="File with the pepper of the key verifiers.")
    internal_token_file: Path = Field(Path("internal.token"), description="Has the bearer of /internal.")
    stale: Duration = Field(
        600.0, gt=0, description="For so long keys are believed that cannot be read anew: control or database is away."
    )


class Settings(Section):
    """corral.yaml."""

    nodes: tuple[NodeSettings, ...] = ()
    models: tuple[ModelSettings, ...] = ()
    mirror: MirrorSettings = MirrorSettings()
    tenants: TenantsSettings = TenantsSettings()
    preload: PreloadSettings = PreloadSettings()
    gateway: GatewaySettings = GatewaySettings()
    limits: LimitsSettings = LimitsSettings()
    store: StoreSettings = StoreSettings()
    audit: AuditSettings = AuditSettings()
    usage: UsageSettings = UsageSettings()
    edge: EdgeSettings = EdgeSettings()
    control: ControlSettings = ControlSettings()
    haproxy: HaproxySettings = HaproxySettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    auth: AuthSettings = AuthSettings()

    def valkey_address(self) -> str:
        """``store.valkey`` with the password of its file. Raises ConfigError where that cannot be read."""
        if self.store.valkey_password_file is None:
            return self.store.valkey
        path = self.control.state / self.store.valkey_password_file
        try:
            password = path.read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError([f"store.valkey_password_file: {path}: cannot be read: {reason}"]) from None
        if not password:
            raise ConfigError([f"store.valkey_password_file: {path} is empty: expected Valkey's password"])
        parts = urlsplit(self.store.valkey)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{host}"))

    @model_validator(mode="before")
    @classmethod
    def _name_nodes(cls, data: Any) -> Any:
        nodes = data.get("nodes") if isinstance(data, dict) else None
        if not isinstance(nodes, list | tuple):
            return data
        named = [
            {**node, "name": f"node-{number}"} if isinstance(node, dict) and not node.get("name") else node
            for number, node in enumerate(nodes, 1)
        ]
        return {**data, "nodes": named}

    @model_validator(mode="after")
    def _unique(self) -> Settings:
        for what, names in (("node", [n.name for n in self.nodes]), ("model", [m.name for m in self.models])):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {what}s are called {name!r}: names must differ")
        if self.tenants.nodes and self.edge.ollama is not None:
            raise ValueError("edge.ollama asks for no key and so knows no tenant: not together with tenants.nodes")
        return self


def load(path: str | Path | None = None, env: Mapping[str, str] | None = None, *, whole: bool = False) -> Settings:
    """Settings of a file (none: the defaults) with the environment over it. Raises ConfigError.

    ``whole``: what an operator wrote, so that a node which is named there and is none of its nodes is a slip. (What
    `corral up` wrote may be behind in one of the two: a reload changes nodes at once, tenants at the next start.)
    """
    from corral.config.reader import read

    return read(Path(path) if path is not None else None, os.environ if env is None else env, whole)


def schema() -> dict[str, Any]:
    """The JSON Schema of corral.yaml, for editors and checkers."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Settings.model_json_schema()
