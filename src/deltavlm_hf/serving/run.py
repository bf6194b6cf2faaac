"""A server for the API: one process, one address."""

import socket

import uvicorn

from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .app import Settings, make_app

IDLE_SECONDS = 60  # that a connection is kept between requests
SHUTDOWN_SECONDS = 300  # for answers that are under way when the server is told to end


def listen(host: str, port: int) -> socket.socket:
    """
    The address, before a model is loaded for it.

    Raises:
        OSError: if it cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OverflowError as error:
        raise ValueError(f"--port {port}: expected a number from 0 to 65535") from error
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from error


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.close_pages()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    settings: Settings,
    listening: socket.socket,
) -> None:
    """
    Serves until the process is told to end (SIGTERM, SIGINT); what is under way is answered first.

    Args:
        model, processor, settings: see [`make_app`].
        listening (`socket.socket`): from [`listen`].
    """
    if settings.page:
        from ..app.guard import exit_on_sigterm

        exit_on_sigterm()
    config = uvicorn.Config(
        make_app(model, processor, settings),
        log_level="warning",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )
    _Server(config).run(sockets=[listening])
