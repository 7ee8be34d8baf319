"""Gathers the facts of all hosts, asking all of them at the same time."""

import contextlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from infini_ds.cluster.session import HostLost, Session
from infini_ds.cluster.way import Way

_LIMIT_SECONDS = 60.0
Facts = dict[str, Any]


def gather(
    ways: dict[str, Way], config_path: str, overrides: list[str]
) -> tuple[dict[str, Facts], dict[str, HostLost]]:
    """Returns the facts of each host (see `Host` in findings), and why some stopped answering.

    Args:
        ways: the way to each host.
    """
    hosts = list(ways)
    facts: dict[str, Facts] = {host: {} for host in hosts}
    lost: dict[str, HostLost] = {}
    with ThreadPoolExecutor(len(hosts)) as pool, contextlib.ExitStack() as stack:
        sessions = {
            host: stack.enter_context(Session(way, _LIMIT_SECONDS)) for host, way in ways.items()
        }

        def everywhere(ask: Callable[[str, Session], Facts]) -> None:
            """Asks all hosts that still answer, and adds the facts that they return."""
            asked = {
                host: pool.submit(ask, host, session)
                for host, session in sessions.items()
                if host not in lost
            }
            for host, answer in asked.items():
                try:
                    facts[host].update(answer.result())
                except HostLost as error:
                    lost[host] = error

        everywhere(lambda host, session: _look(session, config_path, overrides))
        alive = [host for host in hosts if host not in lost]
        first = next((host for host in alive if "output_dir" in facts[host]), None)
        if first:
            directory = Path(facts[first]["output_dir"])
            tokens = {host: str(directory / f".preflight-{uuid.uuid4().hex}") for host in alive}
            everywhere(lambda host, session: {"written": session.ask("write", path=tokens[host])})
            everywhere(lambda host, session: {"sees": session.ask("sees", path=tokens[first])})
        if len(alive) > 1:
            everywhere(lambda host, session: {"clock": session.clock()})
            everywhere(lambda host, session: _route(session, facts[alive[0]]))
    return facts, lost


def _look(session: Session, config_path: str, overrides: list[str]) -> Facts:
    session.wait_until_ready()
    return session.ask("facts", config=config_path, overrides=overrides)


def _route(session: Session, first: Facts) -> Facts:
    address = os.environ.get("MASTER_ADDR") or first.get("address")
    if not address:
        return {"network": {"error": first["errors"]["address"]}}
    return {"network": session.ask("route", address=address)}
