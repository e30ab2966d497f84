"""The options of a Modal worker on a command line: of `%remote start` and of `interp-kernel modal deploy`."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ModalOptions under their own names, but those that local workers have too."""
    add = parser.add_argument
    add("--app-name", help="Modal app (interp-kernel)")
    add("--gpu", type=one_or_several, help="GPU at Modal: A10G, H100:2, or several in order of preference: H100,A100")
    add("--image", help="image at Modal: a name in a registry, or of a notebook's variable")
    add("--deploy", action="store_true", help="let the Modal app and its state outlive this process")
    add("--timeout", type=int, metavar="S", help="longest call at Modal")
    add("--startup-timeout", type=int, metavar="S", help="longest start of a container at Modal")
    add("--region", type=one_or_several, help="Modal's region, or several with commas")
    add("--cloud", help="aws, gcp, oci or auto")
    add("--memory", type=int, metavar="MIB", help="memory of the container")
    add("--cpu", type=float, metavar="N", help="cores of the container")
    add("--volume", dest="volumes", type=path_and_name, action="append", metavar="PATH=NAME", help="Modal volume")
    add("--model-volume", metavar="NAME", help="Modal volume with weights, at /models")
    add("--secret", dest="secrets", action="append", metavar="NAME", help="Modal secret, as huggingface-secret")
    add("--retries", type=int, metavar="N", help="how often a map repeats what Modal lost")
    add("--enable-memory-snapshot", action="store_true", help="restore containers from a snapshot (experimental)")


def one_or_several(text: str) -> str | tuple[str, ...]:
    """A name, or several with commas between them."""
    names = tuple(name.strip() for name in text.split(","))
    return names[0] if len(names) == 1 else names


def path_and_name(text: str) -> tuple[str, str]:
    """A volume's path in the container, and its name."""
    path, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} names no volume; expected PATH=NAME, as /data=my-volume")
    return path, name
