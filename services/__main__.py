"""`python -m services serve|api|worker|dead|list`: run reward services, and look after them.

Only what the chosen role needs is imported, so that `serve` has its children loading at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from services.processes import (
    EXIT_INTERRUPTED,
    StartError,
    announce,
    bind,
    die_with_parent,
    inherit,
    open_standard_streams,
    raise_descriptor_limit,
    reserve_stdout,
)

EXIT_ERROR = 1


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; argparse prints usage and exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m services", description="Run reward services.")
    roles = parser.add_subparsers(dest="role", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--announce", action="store_true", help="print one JSON line on stdout when ready; log less")
    common.add_argument("--log-file", type=Path, help="write the log there instead of to stderr")
    common.add_argument("--verbose", action="store_true", help="log more, also with --announce")
    common.add_argument("--redis-url", help="in place of REDIS_URL; it shows in the list of processes")
    common.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument("--host", default="127.0.0.1")

    serve = roles.add_parser("serve", parents=[common, address], help="API and worker of each reward, and a Redis")
    serve.add_argument("names", nargs="+", metavar="NAME")
    serve.add_argument("--port", type=int, default=8000, help="of the first API, the others follow; 0: free ones")
    serve.add_argument("--until-stdin-closes", action="store_true", help="stop everything when stdin ends")
    api = roles.add_parser("api", parents=[common, address], help="the HTTP side of one reward")
    api.add_argument("name", metavar="NAME")
    api.add_argument("--port", type=int, default=8000, help="0: a free one")
    api.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    api.add_argument("--metrics-folder", type=Path, help=argparse.SUPPRESS)
    worker = roles.add_parser("worker", parents=[common], help="the scoring side of one reward")
    worker.add_argument("name", metavar="NAME")
    dead = roles.add_parser("dead", help="show the jobs that no worker answered")
    dead.add_argument("name", metavar="NAME")
    dead.add_argument("--redis-url", help="in place of REDIS_URL; it shows in the list of processes")
    dead.set_defaults(announce=False, log_file=None, verbose=False, parent=None)
    dead.add_argument("--json", action="store_true", help="one JSON object a line")
    known = roles.add_parser("list", help="show the rewards that can be served by name")
    known.set_defaults(announce=False, parent=None)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Run the chosen role to its end.

    Returns:
        The exit code.

    Raises:
        ValueError, RuntimeError: it cannot run; the message is one line with value, limit and remedy.
    """
    if options.role == "list":
        return _list_rewards()
    from services.logs import start_logging  # noqa: PLC0415 - see the module
    from services.rewards import check_names  # noqa: PLC0415
    from services.settings import count_in, load_settings  # noqa: PLC0415

    settings = load_settings(redis_url=options.redis_url)
    start_logging(quiet=options.announce and not options.verbose, file=options.log_file, form=settings.log_format)
    check_names(options.names if options.role == "serve" else [options.name])
    redis_url = settings.redis_url
    if options.role == "serve":
        from services.supervisor import ServeOptions, serve  # noqa: PLC0415

        return serve(
            ServeOptions(
                names=options.names,
                host=options.host,
                port=options.port,
                announces=options.announce,
                until_stdin_closes=options.until_stdin_closes,
                log_file=options.log_file,
                verbose=options.verbose or not options.announce,
                redis_url=redis_url,
                queue_bytes=settings.queue_bytes,
                api_processes=settings.api_processes,
            )
        )
    if redis_url is None:
        remedy = (
            "to the address that `serve` logs" if options.role == "dead" else "or use `serve`, which brings a Redis"
        )
        raise StartError(f"REDIS_URL is not set: set it, {remedy}")
    if options.role == "dead":
        from services.roles.dead import show_dead  # noqa: PLC0415

        return show_dead(options.name, redis_url, settings, as_json=options.json)
    if options.role == "worker":
        from services.roles.worker import run_worker  # noqa: PLC0415

        return run_worker(options.name, redis_url, settings, announces=options.announce)
    folder: Path | None = options.metrics_folder
    count_in(folder)
    from services.http.service import ALONE, Group  # noqa: PLC0415
    from services.roles.api import run_api  # noqa: PLC0415

    group = ALONE if folder is None else Group(settings.api_processes, folder)
    with bind(options.host, options.port) if options.fd is None else inherit(options.fd) as listener:
        return run_api(options.name, listener, redis_url, settings, group, announces=options.announce)


def _list_rewards() -> int:
    """Print name, origin and class of each known reward, a line each; none is imported."""
    from services.rewards import known_rewards  # noqa: PLC0415 - see the module

    rewards = known_rewards()
    name_width, origin_width = (
        max(len(getattr(reward, column)) for reward in rewards) for column in ("name", "origin")
    )
    for reward in rewards:
        print(f"{reward.name:<{name_width}}  {reward.origin:<{origin_width}}  {reward.target}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and turn an expected error into one line and an exit code."""
    open_standard_streams()
    raise_descriptor_limit()
    options = parse_arguments(arguments)
    if options.announce:
        reserve_stdout()
    try:
        if options.parent is not None:
            die_with_parent(options.parent)
        return run(options)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, RuntimeError, OSError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if options.parent is not None:
            announce({"error": line})
        else:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
