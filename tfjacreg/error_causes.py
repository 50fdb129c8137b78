"""Finds what an error came from."""

import traceback

import tensorflow as tf

# Where TensorFlow differentiates.
_DIFFERENTIATING = ("tensorflow.python.eager.backprop", "tensorflow.python.eager.forwardprop")


def find(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """Returns the error, or the first in its chain of causes, that is of these kinds; or None.

    TensorFlow, Keras and tensorflow-datasets wrap errors that are raised inside them.

    Args:
        error: What was caught.
        kinds: Classes of exceptions.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, kinds):
        link = link.__cause__ or link.__context__
    return link


def came_from(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Whether the error, or one in its chain of causes, is of these kinds.

    Args:
        error: What was caught.
        kinds: Classes of exceptions.
    """
    return find(error, *kinds) is not None


def raise_an_interrupt(error: BaseException) -> None:
    """Raises KeyboardInterrupt if Ctrl-C caused the error: in C++ it becomes a SystemError."""
    if came_from(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error


def is_of_a_derivative(error: BaseException) -> bool:
    """Whether the error was raised while TensorFlow differentiated.

    Args:
        error: What was caught.
    """
    modules = (
        frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return any(module in _DIFFERENTIATING for module in modules)


def raise_what_says_nothing(error: BaseException) -> None:
    """Raises again what says nothing of the code that was tried: Ctrl-C, and a lack of memory."""
    raise_an_interrupt(error)
    if came_from(error, MemoryError, tf.errors.ResourceExhaustedError):
        raise error
