"""`deltavlm serve`: a model behind an HTTP API in OpenAI's form. Needs the extra `[serve]`."""

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError('Serving needs more packages: pip install "deltavlm-hf[serve]"') from error

from .app import Settings, make_app
from .run import listen, serve

__all__ = ["Settings", "listen", "make_app", "serve"]
