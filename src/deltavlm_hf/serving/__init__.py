"""`deltavlm serve`: a model behind an HTTP API in OpenAI's form. Needs the extra `[serve]`."""

from ..extras import missing

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise missing("Serving needs more packages", "serve") from error

from .app import Settings, make_app
from .run import listen, serve

__all__ = ["Settings", "listen", "make_app", "serve"]
