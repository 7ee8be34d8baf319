"""`infini-ds configs`: lists the configs and launchers that come with the package."""

import argparse

from infini_ds.commands.options import Commands, command


def add(commands: Commands) -> None:
    """Adds this command to the parser."""
    command(commands, "configs", "list the configs and launchers that come with this", _run)


def _run(options: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from infini_ds.errors import UserError
    from infini_ds.system import shipped
    from infini_ds.system.console import Console

    configs = shipped.configs()
    launchers = shipped.folder("launch")
    if not configs or launchers is None:
        raise UserError("configs: this installation has none; install the wheel, or a checkout")
    console = Console()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("config")
    table.add_column("what it is")
    for name, path in configs.items():
        table.add_row(name, shipped.about(path))
    console.print(table)
    folder = next(iter(configs.values())).parent
    console.print(f"files     {folder}")
    console.print(
        "train     infini-ds prepare NAME && infini-ds pretrain NAME [key.path=value ...]"
    )
    console.print(f"launcher  deepspeed {launchers / 'pretrain.sh'} NAME [key.path=value ...]")
    console.print(f"Slurm     sbatch {launchers / 'pretrain.sbatch'} NAME [key.path=value ...]")
