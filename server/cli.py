"""The `peqa` command: serve, tasks, and the offline verbs of the runtime."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peqa_runtime.cli import app as offline_app
from peqa_runtime.cli import wait_asleep
from peqa_server.commands.doctor import doctor
from peqa_server.commands.keys import app as keys_app
from peqa_server.commands.tasks import app as tasks_app

if TYPE_CHECKING:
    from peqa_server.services import Services
    from peqa_server.start.entrance import Entrance
    from peqa_server.start.loading import ServeOptions
    from peqa_server.start.report import Observing

app = typer.Typer(
    name="peqa",
    help="One frozen integer model, many tasks: make bases, tune, evaluate, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.registered_commands += offline_app.registered_commands
app.add_typer(tasks_app, name="tasks")
app.command("doctor")(doctor)
app.add_typer(keys_app, name="keys")


Base = Annotated[
    Path | None,
    typer.Argument(
        help="Base folder, Hugging Face model folder or .gguf file. Default: the demo.", envvar="PEQA_BASE"
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.", envvar="PEQA_HOST")]
Port = Annotated[
    int, typer.Option(help="Port to listen on; 0 takes a free one.", envvar="PEQA_PORT", min=0, max=65535)
]
Store = Annotated[
    Path | None, typer.Option(help="Folder of the tasks. Default: in the home, by base.", envvar="PEQA_STORE")
]
Home = Annotated[Path, typer.Option(help="Folder for made bases and stores.", envvar="PEQA_HOME")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="PEQA_DEVICE")]
Dtype = Annotated[
    str, typer.Option(help="Of activations: auto, float32, bfloat16, float16.", envvar="PEQA_DTYPE")
]
Bits = Annotated[int, typer.Option(help="Where a folder of floats is quantized.", envvar="PEQA_BITS")]
GroupSize = Annotated[
    int, typer.Option(help="Likewise; -1 = one scale per channel.", envvar="PEQA_GROUP_SIZE")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Longest prompt plus answer, in tokens. Default: the model's.",
        envvar="PEQA_MAX_MODEL_LEN",
        min=1,
    ),
]
MaxSequences = Annotated[
    int | None,
    typer.Option(help="Choices computed at once. Default: 64.", envvar="PEQA_MAX_SEQUENCES", min=1),
]
MaxBatchTokens = Annotated[
    int | None, typer.Option(help="Tokens of one step. Default: 512.", envvar="PEQA_MAX_BATCH_TOKENS", min=1)
]
MaxWait = Annotated[
    float | None,
    typer.Option(
        help="Seconds that a request may have to wait for its turn before a 429. Default: 20.",
        envvar="PEQA_MAX_WAIT",
        min=1,
    ),
]
MaxWaiting = Annotated[
    int | None,
    typer.Option(help="Waiting choices before a 429. Default: 1024.", envvar="PEQA_MAX_WAITING", min=1),
]
MaxWaitingTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of waiting prompts before a 429. Default: 1048576.",
        envvar="PEQA_MAX_WAITING_TOKENS",
        min=1,
    ),
]
UsePrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Whether requests share what is computed of equal beginnings.",
        envvar="PEQA_PREFIX_CACHE",
    ),
]
RowInvariant = Annotated[
    bool,
    typer.Option(
        "--row-invariant",
        help="On a GPU, too, no answer depends to the last bit on what runs beside it. Takes longer.",
        envvar="PEQA_ROW_INVARIANT",
    ),
]
ActivationBits = Annotated[
    int,
    typer.Option(
        help="On a CPU: 16, finer than bfloat16, or 8, which is quicker and costs some quality.",
        envvar="PEQA_ACTIVATION_BITS",
    ),
]
KVCacheDtype = Annotated[
    Literal["auto", "float16", "float32"],
    typer.Option(
        help="Keys and values in float16 or float32. auto: on a CPU float16 where it has fast kernels for it.",
        envvar="PEQA_KV_CACHE_DTYPE",
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="On a GPU, capture no CUDA graphs: a start sooner by seconds, slower answers.",
        envvar="PEQA_ENFORCE_EAGER",
    ),
]
KVBlocks = Annotated[
    int | None,
    typer.Option(help="Blocks of the KV cache. Default: what fits.", envvar="PEQA_KV_BLOCKS", min=1),
]
TaskRows = Annotated[
    int | None,
    typer.Option(
        help="Tasks on the device at once, the base included. Default: 64.", envvar="PEQA_TASK_ROWS", min=1
    ),
]
GroupRows = Annotated[
    int | None, typer.Option(help="Likewise, of kind 'group'. Default: 4.", envvar="PEQA_GROUP_ROWS", min=1)
]
HostCache = Annotated[
    float | None,
    typer.Option(
        help="Memory for scale sets that are not on the device. Default: 1 GiB.",
        envvar="PEQA_HOST_CACHE_GIB",
        min=0.001,
    ),
]
WatchSeconds = Annotated[
    float,
    typer.Option(
        help="How often to look for tasks that another process changed in the store; 0: never.",
        envvar="PEQA_WATCH_SECONDS",
        min=0,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="Keys, as `peqa keys` makes them; every route but health and the page's files then asks for one. A file "
        "of plain keys, one per line, makes each an admin.",
        envvar="PEQA_API_KEY_FILE",
    ),
]
OpenMetrics = Annotated[
    bool,
    typer.Option(
        "--open-metrics", help="/metrics asks for no key (else: an admin's).", envvar="PEQA_OPEN_METRICS"
    ),
]
InsecureOpen = Annotated[
    bool,
    typer.Option(
        "--insecure-open-to-network",
        help="Without keys, listen on other than loopback: whoever reaches the port may then do everything.",
        envvar="PEQA_INSECURE_OPEN_TO_NETWORK",
    ),
]
TrustTemplates = Annotated[
    bool,
    typer.Option(
        "--trust-request-chat-template",
        help="Take `chat_template` from requests: a program of the client's, which runs here in Jinja's sandbox.",
        envvar="PEQA_TRUST_REQUEST_CHAT_TEMPLATE",
    ),
]
MaxUpload = Annotated[
    int | None,
    typer.Option(
        help="Largest scale set file. Default: the largest valid one.", envvar="PEQA_MAX_UPLOAD_MB", min=1
    ),
]
DrainSeconds = Annotated[
    float, typer.Option(help="Time for running answers after SIGTERM.", envvar="PEQA_DRAIN_SECONDS", min=0)
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option(help="What is logged.", envvar="PEQA_LOG_LEVEL", case_sensitive=False),
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(help="Log lines for people or for programs.", envvar="PEQA_LOG_FORMAT"),
]
MetricsCompat = Annotated[
    Literal["vllm"] | None,
    typer.Option(help="/metrics also under this server's names.", envvar="PEQA_METRICS_COMPAT"),
]
TracesEndpoint = Annotated[
    str | None,
    typer.Option(
        help="OTLP collector for traces, such as http://collector:4318. OTEL_ variables do as well.",
        envvar="PEQA_OTLP_TRACES_ENDPOINT",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Report the start as one JSON line.", envvar="PEQA_JSON")
]


@app.command()
def serve(
    base: Base = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    store: Store = None,
    home: Home = Path("~/.peqa"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    bits: Bits = 4,
    group_size: GroupSize = 64,
    max_model_len: MaxModelLen = None,
    max_sequences: MaxSequences = None,
    max_batch_tokens: MaxBatchTokens = None,
    max_wait: MaxWait = None,
    max_waiting: MaxWaiting = None,
    max_waiting_tokens: MaxWaitingTokens = None,
    prefix_cache: UsePrefixCache = True,
    row_invariant: RowInvariant = False,
    enforce_eager: EnforceEager = False,
    activation_bits: ActivationBits = 16,
    kv_cache_dtype: KVCacheDtype = "auto",
    kv_blocks: KVBlocks = None,
    task_rows: TaskRows = None,
    group_rows: GroupRows = None,
    host_cache_gib: HostCache = None,
    watch_seconds: WatchSeconds = 2.0,
    api_key_file: ApiKeyFile = None,
    open_metrics: OpenMetrics = False,
    insecure_open_to_network: InsecureOpen = False,
    trust_request_chat_template: TrustTemplates = False,
    max_upload_mb: MaxUpload = None,
    drain_seconds: DrainSeconds = 30.0,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    metrics_compat: MetricsCompat = None,
    otlp_traces_endpoint: TracesEndpoint = None,
    as_json: AsJson = False,
) -> None:
    """Serve a base and its tasks over HTTP.

    Example: peqa serve bases/smollm2 --port 8000 --store tasks
    """
    began = time.perf_counter()
    from peqa_server.observe.log_format import set_up_logging
    from peqa_server.start.entrance import Entrance
    from peqa_server.start.loading import ServeOptions
    from peqa_server.start.report import Observing

    set_up_logging(log_level, log_format)
    sizes = {
        "max_model_len": max_model_len,
        "max_sequences": max_sequences,
        "max_batch_tokens": max_batch_tokens,
        "max_wait": max_wait,
        "max_waiting": max_waiting,
        "max_waiting_tokens": max_waiting_tokens,
        "prefix_cache": prefix_cache,
        "row_invariant": row_invariant,
        "enforce_eager": enforce_eager,
        "activation_bits": activation_bits,
        "kv_cache_dtype": kv_cache_dtype,
        "num_blocks": kv_blocks,
        "task_rows": task_rows,
        "group_rows": group_rows,
        "host_cache_bytes": None if host_cache_gib is None else int(host_cache_gib * (1 << 30)),
    }
    options = ServeOptions(
        base=base,
        home=home.expanduser(),
        store=store,
        device=device,
        dtype=dtype,
        bits=bits,
        group_size=group_size,
        watch_seconds=watch_seconds,
        engine={name: value for name, value in sizes.items() if value is not None},
    )
    seen = Observing(log_format, metrics_compat, otlp_traces_endpoint, as_json, began)
    entrance = Entrance(
        host, port, api_key_file, open_metrics, insecure_open_to_network, trust_request_chat_template
    )
    raise typer.Exit(_serve(options, entrance, max_upload_mb, drain_seconds, seen))


def _serve(
    options: ServeOptions,
    entrance: Entrance,
    max_upload_mb: int | None,
    drain_seconds: float,
    seen: Observing,
) -> int:
    """Bind, then load beside the running server; the exit status."""
    from peqa_server.app import create_loading_app
    from peqa_server.observe.tracing import TracingUnavailable, open_tracer, tracing_wanted
    from peqa_server.settings import MIB, ServerSettings
    from peqa_server.start.loading import load_services
    from peqa_server.start.report import announce
    from peqa_server.start.run import CannotBind, run

    try:
        endpoint, environ = seen.traces_endpoint, os.environ
        tracer = open_tracer(endpoint, environ) if tracing_wanted(endpoint, environ) else None
        listener = entrance.listen()
    except (CannotBind, TracingUnavailable, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    if entrance.open_without_keys(listener):
        typer.echo(
            f"warning: whoever reaches {entrance.host} may do everything here, without a key", err=True
        )
    settings = ServerSettings(
        key_file=entrance.key_file,
        open_metrics=entrance.open_metrics,
        own_host=entrance.own_host(listener),
        max_upload_bytes=max_upload_mb * MIB if max_upload_mb else None,
        drain_seconds=drain_seconds,
        client_chat_templates=entrance.client_chat_templates,
        metrics_compat=seen.metrics_compat,
    )
    host = entrance.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def load() -> Services:
        services, report = load_services(options, seen.say)
        announce(report, url, entrance.keys_said(), seen)
        return services

    def close() -> None:
        if tracer is not None:
            tracer.close()

    return run(create_loading_app(settings, tracer), listener, load, drain_seconds, close)


def main() -> None:
    """Entry point of the `peqa` command."""
    wait_asleep()
    app()


if __name__ == "__main__":
    main()
