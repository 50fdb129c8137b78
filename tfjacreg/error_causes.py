"""What an error came from."""


def find(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The error, or the first that it was made of, that is of these kinds; None if none is.

    TensorFlow, Keras and tensorflow-datasets wrap what was raised inside of them.

    Args:
        error: What was caught.
        kinds: Classes of exceptions.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, kinds):
        link = link.__cause__ or link.__context__
    return link


def came_from(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Whether `find` finds one.

    Args:
        error: What was caught.
        kinds: Classes of exceptions.
    """
    return find(error, *kinds) is not None


def raise_an_interrupt(error: BaseException) -> None:
    """Raises the Ctrl-C that an error came from: in the middle of C++ it is a SystemError."""
    if came_from(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error
