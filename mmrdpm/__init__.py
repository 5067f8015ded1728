"""One transformer over text and recurrent image tokens: `mmrdpm.load("emoji-tiny")`."""

from mmrdpm.api import Model, load

__all__ = ["Model", "load"]
