"""The one message for packages that are an extra of this one and are not installed."""


def missing(what: str, extra: str) -> ImportError:
    """
    An error that says how to install an extra, of a release or in a checkout.

    Args:
        what (`str`): what needs it, such as `"Scenes need more packages"`.
        extra (`str`): its name in `setup.cfg`.
    """
    return ImportError(f'{what}: pip install "deltavlm-hf[{extra}]", or in a checkout pip install -e ".[{extra}]"')
