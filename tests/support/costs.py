"""Parameters and multiply-adds of registered models, counted once in a run of the tests."""

from functools import cache

from backbones import catalog


@cache
def count(name: str) -> tuple[int, int]:
    """Both, of a model as `timm.create_model` makes it, at its own image size."""
    return catalog.count(name)


def macs(name: str) -> int:
    """Its multiply-adds alone."""
    return count(name)[1]
