"""The command line: `aegaeon serve | ps | top | load | add | generate | demo` and more.

Parses, calls, prints. Whatever a command does is in the module it imports, and vLLM is imported
only by commands that need it.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console

from aegaeon import sim_cli
from aegaeon.cli_bench import bench
from aegaeon.core import config, logs
from aegaeon.core.errors import AegaeonError, ConfigError

if TYPE_CHECKING:
    from aegaeon.server.admin_client import AdminClient

app = typer.Typer(
    name="aegaeon",
    help="Serve many LLMs on few GPUs: one engine process, models switched between tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")

PoolFile = Annotated[Path, typer.Argument(metavar="POOL.YAML", help="The pool file.")]


@app.command()
def serve(
    pool_file: PoolFile,
    host: Annotated[str | None, typer.Option(help="Overrides server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides server.port; 0: any free.")] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Only check the pool file and the checkpoints.")
    ] = False,
) -> None:
    """Start the OpenAI-compatible server for all models of a pool."""
    from aegaeon import launch, pool_check
    from aegaeon.pool_reload import PoolSource

    def read() -> config.PoolConfig:
        return _with_address(config.load_pool(pool_file), host, port)

    pool = read()
    if check_config:
        pool_check.check_pool(pool)
        print(f"{pool_file}: fine; models: {', '.join(model.name for model in pool.models)}")
        return

    def ready(address: str) -> None:
        names = ", ".join(name for model in pool.models for name in model.names)
        print(f"aegaeon serves {names} on {address}/v1", flush=True)

    launch.serve(pool, on_ready=ready, source=PoolSource(pool_file.absolute(), read))


PoolOption = Annotated[
    Path | None, typer.Option("--pool", metavar="POOL.YAML", help="Whose server is meant.")
]
SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="The server's admin socket. Default: found.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="The server's answer as JSON.")]
ServedName = Annotated[str, typer.Argument(metavar="MODEL", help="The name that clients ask for.")]


@app.command()
def ps(pool: PoolOption = None, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show the models of the running server: their state, requests and device memory."""
    from aegaeon.server.tables import models_table

    state = _admin(pool, socket).get("/admin/state")
    if as_json:
        print(json.dumps(state))
    else:
        Console().print(models_table(state))


@app.command()
def top(
    pool: PoolOption = None,
    socket: SocketOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One snapshot as JSON.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=60.0, help="Seconds between snapshots.")
    ] = 1.0,
) -> None:
    """Watch the running server: who has the device, queues, SLOs, switches, memory."""
    from aegaeon.server.history import History
    from aegaeon.server.tables import report

    admin = _admin(pool, socket)
    if not (once or as_json):
        _watch(admin, interval)
        return
    snapshot = {"state": admin.get("/admin/state"), "timeline": admin.get("/admin/timeline")}
    if as_json:
        print(json.dumps(snapshot))
        return
    history, console = History(), Console()
    history.add(snapshot)
    console.print(report(history, width=console.width))


@app.command()
def dashboard(
    pool: PoolOption = None,
    socket: SocketOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="In a browser, too.")] = False,
) -> None:
    """Serve the running server's dashboard to a browser of this machine, until Ctrl-C."""
    from aegaeon.listeners import tcp_listener
    from aegaeon.server.bridge import new_key, serve_bridge

    admin = _admin(pool, socket)
    admin.get("/admin/state")
    key = new_key()
    with tcp_listener("127.0.0.1", port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/dashboard?key={key}"
        listener.listen()  # whoever follows the address at once waits, and is not refused
        print(address, flush=True)
        if open_browser:
            import webbrowser

            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            serve_bridge(listener, admin.path, key)


@app.command()
def load(
    model: ServedName,
    pool: PoolOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model onto the device now, without a request."""
    _order("load", model, pool, socket, as_json)


@app.command()
def unload(
    model: ServedName,
    pool: PoolOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an idle model off the device now; its next request brings it back."""
    _order("unload", model, pool, socket, as_json)


@app.command()
def pin(
    model: ServedName,
    pool: PoolOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model onto the device and keep it there."""
    _order("pin", model, pool, socket, as_json)


@app.command()
def unpin(
    model: ServedName,
    pool: PoolOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a pinned model make room for others again."""
    _order("unpin", model, pool, socket, as_json)


@app.command()
def add(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, or a model of the hub cache.")
    ],
    name: Annotated[str | None, typer.Option(help="Name to serve it by.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As in the pool file: kv_memory=64MiB."),
    ] = None,
    pool: PoolOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load one more model into a running server; the others wait meanwhile."""
    path = Path(model).expanduser()
    entry: dict[str, Any] = {"model": str(path.absolute()) if path.exists() else model}
    if name is not None:
        entry["name"] = name
    for setting in settings or ():
        key, given, value = setting.partition("=")
        if not given:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, as kv_memory=64MiB")
        entry[key] = yaml.safe_load(value)
    with Console(stderr=True).status(f"add {model}"):
        done = _admin(pool, socket).add(entry)
    print(json.dumps(done) if as_json else f"{done['name']}: {done['state']}")


@app.command()
def remove(
    model: ServedName,
    timeout: Annotated[
        float, typer.Option(help="Seconds that its open requests may take to end.")
    ] = 30.0,
    pool: PoolOption = None,
    socket: SocketOption = None,
) -> None:
    """Remove a model from a running server when its open requests have ended."""
    with Console(stderr=True).status(f"remove {model}"):
        _admin(pool, socket).remove(model, timeout_s=timeout)
    print(f"{model}: removed")


@app.command()
def generate(
    model: Annotated[list[str], typer.Option(help="A checkpoint directory; repeat for several.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt, given to every model; repeatable.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="What all models share, e.g. 64MiB. Default: the largest fits."),
    ] = None,
    kv_memory: Annotated[str, typer.Option(help="KV cache of one model.")] = "16MiB",
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    quantum: Annotated[int, typer.Option(min=1, help="Engine steps of a model per turn.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per answer.")] = False,
) -> None:
    """Generate with several models in this process, without a server."""
    from aegaeon.generate import generate_offline

    answers = generate_offline(
        [
            config.ModelConfig(
                model=str(Path(path).absolute()),
                name=Path(path).name,
                kv_memory=config.parse_bytes(kv_memory),
                max_model_len=max_model_len,
            )
            for path in model
        ],
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        device_memory_bytes=None if device_memory is None else config.parse_bytes(device_memory),
        quantum=quantum,
    )
    console = Console()
    for answer in answers:
        if as_json:
            print(json.dumps(vars(answer)))
        else:
            console.print(f"[bold]{answer.model}[/bold] · {answer.prompt!r}")
            console.print(answer.text, markup=False, highlight=False)
            console.print()


@app.command("tiny-model")
def tiny_model(
    arch: Annotated[str, typer.Argument(help="llama, qwen3, gemma ... (a wrong one lists all)")],
    out: Annotated[Path, typer.Argument(help="An empty or new directory.")],
    size: Annotated[
        str, typer.Option(help="tiny, small, or a published shape such as 1b")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    quantize: Annotated[str | None, typer.Option(help="int4: 4-bit weights")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Write a checkpoint with random weights, a real tokenizer and a chat template."""
    from aegaeon.tiny_model import write_tiny_model

    path = write_tiny_model(arch, out, size=size, seed=seed, quantize=quantize, overwrite=overwrite)
    print(path)


@app.command("tiny-adapter")
def tiny_adapter(
    model: Annotated[Path, typer.Argument(help="The checkpoint that it adapts.")],
    out: Annotated[Path, typer.Argument(help="The directory to write it to.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a random LoRA adapter of a checkpoint, in PEFT's format."""
    from aegaeon.tiny_special import write_tiny_adapter

    print(write_tiny_adapter(model, out, seed=seed))


@app.command()
def image(
    model_dir: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="A checkpoint of safetensors files.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The image file to write.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read both again afterwards and compare them.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That read and write. Default: up to 8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Write a checkpoint's weights as one image, in the order in which the model needs them."""
    from aegaeon.build_image import build_image

    built = build_image(model_dir, out, verify=verify, num_threads=threads)
    if as_json:
        print(json.dumps(vars(built)))
        return
    print(
        f"{built.path}: {built.size_bytes / (1 << 20):.1f} MiB, {built.num_tensors} tensors in "
        f"{built.num_layers} layers; read in {built.read_s:.2f} s, written in {built.write_s:.2f} s"
        + ("; the same as the checkpoint" if verify else "")
    )


@app.command()
def demo(
    models: Annotated[int, typer.Option(min=2, max=6, help="How many tiny models.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests per model.")] = 6,
    concurrency: Annotated[int, typer.Option(min=1, help="Open requests per model.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2)] = 48,
    quantum: Annotated[int, typer.Option(min=1, help="Engine steps of a model per turn.")] = 4,
    workdir: Annotated[Path | None, typer.Option(help="Keep models and logs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Show the whole stack at work on tiny random models, and check every token of it."""
    from aegaeon.demo import DemoSettings, run_demo

    settings = DemoSettings(
        models=models,
        requests=requests,
        concurrency=concurrency,
        max_tokens=max_tokens,
        quantum=quantum,
    )
    if not run_demo(settings, workdir=workdir, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of key hashes; made when missing.")],
    name: Annotated[str, typer.Option(help="Whose it is, for logs.")] = "unnamed",
) -> None:
    """Make an API key: it is printed once, and only its hash is written to FILE."""
    from aegaeon.server.auth import add_key

    print(add_key(file, name))


@app.command("check-config")
def check_config(pool_file: PoolFile) -> None:
    """Check a pool file and the checkpoints it names; start nothing."""
    serve(pool_file, host=None, port=None, check_config=True)


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of a pool file."""
    print(json.dumps(config.json_schema(), indent=2))


app.command()(sim_cli.sim)
app.command()(sim_cli.plan)


def _admin(pool_file: Path | None, socket: Path | None) -> "AdminClient":
    """The admin listener of the server that is meant: by its socket, its pool file, or found."""
    from aegaeon.server.admin_client import AdminClient, find_admin_socket

    if socket is None and pool_file is not None:
        named = config.load_pool(pool_file).admin.socket
        socket = None if named == "auto" else Path(named)
    return AdminClient(socket or find_admin_socket())


def _watch(admin: "AdminClient", interval_s: float) -> None:
    try:
        from aegaeon.server.top import Top
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "textual":
            raise
        raise AegaeonError(
            "the live screen needs textual: pip install 'aegaeon-kernels[top]'; "
            "`aegaeon top --once` does without"
        ) from None
    admin.get("/admin/state")  # a server that is not there is said before the screen is taken
    Top(lambda: admin.events(interval_s=interval_s, parts=("timeline",))).run()


def _order(verb: str, model: str, pool: Path | None, socket: Path | None, as_json: bool) -> None:
    with Console(stderr=True).status(f"{verb} {model}"):
        done = _admin(pool, socket).order(verb, model)
    if as_json:
        print(json.dumps(done))
    else:
        print(f"{model}: {done['state']}{', pinned' if done['pinned'] else ''}")


def _with_address(pool: config.PoolConfig, host: str | None, port: int | None) -> config.PoolConfig:
    changes: dict[str, Any] = {}
    if host is not None:
        changes["host"] = host
    if port is not None:
        changes["port"] = port
    return pool.model_copy(update={"server": pool.server.model_copy(update=changes)})


def main() -> None:
    """The console script. Our own errors end in one message and a status, not in a traceback."""
    try:
        logs.configure()
        app()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except ConfigError as error:
        print(f"aegaeon: {error}", file=sys.stderr)
        status = 2
    except (AegaeonError, ValueError) as error:
        print(f"aegaeon: {error}", file=sys.stderr)
        status = 1
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process; all that it owned has been closed.

    Once vLLM is loaded, not by way of the interpreter's own end: taking vLLM's clients and Triton's
    bindings apart there prints pages of complaints after the last word.
    """
    if "vllm" not in sys.modules:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
