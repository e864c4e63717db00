"""The states of a connection; connection.py tells what each means."""

from enum import Enum, auto


class State(Enum):
    AWAIT_IC = auto()
    AWAIT_CONNECT = auto()
    AUTHENTICATE = auto()
    LIVE = auto()
    CLOSED = auto()


NEXT = {  # every transition
    State.AWAIT_IC: {State.AWAIT_CONNECT, State.CLOSED},
    State.AWAIT_CONNECT: {State.AUTHENTICATE, State.LIVE, State.CLOSED},
    State.AUTHENTICATE: {State.LIVE, State.CLOSED},
    State.LIVE: {State.AUTHENTICATE, State.CLOSED},  # back, if the host has to prove itself again
    State.CLOSED: set(),
}
