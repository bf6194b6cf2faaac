"""What answers about many pairs: this machine, or a cluster."""

from collections.abc import Callable, Iterator
from typing import Literal

from .processes import own_device, process_state
from .stream import Answered, stream_answers

Engine = Callable[..., Iterator[Answered]]  # in the way of `stream_answers`


def choose_engine(
    engine: Literal["local", "ray"],
    model: str,
    device: str,
    ray_address: str | None,
    actors: int | None,
    llm_url: str | None = None,
) -> tuple[Engine, str]:
    """
    What answers, and the device on which this process loads the model for it: `meta`, without weights, where a
    cluster answers.

    Args:
        engine (`str`): `local` or `ray`.
        model (`str`): folder or Hub id, `small` or `tiny`.
        device (`str`): where the model is to answer.
        ray_address, actors (*optional*): see [`~deltavlm_hf.inference.cluster.Cluster`].
        llm_url (`str`, *optional*): where the language model is, see [`load_model`]; not with a cluster.

    Raises:
        ValueError: for options of a cluster without one, or with a language model that is on this machine alone; or a
            cluster under `torchrun`.
        ImportError: if Ray is not installed.
    """
    if engine == "local":
        if ray_address is not None or actors is not None:
            raise ValueError("--ray-address and --actors are for --engine ray.")
        return stream_answers, own_device(device)
    if process_state().num_processes > 1:
        raise ValueError("--engine ray shares the work itself: start it without `torchrun`.")
    if llm_url is not None:
        raise ValueError("--llm-url is for --engine local: the machines of a cluster do not reach a port of this one.")
    from .cluster import Cluster

    return Cluster(model, device, ray_address, actors).stream_answers, "meta"
