"""Replaces attributes for a time, in one thread: one lock, one table.

An attribute (a function of a module, a method of a layer) is replaced while somebody uses it. The
replacement acts only in the threads of its users: every other thread gets what was there before.
The last user restores exactly what was found. So does an exception at any place, including the one
of a Ctrl-C: CPython looks for signals whenever a function is called or returns, also within the
code that tidies up, which is why `undone` tidies up twice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_MISSING: Any = object()


class Place(NamedTuple):
    """An attribute, and its replacement.

    Attributes:
        owner: A module, a class or an object.
        name: The name of its attribute.
        replacement: Called instead of the attribute, with the original as first argument.
        view: For an attribute that is not called: a function from the original to the object that
            is there meanwhile. Every thread finds this object, so it must ask whether it is to act:
            `is_replacing`, or a flag of the thread's own.
    """

    owner: Any
    name: str
    replacement: Callable[..., Any] | None = None
    view: Callable[[Any], Any] | None = None


class _Use:
    """One user of replacements, such as a recorded pass."""

    def __init__(self) -> None:
        self.is_aside = False


class _Here(threading.local):
    """The uses of this thread, innermost last."""

    def __init__(self) -> None:
        self.uses: list[_Use] = []


class Switch(threading.local):
    """Whether this thread is inside of a certain function; in every other thread it is not."""

    is_active = False

    def during(self, function: Callable[[], T]) -> T:
        """Calls a function without arguments, and returns what it returns."""
        before = self.is_active
        try:
            self.is_active = True
            return function()
        finally:
            self.is_active = before


class _Patch:
    """A place that is replaced: its users, and what was there before."""

    def __init__(self, place: Place) -> None:
        self.owner = place.owner
        self.name = place.name
        self.found = vars(place.owner).get(place.name, _MISSING)
        self.original = getattr(place.owner, place.name)
        self.users: dict[_Use, Callable[..., Any] | None] = {}
        self.stand_in = self._dispatching() if place.view is None else place.view(self.original)

    def _dispatching(self) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            for use in reversed(_here.uses):
                replacement = self.users.get(use)
                if replacement is not None and not use.is_aside:
                    return replacement(self.original, *args, **kwargs)
            return self.original(*args, **kwargs)

        return stand_in

    def put_in(self) -> None:
        _set(self.owner, self.name, self.stand_in)

    def put_back(self) -> None:
        # If somebody else has set the attribute since then, it stays.
        if vars(self.owner).get(self.name, _MISSING) is self.stand_in:
            _set(self.owner, self.name, self.found)


_here = _Here()
# Reentrant, so that only the thread that holds it can release it.
_lock = threading.RLock()
_patches: dict[tuple[int, str], _Patch] = {}


def while_replaced(places: Iterable[Place], function: Callable[[], T]) -> T:
    """Calls a function while some attributes are replaced in this thread.

    Args:
        places: The attributes and their replacements.
        function: Called without arguments.

    Returns:
        What the function returns.
    """
    use = _Use()
    places = list(places)

    def do() -> T:
        _locked(lambda: _put_in(use, places))
        _here.uses.append(use)
        return function()

    def undo() -> None:
        if use in _here.uses:
            _here.uses.remove(use)
        _locked(lambda: _put_back(use))

    return undone(do, undo)


def is_replacing() -> bool:
    """Whether replacements act in this thread at the moment."""
    return any(not use.is_aside for use in _here.uses)


@contextlib.contextmanager
def stepping_aside() -> Iterator[None]:
    """Inside this context every attribute acts as it did before, in this thread."""
    uses = [use for use in _here.uses if not use.is_aside]
    try:
        for use in uses:
            use.is_aside = True
        yield
    finally:
        for use in uses:
            use.is_aside = False


def undone(do: Callable[[], T], undo: Callable[[], object]) -> T:
    """Returns `do()`, after `undo()` has completed at least once, whatever interrupts either.

    Args:
        do: What to do.
        undo: Undoes what has been done so far; doing that twice must do no harm.
    """
    try:
        try:
            return do()
        finally:
            undo()
    finally:
        undo()


def _locked(work: Callable[[], object]) -> None:
    def do() -> None:
        _lock.acquire()
        work()

    undone(do, _release)


def _release() -> None:
    # A RuntimeError says that this thread does not hold the lock: it was interrupted before it did,
    # or has already released it.
    with contextlib.suppress(RuntimeError):
        _lock.release()


def _put_in(use: _Use, places: list[Place]) -> None:
    for place in places:
        key = id(place.owner), place.name
        if key not in _patches:
            _patches[key] = _Patch(place)
        _patches[key].users[use] = place.replacement
        _patches[key].put_in()


def _put_back(use: _Use) -> None:
    for key, patch in list(_patches.items()):
        patch.users.pop(use, None)
        if not patch.users:
            patch.put_back()
            _patches.pop(key, None)


def _set(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute; of an object without `__setattr__`, since Keras tracks what it sets."""
    if isinstance(owner, (type, ModuleType)):
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    elif value is _MISSING:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value
