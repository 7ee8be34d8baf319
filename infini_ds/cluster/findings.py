"""Judges what is good or wrong about the hosts of a run, from the facts that each reports."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from infini_ds.cluster.session import HostLost
from infini_ds.config import RunConfig
from infini_ds.errors import UserError
from infini_ds.kernels.assembler import REMEDY, Ptxas

_CLOCK_SECONDS = 2.0
_SHARE = "copy it there, or keep it on a file system that all hosts share"


class Finding(NamedTuple):
    """The result of one check of one host; `host` is "all" for a check of all hosts together."""

    host: str
    check: str
    state: Literal["good", "warning", "failed"]
    found: str
    remedy: str = ""


class Host(NamedTuple):
    """A host, its number of processes, and the facts known about it, or why there are none.

    `facts` are those of preflight_host and the following, of which "clock" and "network" exist only
    if several hosts answer:
        "clock": how far it is "ahead" of this host's, known "within" so many seconds;
        "written": why no file can be written into the first host's output_dir; "" if one can;
        "sees": whether this host sees the file that the first host wrote there;
        "network": the fields of the `Route` to the first host, or the "error".
    """

    name: str
    slots: int
    facts: dict[str, Any]
    lost: HostLost | None = None


def judge(config: RunConfig, here: dict[str, str], hosts: list[Host]) -> Iterator[Finding]:
    """Yields all findings, check by check.

    Args:
        config: the config as this host reads it.
        here: versions on this host; see preflight_host.
        hosts: all hosts in the order of the ranks.
    """
    for host in hosts:
        if host.lost:
            yield Finding(host.name, "reached", "failed", str(host.lost), host.lost.remedy)
        else:
            yield Finding(host.name, "reached", "good", "answers")
    answering = [host for host in hosts if not host.lost]
    world = sum(host.slots for host in hosts)

    def each(check: str, judge_one: Callable[[Host], tuple], remedy: str = "") -> Iterator[Finding]:
        for host in answering:
            if check in host.facts["errors"]:
                yield Finding(host.name, check, "failed", host.facts["errors"][check], remedy)
            elif check in host.facts:
                yield Finding(host.name, check, *judge_one(host))

    yield from each("versions", lambda host: _versions(host, here))
    yield from each("devices", _devices, "look at `nvidia-smi` there")
    yield from each("ptxas", _ptxas, "reinstall torch and Triton")
    fits = True
    try:
        data = config.data_parallel_size(world)
        layout = f"{world} processes: {config.parallel.describe(world // data, data)}"
        yield Finding("all", "layout", "good", layout)
    except UserError as error:
        fits = False
        yield Finding("all", "layout", "failed", str(error))
    yield from each("config", lambda host: _config(host, config), _SHARE)
    yield from each("store", lambda host: _store(host, answering))
    yield from each("output_dir", lambda host: _output_dir(host, answering))
    sizes = [host.facts["vocab_size"] for host in answering if "vocab_size" in host.facts]
    if sizes:
        from infini_ds.planning.estimate import checkpoint_bytes, process_bytes  # needs torch

        vocab_size = config.model.vocab_size or sizes[0]
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        config = config.model_copy(update={"model": model})
        yield from each("disk", lambda host: _disk(host, checkpoint_bytes(config)))
        if fits:
            needs = iter(process_bytes(config, world))
            by_host = {host.name: [next(needs) for _ in range(host.slots)] for host in hosts}
            yield from each("memory", lambda host: _memory(host, by_host[host.name]))
    yield from each("clock", lambda host: _clock(host, answering[0]))
    yield from each("network", lambda host: _network(host, answering[0]))


def _versions(host: Host, here: dict[str, str]) -> tuple:
    told = host.facts["versions"]
    for name, version in here.items():
        if told.get(name) != version:
            found = f"{name} {told.get(name)}, here {version}"
            return "failed", found, "install there what is installed here"
    return "good", ", ".join(f"{name} {version}" for name, version in told.items())


def _devices(host: Host) -> tuple:
    devices = len(host.facts["devices"])
    if not devices:
        return "good", f"CPU, {host.slots} processes"
    found = f"{devices} devices for {host.slots} slots"
    if host.slots > devices:
        return "failed", found, f"slots={devices} in the hostfile, or look at CUDA_VISIBLE_DEVICES"
    return "good", found


def _ptxas(host: Host) -> tuple:
    ptxas = Ptxas(**host.facts["ptxas"])
    if ptxas.fault:
        return "warning", f"{ptxas} {ptxas.fault}", REMEDY
    return "good", str(ptxas)


def _config(host: Host, config: RunConfig) -> tuple:
    there, here = _flat(host.facts["config"]), _flat(config.model_dump())
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            return "failed", f"{name} is {there.get(name)!r}, here {here.get(name)!r}", _SHARE
    return "good", "as it is here"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names."""
    flat = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _store(host: Host, answering: list[Host]) -> tuple:
    other = next(other for other in answering if "store" in other.facts)
    if host.facts["store"] != other.facts["store"]:
        found = f"not the one of {other.name}"
        return "failed", found, _SHARE
    return "good", f"fingerprint {host.facts['store'][:8]}"


def _output_dir(host: Host, answering: list[Host]) -> tuple:
    first = next(other for other in answering if "output_dir" in other.facts)
    directory = first.facts["output_dir"]
    if not first.facts["written"] and not host.facts["sees"]:
        found = f"a file that {first.name} wrote in {directory} is not there"
        return "failed", found, "output_dir must be on a file system that all hosts share"
    if host.facts["written"]:
        found = f"{directory} cannot be written ({host.facts['written']})"
        return "failed", found, "give this user the right to, or name another output_dir"
    return "good", f"{directory} can be written"


def _disk(host: Host, needed: int) -> tuple:
    free = host.facts["disk"]
    found = f"{_gigabytes(free)} free, a checkpoint takes {_gigabytes(needed)}"
    if free < needed:
        return "failed", found, "make room, or name another output_dir"
    return "good", found


def _memory(host: Host, needs: list[tuple[int, int]]) -> tuple:
    """Judges device memory; on CPU runs and for offloaded optimizers, the host's memory."""
    devices, offloaded = zip(*needs, strict=True)
    free = host.facts["devices"][: host.slots]
    in_host = sum(offloaded) + (0 if free else sum(devices))
    what, has, needed = "the host", host.facts["memory"], in_host
    if free and in_host <= has:
        index = min(range(len(free)), key=lambda index: free[index] - devices[index])
        what, has, needed = f"device {index}", free[index], devices[index]
    found = f"{what} has {_gigabytes(has)} free, at least {_gigabytes(needed)} needed"
    if has < needed:
        remedy = "more processes, a smaller train.batch_size or model, or end what else runs there"
        return "failed", found, remedy
    return "good", found


def _clock(host: Host, first: Host) -> tuple:
    clock, other = host.facts["clock"], first.facts["clock"]
    offset = clock["ahead"] - other["ahead"]
    if abs(offset) - clock["within"] - other["within"] > _CLOCK_SECONDS:
        found = f"{offset:+.1f} s beside {first.name}"
        return "warning", found, "let NTP set the clocks (chronyd, systemd-timesyncd)"
    return "good", f"within {_CLOCK_SECONDS:g} s of {first.name}"


def _network(host: Host, first: Host) -> tuple:
    network = host.facts["network"]
    remedy = "set MASTER_ADDR (deepspeed --master_addr) to an address of the first host for all"
    if "error" in network:
        return "failed", network["error"], remedy
    found = f"{network['interface']} {network['own']}"
    is_own = network["own"] == network["towards"]
    if network["own"].startswith(("127.", "::1")) or is_own != (host is first):
        return "failed", f"{found} is the way to {network['towards']} of {first.name}", remedy
    variables = (f"{part}_SOCKET_IFNAME={network['interface']}" for part in ("GLOO", "NCCL"))
    return "good", f"{found} ({' '.join(variables)})"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
