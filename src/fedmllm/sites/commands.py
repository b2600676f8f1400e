"""The commands ``fedmllm server`` and ``fedmllm site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmllm.settings_file import SITES, read_settings

server_app = typer.Typer(help="Run the server of a federation of sites.", no_args_is_help=True, pretty_exceptions_enable=False)
site_app = typer.Typer(
    help="Run a site of a federation, or create the keys of all sites.", no_args_is_help=True, pretty_exceptions_enable=False
)


@site_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to create; it must be empty if it exists.")],
    address: Annotated[str, typer.Option(help="host:port at which sites reach the server.")],
    site: Annotated[list[str], typer.Option(help="Name of a site. Repeat the option for each site.")],
    days: Annotated[int, typer.Option(help="Days until the certificates expire.", min=1)] = 825,
) -> None:
    """Create keys, certificates and settings: one folder for the server, and one to hand to each site."""
    from fedmllm.flower.installed import require_flower
    from fedmllm.sites import keys

    require_flower()
    keys.init(folder, address, site, days)
    typer.echo(f"server     {folder / 'server' / 'server.yaml'}")
    for name in sorted(site):
        typer.echo(f"site       {folder / 'sites' / name / 'site.yaml'}")
    typer.echo(f"authority  {folder / 'authority' / 'ca.key'} (keep it away from server and sites)")


@site_app.command("sign")
def sign(
    authority: Annotated[Path, typer.Argument(help="The authority's ca.key.")],
    file: Annotated[Path, typer.Argument(help="server.yaml, with the NAME.pub of each site in its folder.")],
) -> None:
    """Sign the list of a server's sites for secure aggregation, after a site has joined or changed its key."""
    read_settings(file, SITES)
    from fedmllm.flower.installed import require_flower
    from fedmllm.flower.settings import ServerConfig
    from fedmllm.sites import keys

    require_flower()
    typer.echo(f"signed     {keys.sign(authority, ServerConfig.load(file))}")


@server_app.command("up")
def server_up(file: Annotated[Path, typer.Argument(help="server.yaml from fedmllm site init.")]) -> None:
    """Run the SuperLink that sites connect to and admit them by their keys, until interrupted."""
    read_settings(file, SITES)
    from fedmllm.flower.installed import require_flower
    from fedmllm.flower.settings import ServerConfig
    from fedmllm.sites.start import at_server, become

    require_flower()
    server = ServerConfig.load(file)
    server.keys()
    become(at_server(server, file.resolve()))


@site_app.command("up")
def site_up(file: Annotated[Path, typer.Argument(help="site.yaml from fedmllm site init.")]) -> None:
    """Connect this site to its server and train on request, until interrupted."""
    read_settings(file, SITES)
    from fedmllm.flower.installed import require_flower
    from fedmllm.flower.settings import SiteConfig
    from fedmllm.sites.start import at_site, become

    require_flower()
    become(at_site(SiteConfig.load(file), file.resolve()))
