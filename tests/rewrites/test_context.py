"""What stands in for something else: for whom, for how long, and what an interrupt leaves."""

import random
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.eager.record import could_possibly_record

from tfjacreg import JacobianOperator, _keras, passes, recording, rewrites
from tfjacreg.rewrites import Place, context, tangents, while_replaced

FILES = tuple(module.__file__ for module in (context, rewrites, recording, passes, tangents))
X = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype("float32")


class Owner:
    def method(self):
        return "own"


def shout(original, *args):
    return original(*args).upper()


@pytest.fixture
def network():
    """A layer of each kind that something stands in for; one has a `call` of its own."""
    made = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(4, 3, groups=2),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.UpSampling2D(2, interpolation="bilinear"),
            layers.RandomRotation(0.1, seed=0),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    up = made.layers[3]
    vars(up)["call"] = up.call  # As somebody may who instruments a layer.
    made(X)
    return made


def state(network):
    """Everything that something may stand in for, and what is recorded and locked."""
    found = [
        (id(layer), name, id(value))
        for layer in _keras.layers_of(network)
        for name, value in sorted(vars(layer).items())
        if name in ("call", "_moments", "backend", "convolution_op", "_dtype_policy")
    ]
    places = [*rewrites.FUNCTIONS, rewrites.TRACED_ANEW]
    found += [(id(owner), name, id(vars(owner)[name])) for owner, name, *_ in places]
    return found


def is_idle():
    """No use, pass, patch or lock is left in this thread or for another one."""
    locked = []

    def other():
        locked.append(not context._lock.acquire(timeout=1))
        if not locked[0]:
            context._lock.release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    left = (context._patches, context._here.uses, passes.recorded.stack, locked[0])
    return not any(left) and not could_possibly_record()


def scenario(network):
    """What a pass goes through, with a tangent and in a place of its own; few layers run."""
    x = tf.constant(X)

    def forward():
        with recording.hold_constant():
            y = network.layers[1]._moments(x, None)[0] + tf.nn.max_pool(x, 2, 2, "VALID")
        network.layers[-1](tf.reshape(network.layers[3](y), (2, -1))[:, :64])

    def run():
        accumulator = tf.autodiff.ForwardAccumulator(x, x)
        return recording.record(network, tf.GradientTape(), accumulator, forward)

    return while_replaced([Place(network.layers[-1], "call", lambda own, x, **_: own(x))], run)


class Interrupt(KeyboardInterrupt):
    pass


def events(function, at=None, opcodes=False):
    """How many events of Python's tracing our files have; an interrupt comes at one of them."""
    count = 0

    def step(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = opcodes
        count += 1
        if count == at:
            raise Interrupt
        return step

    sys.settrace(step)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("opcodes", [False, True])
def test_an_interrupt_leaves_everything_as_it_was(network, opcodes):
    """At 300 places: lines, calls and returns, and single instructions; the first and last ones
    always. Each place is one at which a Ctrl-C may be seen."""
    scenario(network)
    before = state(network)
    number = events(lambda: scenario(network), opcodes=opcodes)
    assert number > 300
    generator = random.Random(0)
    edges = [*range(1, 26), *range(number - 24, number + 1)]
    places = sorted({*edges, *generator.sample(range(1, number), 250 if opcodes else 300)})
    raised = 0
    assert JacobianOperator(network, X, training=True, tangent=X).holds_constants and is_idle()
    for at in places:
        try:
            events(lambda: scenario(network), at, opcodes)
        except Interrupt:
            raised += 1
        assert state(network) == before, f"event {at} of {number}"
        assert is_idle(), f"event {at} of {number}"
    assert raised > 0.95 * len(places)
    scenario(network)


def test_a_replacement_acts_in_its_own_thread_only():
    owner, answers = Owner(), []

    def elsewhere():
        thread = threading.Thread(target=lambda: answers.append(owner.method()))
        thread.start()
        thread.join()
        return owner.method()

    assert while_replaced([Place(owner, "method", shout)], elsewhere) == "OWN"
    assert answers == ["own"]
    assert vars(owner) == {}


def test_replacements_nest_and_the_inner_one_counts():
    owner = Owner()

    def whisper(original):
        return original() + "..."

    def inner():
        return while_replaced([Place(owner, "method", whisper)], owner.method), owner.method()

    assert while_replaced([Place(owner, "method", shout)], inner) == ("own...", "OWN")
    assert vars(owner) == {}


def test_what_an_object_has_of_its_own_is_put_back():
    owner = Owner()
    owner.method = mine = lambda: "mine"
    assert while_replaced([Place(owner, "method", shout)], lambda: owner.method()) == "MINE"
    assert owner.method is mine


def test_what_somebody_else_puts_there_meanwhile_is_theirs():
    owner = Owner()

    def replace():
        owner.method = lambda: "theirs"

    while_replaced([Place(owner, "method", shout)], replace)
    assert owner.method() == "theirs"


def test_a_class_and_an_attribute_that_is_not_called():
    owner = Owner()
    owner.number = 1
    places = [Place(Owner, "method", shout), Place(owner, "number", view=lambda own: own + 1)]
    own = vars(Owner)["method"]
    assert while_replaced(places, lambda: (owner.method(), owner.number)) == ("OWN", 2)
    assert vars(Owner)["method"] is own and owner.number == 1


def test_stepping_aside():
    owner = Owner()

    def run():
        with rewrites.stepping_aside():
            assert not rewrites.is_replacing()
            aside = owner.method()
        return aside, owner.method()

    assert while_replaced([Place(owner, "method", shout)], run) == ("own", "OWN")
    assert not rewrites.is_replacing()


def test_many_threads_end_with_what_was_there(network):
    before = state(network)
    failures = []

    def work():
        for _ in range(5):
            try:
                scenario(network)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state(network) == before and is_idle()


def test_an_exception_passes_through():
    owner = Owner()

    def fail():
        raise tf.errors.AbortedError(None, None, "stopped")

    with pytest.raises(tf.errors.AbortedError):
        while_replaced([Place(owner, "method", shout)], fail)
    assert vars(owner) == {} and is_idle()
